"""Which back end serves a call, and in one sentence why."""

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

from tritonrnn.precision import rounds_to_tf32

if TYPE_CHECKING:
    from tritonrnn.kernels.plan import LaunchPlan

Backend = Literal["auto", "triton", "torch"]

_chosen: ContextVar[Backend | None] = ContextVar("tritonrnn_backend", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the back end of every call made inside, in this thread or task only.

    A call keeps the back end of its forward pass for its backward pass, wherever that runs. The
    environment variable ``TRITONRNN_BACKEND`` names the one to use outside of any such context.

    Args:
        name: "triton", the kernels; "torch", the torch path on any device; "auto", the default,
            the kernels for whatever they serve well and torch for the rest.

    Raises:
        ValueError: ``name`` is none of the three.
        RuntimeError: from a call inside which the named back end can't serve.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> Backend:
    """The back end asked for here: by the nearest context, else by the environment."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _checked(os.environ.get("TRITONRNN_BACKEND") or "auto", "TRITONRNN_BACKEND")


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{source}: expected one of {get_args(Backend)}, got {name!r}")
    return name  # type: ignore[return-value]


@dataclass(frozen=True)
class Choice:
    """What serves a call.

    Attributes:
        backend: "triton" or "torch"; "auto" while a program is being compiled.
        plan: how. On triton a ``LaunchPlan``, of the forward pass. On torch: "walk", an operator
            a layer that walks in place; "recorded", every step recorded by autograd; "native",
            torch's own ``rnn_tanh`` and ``rnn_relu``, which on CUDA are cuDNN's.
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
    G: int,
    H: int,
    nonlinearity: str,
    ragged: bool = False,
) -> Choice:
    """Choose for a call of these sizes, in the context that it is made in.

    While a program is being compiled or exported, the choice is left to the operator.

    Args:
        ragged: whether the layout is one of ``ragged.py``, which torch's own kernels don't take.

    Raises:
        RuntimeError: the back end asked for can't serve the call.
    """
    recorded = why_recorded(dtype)
    if not torch.compiler.is_compiling():
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
    if recorded:
        return Choice("torch", "recorded", recorded)
    return Choice("auto", "walk", "a compiled program chooses each time that it runs.")


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
    """:func:`choose` of the back end asked for, whatever the context."""
    recorded = why_recorded(dtype)
    obstacle: str | None = recorded or _obstacle(device, dtype)
    if asked == "triton" and obstacle:
        raise RuntimeError(f"the triton back end can't serve this call: {obstacle}")
    if asked != "torch" and not obstacle:
        # Only here: without Triton, there is nothing to import.
        from tritonrnn.kernels import cost, devices, launch, plan

        problem = plan.Problem(
            T, B, G, H, launch.DTYPES[dtype], rounds_to_tf32(device, dtype), nonlinearity
        )
        limits = devices.device_of(device)
        chosen = cost.choose_plan(problem, limits)
        if isinstance(chosen, plan.LaunchPlan):
            if asked == "triton" or chosen.name not in _NOT_BY_DEFAULT:
                return Choice("triton", chosen, "the kernels have a plan for it.")
            obstacle = f"the {chosen.name} plan has yet to be run on a GPU."
        elif asked == "triton" or ragged:
            why = "triton was asked for." if asked == "triton" else "cuDNN takes no such batch."
            return Choice("triton", cost.best_triton_plan(problem, limits), why)
        else:
            obstacle = chosen.reason
    if recorded:
        return Choice("torch", "recorded", recorded)
    reason = "torch was asked for." if asked == "torch" else obstacle
    # torch's own kernels are as good as any where there is no walk, and on CUDA they are cuDNN.
    native = T == 1 or (device.type == "cuda" and T <= _LONGEST_OF_CUDNN)
    native = native and not ragged
    return Choice("torch", "native" if native else "walk", reason or "")


# https://github.com/pytorch/pytorch/issues/133751
_LONGEST_OF_CUDNN = 65535

# Plans whose programs wait for one another, until their tests have passed on a GPU
# (tests/kernels/test_gang_gpu.py): what goes wrong there ends the process's use of the GPU.
# Torch's path takes their place, but where the Triton back end is asked for. (plan.UNTRIED are
# passed over altogether, for another plan.)
_NOT_BY_DEFAULT = ("cooperative",)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels can't serve this device or dtype, or None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 and float16, not in {dtype}."
    if device.type not in ("cuda", "cpu"):
        return f"the kernels run on CUDA and ROCm devices, not on {device.type}."
    if not _has_triton():
        return "Triton is not installed."
    if device.type == "cpu":
        # The variable, not Triton's own view of it: asking Triton means to load it.
        if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
            return "the tensors are on the CPU."
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later."
    return None


def why_recorded(dtype: torch.dtype) -> str | None:
    """Why every step has to be an operation that autograd records, or None if not."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, which needs every step recorded."
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is active, which needs every step recorded."
    if dtype.is_complex:
        return f"{dtype} is differentiated by torch, step by step."
    return None
