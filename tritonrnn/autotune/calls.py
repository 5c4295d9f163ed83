"""What is to be known of a call to choose its plan: what it compiles, and how large it is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonrnn.autotune.records import Kernel, Shapes
from tritonrnn.kernels.launch import DTYPES
from tritonrnn.kernels.plan import Problem

# Of a call of more steps, no more are timed: a step costs what it costs. Fewer decide nothing, as
# the host decides the time of a short call: on an H100 at fp32 H 64, B 16 cuDNN takes 0.3 us a step
# and the registers plan 0.47, and a call of 128 steps by either what it costs the host
# (perf/results/h100-2026-11-26 and -before).
MOST_STEPS = 1024
# Nor do more rows decide, of many sequences; and they take memory that the caller may have taken.
MOST_ROWS, LEAST_STEPS = 2**17, 128


class Call(NamedTuple):
    """A call.

    Args:
        device, dtype: of the tensors, and in which it is computed.
        tf32: whether fp32 products may round their operands to TF32.
        T, B, I, G, H, L: the sizes, by the dimension key of ``layout.py``.
        nonlinearity: "tanh" or "relu".
        mapped: whether rows come from a row map: packed or ragged.
        ragged: whether torch's own kernels don't take the layout, or so many steps.
        hx: whether initial states are given.
        training: whether a gradient may be wanted.
        torch_path: what serves it otherwise, "aten" or "in-place".
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool
    T: int
    B: int
    I: int  # noqa: E741 (the dimension key's)
    G: int
    H: int
    L: int
    nonlinearity: str
    mapped: bool
    ragged: bool
    hx: bool
    training: bool
    torch_path: str

    @property
    def problem(self) -> Problem:
        """Return the problem of a layer's forward pass."""
        dtype = DTYPES[self.dtype]
        return Problem(self.T, self.B, self.G, self.H, dtype, self.tf32, self.nonlinearity)

    def kernels(self, plan: str) -> list[Kernel]:
        """Return what a plan compiles for the call, the kernel of the forward pass first."""
        passes = [(self.nonlinearity, self.hx)]
        if self.training:
            # The gradient of h_n may be wanted or not.
            passes += [(f"{self.nonlinearity}_grad", v_0) for v_0 in (False, True)]
        dtype = DTYPES[self.dtype]
        return [
            Kernel(plan, epilogue, dtype, self.tf32, self.G, self.H, self.mapped, v_0)
            for epilogue, v_0 in passes
        ]

    def shapes(self, plan: str) -> Shapes:
        """Return the class of the call."""
        B = _rounded(self.B)
        steps = min(MOST_STEPS, max(LEAST_STEPS, MOST_ROWS // max(B, 1)))
        return Shapes(
            plan,
            self.nonlinearity,
            DTYPES[self.dtype],
            self.tf32,
            self.G,
            self.H,
            self.mapped,
            self.hx,
            self.ragged,
            self.training,
            min(_rounded(self.T), steps),
            B,
            _rounded(self.I),
            min(self.L, 2),
        )


def _rounded(n: int) -> int:
    """Return the next power of two."""
    return 1 << max(n - 1, 0).bit_length()
