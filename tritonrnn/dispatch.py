"""Choose the back end and the plan that serve a call, and say why in one sentence."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonrnn.environment import BACKEND, Backend, checked
from tritonrnn.layer import Recurrence
from tritonrnn.layout import SequenceLayout
from tritonrnn.paths import inplace, onnx
from tritonrnn.paths.composite import why_composite
from tritonrnn.precision import rounds_to_tf32

if TYPE_CHECKING:
    from tritonrnn.autotune.records import Record
    from tritonrnn.kernels.plan import LaunchPlan

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
    token = _chosen.set(checked(name, "backend", Backend))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> Backend:
    """Return the back end asked for here: by the nearest context, else by the environment."""
    return _chosen.get() or _default


_default = BACKEND


@dataclass(frozen=True)
class Choice:
    """What serves a call.

    Attributes:
        backend: "triton" or "torch"; "auto" while a program is being compiled or traced.
        plan: how. On triton the ``LaunchPlan`` of the forward pass; on torch the path, one of
            ``tritonrnn.paths``: "in-place", "composite" or "aten".
        reason: why, in one sentence.
        record: of the trial that decided, if one did.
    """

    backend: Backend
    plan: str | LaunchPlan
    reason: str
    record: Record | None = None

    @property
    def operator_backend(self) -> str:
        """Return what the operator is told: "torch", "auto", or "triton:" and a plan's name."""
        return self.backend if isinstance(self.plan, str) else f"triton:{self.plan.name}"


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    may_try: bool = True,
    **call: Any,
) -> Choice:
    """Choose for a call of these sizes, in the context at hand.

    While a program is compiled, exported or traced, the operator makes the choice later, when it
    runs.

    Args:
        device: of the tensors.
        dtype: in which the call is computed.
        may_try: whether trials of plans may be made now.
        call: what else :func:`choose_now` takes.

    Raises:
        RuntimeError: the back end asked for can't serve the call.
    """
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return choose_now(current_backend(), device, dtype, may_try=may_try, **call)
    composite = why_composite(dtype)
    if composite:
        return Choice("torch", "composite", composite)
    if torch.jit.is_tracing() and onnx.is_exporting():
        if call.get("ragged"):
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
    I: int = 1,  # noqa: E741 (the dimension key's)
    G: int = 1,
    H: int,
    L: int = 1,
    nonlinearity: str,
    mapped: bool = False,
    ragged: bool = False,
    hx: bool = True,
    needs_grad: bool = True,
    may_try: bool = False,
) -> Choice:
    """Choose as :func:`choose` does, but for the back end ``asked`` and not by the context.

    Args:
        asked: the back end.
        device, dtype: of the tensors, and in which the call is computed.
        T, B, I, G, H, L: the sizes, by the dimension key of ``layout.py``.
        nonlinearity: "tanh" or "relu".
        mapped: whether rows come from a row map: packed, or with lengths or resets.
        ragged: whether torch's own kernels can't take the layout, one of ``ragged.py``.
        hx: whether initial states are given.
        needs_grad: whether a gradient may be wanted. A plan is judged by its forward pass if not.
        may_try: whether trials of plans may be made now, where no record of one stands.
    """
    composite = why_composite(dtype)
    obstacle = composite or _obstacle(device, dtype)
    if asked == "triton" and obstacle:
        raise RuntimeError(f"the triton back end can't serve this call: {obstacle}")
    # On CUDA torch's own kernels are cuDNN's, which take any number of steps up to a limit.
    fewest = FEWEST_STEPS[mapped, needs_grad]
    limit = _MAX_STEPS_OF_CUDNN if device.type == "cuda" else (fewest - 1) // G
    path = "aten" if not ragged and T <= max(limit, 1) else "in-place"
    if composite:
        return _torchs_choice("composite", composite)
    if asked == "torch":
        return _torchs_choice(path, "torch was asked for.")
    if obstacle:
        return _torchs_choice(path, obstacle)
    # Imported only here: Triton may not be installed.
    from tritonrnn import autotune

    tf32 = rounds_to_tf32(device, dtype)
    mode = autotune.mode()
    key = (
        *(asked, device, dtype, T, B, I, G, H, L, nonlinearity, mapped, ragged, hx, needs_grad),
        *(tf32, mode),
    )
    known: Choice | None = autotune.standing.get(key)
    if known is not None:
        return known
    call = autotune.Call(
        device,
        dtype,
        tf32,
        T=T,
        B=B,
        I=I,
        G=G,
        H=H,
        L=L,
        nonlinearity=nonlinearity,
        mapped=mapped or ragged,
        ragged=ragged or T > _MAX_STEPS_OF_CUDNN,
        hx=hx,
        training=needs_grad,
        torch_path=path,
    )
    decision = autotune.decide(call, mode, forced=asked == "triton", may_try=may_try)
    if decision.plan is None:
        choice = Choice("torch", path, decision.reason, decision.record)
    else:
        choice = Choice("triton", decision.plan, decision.reason, decision.record)
    if decision.missing is None:
        if len(autotune.standing) >= _MOST_STANDING:
            autotune.standing.clear()
        autotune.standing[key] = choice
    return choice


_MOST_STANDING = 4096


# Made once: on a CPU most calls have one of two.
@functools.lru_cache(maxsize=64)
def _torchs_choice(path: str, reason: str) -> Choice:
    return Choice("torch", path, reason)


def asked_where_steps_decide(data: Tensor) -> Backend | None:
    """Return the back end asked for where :func:`choose_by_steps` chooses as :func:`choose` does.

    So it does in an eager call on a CPU, where no kernel can serve. Else return None.

    Args:
        data: the input of an eager call.
    """
    if not data.is_cpu or why_composite(data.dtype) is not None:
        return None
    asked = current_backend()
    return asked if asked == "torch" or not _is_interpreted else None


@functools.lru_cache(maxsize=1024)
def choose_by_steps(
    asked: Backend,
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    G: int,
    mapped: bool,
    ragged: bool,
    needs_grad: bool,
) -> Choice:
    """Choose as :func:`choose_now` does, where no other size matters."""
    call: dict[str, Any] = {"mapped": mapped, "ragged": ragged, "needs_grad": needs_grad}
    return choose_now(asked, device, dtype, T=T, B=1, G=G, H=1, nonlinearity="tanh", **call)


def recurrence_of(backend: str, device: torch.device, dtype: torch.dtype) -> Recurrence:
    """Return the recurrence of a back end.

    Args:
        backend: "torch", "triton:" and the name of a plan, or "triton", which programs exported
            before plans had names give: the first plan that is not known to be wrong.
        device, dtype: of the tensors.
    """
    if backend == "torch":
        return inplace.recurrence
    # Imported only here: Triton may not be installed.
    from tritonrnn.kernels import launch

    tf32 = rounds_to_tf32(device, dtype)
    name = backend.partition(":")[2]
    if name:
        return functools.partial(launch.recurrence, tf32=tf32, plan=name)
    return functools.partial(_by_first_plan, tf32)


def _by_first_plan(
    tf32: bool,
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: tuple[bool, ...],
    **ends: Any,
) -> Tensor | None:
    """Run the recurrence by the first plan that is not known to be wrong."""
    from tritonrnn import autotune
    from tritonrnn.kernels import launch

    plan = autotune.first_possible(
        launch.problem_of(a, layout, G=len(reverse), epilogue=epilogue, tf32=tf32),
        a.device,
        mapped=not layout.is_padded,
        v_0=v_0 is not None,
    )
    return launch.recurrence(
        a, v_0, M, aux, layout, epilogue=epilogue, reverse=reverse, tf32=tf32, plan=plan, **ends
    )


# Steps of all directions from which the in-place path is faster on a CPU than torch's own kernels,
# by whether there is a row map, which takes time to make, and whether a gradient may be wanted: a
# step costs the path less, and a call more. Measured on an AMD EPYC with torch 2.13, from B 1, H 32
# to B 32, H 128 (python -m perf cpu --short; rows in perf/results/cpu-short-*).
FEWEST_STEPS = {
    (False, False): 32,
    (False, True): 10,
    (True, False): 130,
    (True, True): 12,
}
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
    elif _is_too_old(device):
        return "the kernels need a GPU of compute capability 8.0 or later."
    return None


# Every call asks, and torch makes a new object of the device's properties each time.
@functools.cache
def _is_too_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
