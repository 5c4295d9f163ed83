"""One recurrence as a record: its arguments, its launch, and how far from float64 it may be."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tritonrnn.autotune.verification import error_share
from tritonrnn.kernels import launch
from tritonrnn.kernels.plan import PLANS, LaunchPlan
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {
    "time-major": SequenceLayout.time_major(7, 11),
    "batch-major": SequenceLayout.batch_major(11, 7),
    "packed": SequenceLayout.packed([11, 9, 9, 5, 2, 1, 1], 38),
    "jagged": RaggedLayout.jagged(torch.tensor([0, 1, 1, 8, 10, 11, 15, 16, 16, 22, 23]), 23),
    "lengths": RaggedLayout.padded(7, 9, True, torch.tensor([3, 0, 7, 1, 2, 0, 6, 7, 5])),
}
BOTH_WAYS = (False, True)
# Triton's interpreter does not know Gluon: tests.support.ptxsim runs that plan where no GPU does.
PLANS_HERE = [name for name in PLANS if DEVICE.type == "cuda" or name != "registers"]


@dataclass
class Case:
    """Arguments of one recurrence, and what float64 makes of them."""

    layout: SequenceLayout
    a: Tensor
    v_0: Tensor | None
    M: Tensor
    aux: Tensor | None
    epilogue: str
    reverse: tuple[bool, ...] = BOTH_WAYS
    tf32: bool = False

    def run(self, plan: str | LaunchPlan = "resident") -> Tensor:
        if isinstance(plan, str):
            plan = plan_of(self, plan)
        # Rows before and after the tensor, which no program may touch: as many as leave its first
        # row on 16 bytes, where what the package allocates begins.
        N, width = self.a.shape
        row_bytes = width * self.a.element_size()
        guard = 16 // math.gcd(row_bytes, 16) if row_bytes else 1
        guarded = torch.full((N + 2 * guard, width), torch.nan).to(self.a)
        s = guarded[guard : guard + N]
        # As a layer does: the output overwrites the drive, but no gradient that of the output.
        is_gradient = self.epilogue.endswith("_grad")
        a = self.a.clone() if is_gradient else s.copy_(self.a)
        ends = self.walk(a, plan, s)
        if is_gradient:
            torch.testing.assert_close(a, self.a, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ends, self.ends_of(s), rtol=0, atol=0, equal_nan=True)
        assert guarded[:guard].isnan().all()
        assert guarded[guard + N :].isnan().all()
        return s

    def ends_of(self, s: Tensor) -> Tensor:
        """Return the row of s that each sequence's walk ends with, or 0."""
        H = self.M.shape[1]
        ends = s.new_zeros(len(self.reverse), self.layout.B, H)
        for b, rows in enumerate(oracle.sequences(self.layout)):
            for g, backwards in enumerate(self.reverse if rows else ()):
                ends[g, b] = s[rows[0 if backwards else -1], g * H : (g + 1) * H]
        return ends

    def walk(self, a: Tensor, plan: LaunchPlan | str, s: Tensor | None = None) -> Tensor | None:
        """Launch the recurrence over a, in place unless s is given, and wait for nothing."""
        return launch.recurrence(
            a,
            self.v_0,
            self.M,
            self.aux,
            self.layout,
            epilogue=self.epilogue,
            reverse=self.reverse,
            tf32=self.tf32,
            plan=plan,
            s=s,
        )

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        narrow = (
            {} if dtype == torch.float64 or not self.tf32 else {"operand": oracle.round_to_tf32}
        )
        return oracle.recurrence(
            self.a,
            self.v_0,
            self.M,
            self.aux,
            self.layout,
            epilogue=self.epilogue,
            reverse=self.reverse,
            dtype=dtype,
            **narrow,
        )


def plan_of(case: Case, name: str) -> LaunchPlan:
    problem = launch.problem_of(
        case.a, case.layout, G=len(case.reverse), epilogue=case.epilogue, tf32=case.tf32
    )
    plan = PLANS[name](problem, launch.device_of(DEVICE))
    if plan is None:
        pytest.skip(f"this device has no {name} plan for it")
    return plan


def make_case(
    layout: SequenceLayout,
    H: int,
    epilogue: str,
    dtype: torch.dtype = torch.float32,
    *,
    with_v_0: bool = True,
    reverse: tuple[bool, ...] = BOTH_WAYS,
    tf32: bool = False,
) -> Case:
    """Return inputs for which tanh saturates in places, and relu is off in others."""
    generator = torch.Generator().manual_seed(layout.N * H)
    G = len(reverse)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    a = normal(layout.N, G * H, scale=2.0).to(DEVICE, dtype)
    M = normal(G, H, H, scale=H**-0.5).to(DEVICE, dtype)
    v_0 = normal(G, layout.B, H, scale=2.0).to(DEVICE) if with_v_0 else None
    aux = None
    if epilogue.endswith("_grad"):
        # The gradient of h_n, which a layer hands in as it is.
        v_0 = None if v_0 is None else v_0.to(dtype)
        aux = oracle.EPILOGUES[epilogue.removesuffix("_grad")](
            normal(layout.N, G * H, scale=2.0), a
        )
        aux = aux.to(DEVICE, dtype)
        # What the backward pass hands in: a transposed view.
        M = M.transpose(1, 2)
    return Case(layout, a, v_0, M, aux, epilogue, reverse, tf32)


def ragged_case(
    seed: int, epilogue: str = "tanh", dtype: torch.dtype = torch.bfloat16, H: int = 512
) -> Case:
    """Return a packed batch whose number of sequences and lengths are random."""
    chance = random.Random(seed)
    sizes = sorted((chance.randint(1, 90) for _ in range(chance.randint(1, 60))), reverse=True)
    layout = SequenceLayout.packed(sizes, sum(sizes))
    return make_case(layout, H, epilogue, dtype, tf32=True)


def assert_close(case: Case, actual: Tensor) -> None:
    """Allow what the package allows a plan on a user's GPU, by the same loop in torch."""
    expected = case.expected()
    assert expected.isfinite().all()
    share = error_share(
        actual, case.expected(case.a.dtype), expected, torch.finfo(case.a.dtype).eps
    )
    assert share <= 1, f"{share:.3g} times the error that is allowed"
