"""Compiled kernels, emulated: any number of steps, empty blocks, overflow, NaN, lost CTAs."""

from dataclasses import replace

import pytest

from tests.support.ptxsim.case import GAVE_UP, Case
from tests.support.ptxsim.client import Emulator

pytestmark = pytest.mark.slow

# Rows of whole words, which async copies prefetch, and others, which are loaded.
WORDS, LOADS = 20, 21
PLANS = {
    "resident": Case("resident", H=WORDS),
    "resident-loads": Case("resident", H=LOADS),
    "registers": Case("registers", H=WORDS),
    "registers-sm_80": Case("registers", "sm_80", H=WORDS),
    "registers-loads": Case("registers", "sm_80", H=LOADS),
    # Two CTAs, the second of which has few hidden units.
    "cooperative": Case("cooperative", H=72, cta_groups=1),
    "cooperative-sm_80": Case("cooperative", "sm_80", H=72, cta_groups=1),
    "stepwise": Case("stepwise", H=WORDS),
}


@pytest.mark.parametrize("T", [*range(1, 7), 9])
@pytest.mark.parametrize("layout", ["batch_major", "packed"])
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "stepwise"])
def test_any_number_of_steps(plan: str, layout: str, T: int, emulator: Emulator):
    """Fewer and more than are prefetched, or than a loop has in one iteration."""
    emulator.check(replace(PLANS[plan], T=T, B=9, G=2, layout=layout, epilogue="tanh_grad"))


LARGE = [
    Case("registers", arithmetic="fp16", H=252, T=4, B=5),
    Case("registers", H=64, T=3, B=3, layout="packed", far=True),
    Case("registers", H=24, T=3, B=9, G=5, layout="ragged", epilogue="relu_grad"),
    Case("resident", H=256, T=4, B=5, G=2, layout="packed", epilogue="tanh_grad"),
    Case("registers", "sm_80", H=256, T=5, B=9, G=2, layout="packed", epilogue="tanh_grad"),
    Case("registers", "sm_80", H=255, T=5, B=9, layout="ragged", epilogue="tanh_grad"),
    Case("registers", "sm_80", "tf32", H=128, T=5, B=5, layout="packed", epilogue="relu_grad"),
    Case("registers", "sm_80", "fp32", H=128, T=5, B=5, layout="packed", epilogue="tanh"),
    # 64 hidden units a CTA, and 32.
    Case("cooperative", "sm_80", H=512, T=3, B=3, layout="packed", epilogue="tanh_grad"),
    Case("cooperative", "sm_80", "tf32", H=320, T=3, B=3, layout="ragged"),
    Case("cooperative", "sm_89", H=704, T=2, B=3, layout="packed"),
    Case("cooperative", "sm_89", "fp32", H=200, T=3, B=9, layout="ragged", epilogue="tanh_grad"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_largest_tiles_far_rows_and_many_groups(case: Case, emulator: Emulator):
    emulator.check(case)


# The same kernels for what lies in padding, overflows or is NaN.
PADDED = {"arithmetic": "fp16", "layout": "padded"}


@pytest.mark.parametrize("plan", PLANS)
def test_blocks_without_a_token(plan: str, emulator: Emulator):
    """One is empty, one has tokens in its last sequence but one only."""
    lengths = (0, 2, 3, 0, 0, 1, *30 * [0], 4, 0)
    case = replace(PLANS[plan], T=4, B=len(lengths), lengths=lengths, epilogue="relu")
    emulator.check(replace(case, **PADDED))


@pytest.mark.parametrize("epilogue", ["relu", "tanh_grad"])
@pytest.mark.parametrize("plan", PLANS)
def test_state_overflows_as_in_torch(plan: str, epilogue: str, emulator: Emulator):
    """To infinity, and not to NaN by way of hidden units that are padding."""
    case = replace(PLANS[plan], T=9, B=3, epilogue=epilogue, inputs="overflow")
    emulator.check(replace(case, **PADDED))


@pytest.mark.parametrize("epilogue", ["relu", "tanh_grad"])
@pytest.mark.parametrize("plan", PLANS)
def test_nan_stays_in_its_sequence(plan: str, epilogue: str, emulator: Emulator):
    case = replace(PLANS[plan], T=4, B=6, epilogue=epilogue, poison=True)
    emulator.check(replace(case, **PADDED))


@pytest.mark.parametrize("epilogue", ["relu", "relu_grad"])
@pytest.mark.parametrize(
    "plan", ["resident", "registers-sm_80", "cooperative", "cooperative-sm_80", "stepwise"]
)
def test_fp32_bears_the_truncation_of_tensor_cores(plan: str, epilogue: str, emulator: Emulator):
    """Which cut off the sum of each instruction, where the interpreter rounds it to nearest.

    tanh makes an error smaller, on the way forward and back.
    """
    truncating = {"arithmetic": "fp32", "truncates": True}
    emulator.check(replace(PLANS[plan], H=100, T=7, B=11, epilogue=epilogue, **truncating))


# Batch blocks of 16 sequences. Of each two that are interleaved, the second is longer or empty, or
# there is none.
BLOCKS = {
    "second-longer": (*8 * [2, 1], 7, 3, 5),
    "second-empty": (*8 * [3, 1], 0, 0),
    "three": (*8 * [1, 2], *16 * [4], 3, 5),
    "four": (*8 * [2, 3], *8 * [4, 5], *8 * [3, 1], 6, 4, 3),
}


@pytest.mark.parametrize("lengths", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("plan", ["cooperative", "cooperative-sm_80"])
def test_cta_group_takes_several_blocks(plan: str, lengths: tuple[int, ...], emulator: Emulator):
    """Interleaved or one after the other, the output is the same."""
    case = replace(
        PLANS[plan],
        T=max(lengths),
        B=len(lengths),
        layout="ragged",
        epilogue="tanh_grad",
        lengths=lengths,
    )
    interleaved, alone = (emulator.check(replace(case, interleave=n)) for n in (2, 1))
    assert interleaved.digest == alone.digest


@pytest.mark.parametrize("epilogue", ["tanh", "relu_grad"])
@pytest.mark.parametrize(("arch", "cta_groups"), [("sm_90", 1), ("sm_90", 2), ("sm_80", 1)])
def test_cta_group_survives_any_schedule(
    arch: str, cta_groups: int, epilogue: str, emulator: Emulator
):
    case = Case("cooperative", arch, H=136, T=3, B=35, layout="packed", epilogue=epilogue, seed=1)
    case = replace(case, cta_groups=cta_groups)
    results = [emulator.check(replace(case, schedule=100 * i)) for i in range(2)]
    assert len({result.digest for result in results}) == 1


@pytest.mark.parametrize("lost", [0, 1, 5])
def test_cta_group_gives_up_on_a_lost_cta(lost: int, emulator: Emulator):
    """The others come to their end all the same, and leave word that the output is wrong."""
    case = Case("cooperative", H=136, T=4, B=20, G=2, cta_groups=1, lost=lost, max_spins=5)
    result = emulator.emulate(case)
    assert not result.error, result
    assert any(fault.startswith(GAVE_UP) for fault in result.faults), result
