"""Choose the back end and the plan that serve a call, and say why in one sentence."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from tritonrnn.layer import Recurrence
from tritonrnn.paths import inplace, onnx
from tritonrnn.paths.composite import why_composite
from tritonrnn.precision import rounds_to_tf32

if TYPE_CHECKING:
    from tritonrnn.kernels.plan import LaunchPlan

Backend = Literal["auto", "triton", "torch"]

_chosen: ContextVar[Backend | None] = ContextVar("tritonrnn_backend", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the back end of every call inside, in this thread or task only.

    The backward pass of a call uses the back end of its forward pass, wherever it runs. The
    environment variable ``TRITONRNN_BACKEND``, read when tritonrnn is imported, names the back end
    of calls outside of any context.

    Args:
        name: "triton" for the kernels; "torch" for torch's operators, on any device; "auto", the
            default, for the kernels where they serve a call well and torch elsewhere.

    Raises:
        ValueError: ``name`` is none of the three.
        RuntimeError: in a call inside, if the named back end can't serve it.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> Backend:
    """Return the back end asked for here: by the nearest context, else by the environment."""
    return _chosen.get() or _default


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{source}: expected one of {get_args(Backend)}, got {name!r}")
    return name  # type: ignore[return-value]


# Read once: every call asks, and to read a variable takes most of a microsecond.
_default = _checked(os.environ.get("TRITONRNN_BACKEND") or "auto", "TRITONRNN_BACKEND")


@dataclass(frozen=True)
class Choice:
    """What serves a call.

    Attributes:
        backend: "triton" or "torch"; "auto" while a program is being compiled or traced.
        plan: how. On triton the ``LaunchPlan`` of the forward pass; on torch the path, one of
            ``tritonrnn.paths``: "in-place", "composite" or "aten".
        reason: why, in one sentence.
    """

    backend: Backend
    plan: str | LaunchPlan
    reason: str


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    T: int,
    B: int,
    G: int = 1,
    H: int,
    nonlinearity: str,
    ragged: bool = False,
) -> Choice:
    """Choose for a call of these sizes, in the context at hand.

    While a program is compiled, exported or traced, the operator makes the choice later, when it
    runs.

    Args:
        device: of the tensors.
        dtype: in which the call is computed.
        T, B, G, H: the sizes, by the dimension key of ``layout.py``.
        nonlinearity: "tanh" or "relu".
        ragged: whether the layout is one of ``ragged.py``, which torch's own kernels don't take.

    Raises:
        RuntimeError: the back end asked for can't serve the call.
    """
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return choose_now(
            current_backend(),
            device,
            dtype,
            T=T,
            B=B,
            G=G,
            H=H,
            nonlinearity=nonlinearity,
            ragged=ragged,
        )
    composite = why_composite(dtype)
    if composite:
        return Choice("torch", "composite", composite)
    if torch.jit.is_tracing() and onnx.is_exporting():
        if ragged:
            raise RuntimeError(
                "torch.onnx.export(dynamo=False) takes no lengths=, no reset= and no nested input: "
                "with dynamo=True it takes lengths="
            )
        return Choice("torch", "aten", "torch.onnx.export(dynamo=False) knows torch's RNN only.")
    return Choice("auto", "in-place", "a compiled program chooses each time that it runs.")


def choose_now(
    asked: Backend,
    device: torch.device,
    dtype: torch.dtype,
    *,
    T: int,
    B: int,
    G: int,
    H: int,
    nonlinearity: str,
    ragged: bool = False,
) -> Choice:
    """Choose as :func:`choose` does, but for the back end ``asked`` and not by the context."""
    composite = why_composite(dtype)
    obstacle = composite or _obstacle(device, dtype)
    if asked == "triton" and obstacle:
        raise RuntimeError(f"the triton back end can't serve this call: {obstacle}")
    if asked != "torch" and not obstacle:
        # Imported only here: Triton may not be installed.
        from tritonrnn.kernels import cost, devices, launch, plan

        problem = plan.Problem(
            T, B, G, H, launch.DTYPES[dtype], rounds_to_tf32(device, dtype), nonlinearity
        )
        gpu = devices.device_of(device)
        chosen = cost.choose_plan(problem, gpu)
        if isinstance(chosen, plan.LaunchPlan):
            if asked == "triton" or plan.UNTRIED.get(chosen.name) != "torch":
                return Choice("triton", chosen, "the kernels have a plan for it.")
            obstacle = f"the {chosen.name} plan has yet to be run on a GPU."
        elif asked == "triton" or ragged:
            why = "triton was asked for." if asked == "triton" else "cuDNN takes no such batch."
            return Choice("triton", cost.best_triton_plan(problem, gpu), why)
        else:
            obstacle = chosen.reason
    if composite:
        return Choice("torch", "composite", composite)
    reason = "torch was asked for." if asked == "torch" else obstacle
    # torch's own kernels are as fast as any for a single step, and on CUDA they are cuDNN's.
    is_aten = not ragged and (T == 1 or (device.type == "cuda" and T <= _MAX_STEPS_OF_CUDNN))
    return _torchs_choice("aten" if is_aten else "in-place", reason or "")


# Made once: on a CPU most calls have one of two.
@functools.lru_cache(maxsize=64)
def _torchs_choice(path: str, reason: str) -> Choice:
    return Choice("torch", path, reason)


def is_decided_by_sizes(asked: Backend, device: torch.device) -> bool:
    """Return whether sizes and dtypes decide alone: on a CPU where no kernel can serve."""
    return device.type == "cpu" and (asked == "torch" or not _is_interpreted)


def recurrence_of(backend: str, device: torch.device, dtype: torch.dtype) -> Recurrence:
    """Return the recurrence of a back end, "torch" or "triton"."""
    if backend == "torch":
        return inplace.recurrence
    # Imported only here: Triton may not be installed.
    from tritonrnn.kernels import launch

    return functools.partial(launch.recurrence, tf32=rounds_to_tf32(device, dtype))


# https://github.com/pytorch/pytorch/issues/133751
_MAX_STEPS_OF_CUDNN = 65535


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# Triton's own variable, for tests. Not Triton's view of it: asking Triton means to load it.
_is_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels can't serve this device or dtype, or None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 and float16, not in {dtype}."
    if device.type not in ("cuda", "cpu"):
        return f"the kernels run on CUDA and ROCm devices, not on {device.type}."
    if not _has_triton():
        return "Triton is not installed."
    if device.type == "cpu":
        if not _is_interpreted:
            return "the tensors are on the CPU."
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later."
    return None
