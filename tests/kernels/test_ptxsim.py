"""Compiled kernels, emulated: a covering sample of all launches."""

import pytest

from tests.support.ptxsim.case import Case
from tests.support.ptxsim.client import Emulator
from tests.support.ptxsim.sample import all_pairs, pairs, sample

SAMPLE = sample(60)
# Elsewhere than on Hopper the registers plan serves in its place.
DO_NOT_FIT = [{("plan", "resident"), ("arch", arch)} for arch in ("sm_80", "sm_100", "sm_120")]


def test_sample_covers_every_pair_that_fits():
    """Of plan, architecture, arithmetic, epilogue, layout, groups and v_0."""
    met = set().union(*(pairs(vars(case)) for case in SAMPLE))
    assert all_pairs() - met == set(map(frozenset, DO_NOT_FIT))


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_compiled_kernel_is_right_and_free_of_races(case: Case, emulator: Emulator):
    emulator.check(case)
