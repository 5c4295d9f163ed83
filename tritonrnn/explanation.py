"""Explain which back end and plan serve a call, and why, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tritonrnn.modules import RNN, nonlinearity_of, weights_of
from tritonrnn.validation import check


@dataclass(frozen=True)
class Explanation:
    """What serves a call, for ``print``.

    Attributes:
        backend: "triton" or "torch".
        plan: on triton the plan of the kernel, on torch the path: "in-place", "composite" or
            "aten".
        reason: why this back end and plan, in one sentence.
        trial: what the trial on this device found that decided, in one line; "" if none did.
        layout: "time_major", "batch_major", "packed" or "jagged".
        shape: the sizes of the call: steps T (of the longest sequence), sequences B, rows N,
            input size I, hidden units H, layers L, directions D. What lies between two resets
            counts as a sequence.
        dtype: in which it is computed.
        device: on which it is computed.
    """

    backend: str
    plan: str
    reason: str
    layout: str
    shape: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    trial: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        trial = f"trial     {self.trial}\n" if self.trial else ""
        return (
            f"back end  {self.backend}\n"
            f"plan      {self.plan}\n"
            f"reason    {self.reason}\n"
            f"{trial}"
            f"call      {self.layout}, {sizes}, {self.dtype} on {self.device}"
        )


def explain(
    module: RNN,
    input: Tensor | PackedSequence,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Explanation:
    """Return which back end and plan would serve a call of the module, here and now. Run nothing.

    Args:
        module: a :class:`tritonrnn.RNN`, or a subclass of ``torch.nn.RNN`` after
            :func:`tritonrnn.convert`.
        input, hx, lengths, reset: the arguments of the call.

    Raises:
        TypeError: ``module`` is neither.
        Exception: what the call itself would raise before its first operation.
    """
    # A converted subclass of torch.nn.RNN runs RNN.forward, but is no instance of RNN.
    runs_as_ours = getattr(type(module), "forward", None) is RNN.forward
    if not isinstance(module, RNN) and not runs_as_ours:
        given = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"Expected a tritonrnn.RNN to explain, got {given}")
    call = check(
        input,
        hx,
        weights_of(module),
        nonlinearity_of(module),
        module.num_layers,
        module.bidirectional,
        module.batch_first,
        module.dropout,
        module.training,
        lengths,
        reset,
        may_try=False,
    )
    shape = {**call.sizes, "L": module.num_layers, "D": 2 if module.bidirectional else 1}
    reason = call.choice.reason
    if call.data.is_cuda:
        from tritonrnn.kernels.devices import device_of

        missing = device_of(call.data.device).missing_plans
        reason = f"{reason}; {missing}" if missing else reason
    return Explanation(
        call.choice.backend,
        str(call.choice.plan),
        reason,
        call.layout,
        shape,
        call.dtype,
        call.data.device,
        "" if call.choice.record is None else str(call.choice.record),
    )


def trials() -> list[dict[str, Any]]:
    """Return what all trials of plans found on the GPUs at hand, as rows of a DataFrame.

    The first call of a class of shapes on a GPU tries Triton's plans there: whether their numbers
    are right (``kind`` "right"), and whether they are faster than torch's own path ("fast"). What
    it finds is kept for all processes in the folder ``tritonrnn`` of Triton's cache
    (``TRITON_CACHE_DIR``); remove that folder to have everything tried again.

    Returns:
        Rows in the order of time, with ``kind``, ``verdict``, what was tried (``plan``, sizes,
        ...), ``reason``, and ``seconds`` that the trial took, where and when (``host``, ``pid``,
        ``when`` in seconds since 1970). Of a kernel ``error``, the largest, as a share of what is
        allowed; of a time ``against``, and the quartiles of a call in microseconds by the plan and
        by that (``plan_us_p25``, ..., ``other_us_p75``); else NaN. Then what the record depends on:
        ``device_name``, ..., ``device_source``. A verdict of "started" is a trial that runs, or in
        which the process ended. No rows where Triton is not installed.
    """
    if find_spec("triton") is None:
        return []
    # Imported only here: Triton may not be installed.
    from tritonrnn import autotune

    return autotune.trials()
