"""The cooperative plan: gangs of several programs, each at its own pace."""

from dataclasses import replace

import gangs
import pytest
import torch
from test_recurrence import LAYOUTS, Case, assert_close, make_case, plan_of

from tritonrnn.kernels.plan import LaunchPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes stand in for programs"),
]
H = 24


def gang_plan(case: Case, lanes: int = 2, programs: int = 2, block_k: int = 16) -> LaunchPlan:
    """Gangs of ``programs`` programs: ``lanes`` for each group, of eight sequences each."""
    block_h = {2: 16, 3: 8}[programs]
    return replace(
        plan_of(case, "cooperative"),
        block_h=block_h,
        block_b=8,
        block_k=block_k,
        block_read=2 * block_k,
        programs=lanes * programs * len(case.reverse),
    )


@pytest.mark.parametrize("epilogue", ["tanh", "relu_grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cooperative_gangs_match_float64(layout, epilogue):
    """Two gangs in each of two directions; the second has other sequences, which end earlier."""
    case = make_case(LAYOUTS[layout], H, epilogue)
    assert_close(case, gangs.run(case, gang_plan(case), delay_s=0.005))


@pytest.mark.parametrize("layout", ["batch-major", "packed"])
def test_cooperative_gang_takes_several_blocks(layout):
    case = make_case(LAYOUTS[layout], H, "tanh_grad")
    assert_close(case, gangs.run(case, gang_plan(case, lanes=1), delay_s=0.005))


@pytest.mark.parametrize("seed", range(4))
def test_cooperative_gang_survives_any_schedule(seed):
    case = make_case(LAYOUTS["packed"], H, "tanh", reverse=(True,))
    plan = gang_plan(case, programs=3, lanes=1 + seed % 2)
    s = gangs.run(case, plan, seed=seed, delay_s=0.05)
    assert_close(case, s)
    assert torch.equal(s, gangs.run(case, plan))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cooperative_gang_rounds_as_one_program(dtype):
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    case = make_case(LAYOUTS["jagged"], H, "tanh", dtypes[dtype], with_v_0=False)
    assert_close(case, gangs.run(case, gang_plan(case)))


def test_cooperative_gang_gives_up_on_a_lost_program():
    """The others come to their end all the same, and the result can't be taken for a good one."""
    case = make_case(LAYOUTS["packed"], H, "tanh")
    with pytest.raises(RuntimeError, match="waited in vain for the others of its gang"):
        gangs.run(case, gang_plan(case), lost=(0, 1, 0), patience=200)


WAIT = "            patience = wait(counter_ptr, target, patience, INTERPRETED)\n"
COUNT = "            target += GANG\n"
AFTER_READ = "        else:\n            for k in tl.range(0, H, BLOCK_K, disable_licm=True):\n"
STORE = "            tl.store(a_ptr + row + tile, s, mask=mask_h & live)\n"
PUBLISH = '        if PLAN == "cooperative":\n            publish(counter_ptr)\n'
BROKEN = {
    "no-wait": [(WAIT, "")],
    "target-one-less": [(WAIT, WAIT.replace("target,", "target - 1,"))],
    "target-one-step-less": [(WAIT, WAIT.replace("target,", "target - GANG,"))],
    "read-before-wait": [(WAIT + COUNT, ""), (AFTER_READ, WAIT + COUNT + AFTER_READ)],
    "publish-before-store": [(STORE + PUBLISH, "            publish(counter_ptr)\n" + STORE)],
    "a-counter-for-all": [("32 * (1 + group * lanes + lane)", "32")],
}


@pytest.mark.parametrize("change", BROKEN)
def test_cooperative_gang_notices_a_broken_protocol(change, tmp_path):
    """What is wrong in the kernel's text shows in one of few schedules, most of it in the first."""
    case = make_case(LAYOUTS["packed"], H, "tanh")
    kernel = gangs.broken(tmp_path, *BROKEN[change])
    expected = gangs.run(case, gang_plan(case))

    def goes_wrong(seed: int) -> bool:
        s = gangs.run(case, gang_plan(case), kernel=kernel, seed=seed, delay_s=0.05)
        return not torch.equal(s, expected)

    # On a busy machine a delay may pass while nobody else runs; then the next one tells.
    assert any(map(goes_wrong, range(20)))


def test_cooperative_gang_notices_nothing_where_nothing_is_broken(tmp_path):
    case = make_case(LAYOUTS["packed"], H, "tanh")
    s = gangs.run(case, gang_plan(case), kernel=gangs.broken(tmp_path), delay_s=0.05)
    assert torch.equal(s, gangs.run(case, gang_plan(case)))


def test_cooperative_gang_ends_a_program_that_hangs(tmp_path):
    """A counter that nobody adds to, and no patience to lose: the harness ends it."""
    case = make_case(LAYOUTS["packed"], H, "tanh", reverse=(True,))
    kernel = gangs.broken(tmp_path, ("            publish(counter_ptr)\n", "            pass\n"))
    with pytest.raises(gangs.GangError, match="still ran"):
        gangs.run(case, gang_plan(case), kernel=kernel, limit_s=2.0, patience=2**31 - 1)
