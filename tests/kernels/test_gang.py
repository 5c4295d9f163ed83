"""The cooperative plan: gangs of several programs, each at its own pace."""

from dataclasses import replace

import pytest
import torch

from tests.support import gangs
from tests.support.recurrence import LAYOUTS, Case, assert_close, make_case, plan_of
from tritonrnn.kernels import launch
from tritonrnn.kernels.plan import DEVICES, LaunchPlan, Problem, cooperative_plan
from tritonrnn.ragged import RaggedLayout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes stand in for programs"),
]
H = 24


def jagged(lengths: list[int]) -> RaggedLayout:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return RaggedLayout.jagged(offsets, sum(lengths))


def gang_plan(case: Case, lanes: int = 2, programs: int = 2, turns: int = 2) -> LaunchPlan:
    """Gangs of ``programs`` programs: ``lanes`` for each group, of eight sequences each."""
    block_k = 16
    block_h = {2: 16, 3: 8}[programs]
    return replace(
        plan_of(case, "cooperative"),
        block_h=block_h,
        block_b=8,
        block_k=block_k,
        block_read=2 * block_k,
        programs=lanes * programs * len(case.reverse),
        turns=turns,
    )


@pytest.mark.parametrize("epilogue", ["tanh", "relu_grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cooperative_gangs_match_float64(layout, epilogue):
    """Two gangs in each of two directions; the second has other sequences, which end earlier."""
    case = make_case(LAYOUTS[layout], H, epilogue)
    assert_close(case, gangs.run(case, gang_plan(case), delay_s=0.005))


# Blocks of eight sequences: the second of each two is shorter, longer or empty; there is none.
SEVERAL_BLOCKS = {
    "batch-major": LAYOUTS["batch-major"],
    "packed": LAYOUTS["packed"],
    "second-longer": jagged([2, 1, 2, 0, 1, 2, 2, 1, 7, 3, 5]),
    "second-empty": jagged([2, 1, 3, 0, 1, 2, 2, 1, 0, 0]),
    "three": jagged([1, 2, 3, 1, 2, 3, 1, 2, 4, 4, 4, 4, 4, 4, 4, 4, 2, 3, 5]),
    "four": jagged([2, 3] * 4 + [4, 5] * 4 + [3, 2, 5, 1] * 2 + [6, 4, 3]),
}


@pytest.mark.parametrize("layout", SEVERAL_BLOCKS)
def test_cooperative_gang_takes_several_blocks(layout):
    """Two by turns in each step, or one after the other: the numbers are the same."""
    case = make_case(SEVERAL_BLOCKS[layout], H, "tanh_grad")
    s = gangs.run(case, gang_plan(case, lanes=1), delay_s=0.005)
    assert_close(case, s)
    assert torch.equal(s, gangs.run(case, gang_plan(case, lanes=1, turns=1)))


@pytest.mark.parametrize("seed", range(8))
def test_cooperative_gang_survives_any_schedule(seed):
    epilogue = ("tanh", "relu_grad", "tanh_grad", "relu")[seed // 2]
    reverse = ((True,), (False, True))[seed // 4]
    layout = LAYOUTS["batch-major" if seed in (3, 5) else "packed"]
    case = make_case(layout, H, epilogue, reverse=reverse)
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


def test_cooperative_plans_all_fit_the_text_of_their_assertion(monkeypatch):
    """On CUDA torch takes 254 characters, whether or not the assertion holds; here any number."""
    texts = []
    monkeypatch.setattr(torch, "_assert_async", lambda word, text: texts.append(text))
    device = DEVICES["sm_90"]
    for H, B in [(16, 1), (512, 64), (1024, 10**6), (1664, 10**6)]:
        plan = cooperative_plan(Problem(T=10**6, B=B, G=8, H=H, dtype="bf16"), device)
        if plan is not None:
            launch.check_gangs(torch.ones(1, 1), plan)
    assert len(texts) >= 3
    assert max(map(len, texts)) < 255


WAIT = "    patience = wait(counter_ptr, target, patience, INTERPRETED)\n"
STORE = "    store_step(step, moment.row, s, batch, block)\n"
PUBLISH = "    publish(counter_ptr)\n"
NEXT_BLOCKS = (
    "    for number in tl.range(lane, tl.cdiv(batch.B, BLOCK_B), TURNS * lanes, num_stages=1):\n"
)
BROKEN = {
    "no-wait": [(WAIT, "")],
    "target-one-less": [(WAIT, WAIT.replace("target,", "target - 1,"))],
    "target-one-step-less": [(WAIT, WAIT.replace("target,", "target - GANG,"))],
    "read-before-wait": [(WAIT, ""), (STORE, WAIT + STORE)],
    "publish-before-store": [(STORE + PUBLISH, PUBLISH + STORE)],
    "a-counter-for-all": [("32 * (1 + TURNS * (tl.program_id(2) * lanes + lane))", "32")],
    "a-counter-for-both-turns": [("counter_ptr + 32,", "counter_ptr,")],
    "target-anew-with-each-block": [(NEXT_BLOCKS, NEXT_BLOCKS + "        target = 1\n")],
    "other-target-anew": [(NEXT_BLOCKS, NEXT_BLOCKS + "        other_target = 1\n")],
}


@pytest.mark.parametrize("change", BROKEN)
def test_cooperative_gang_notices_a_broken_protocol(change, tmp_path):
    """What is wrong in the kernel's text shows in one of few schedules, most of it in the first."""
    layout = SEVERAL_BLOCKS["four"] if "anew" in change else LAYOUTS["packed"]
    case = make_case(layout, H, "tanh")
    kernel = gangs.broken(tmp_path, *BROKEN[change])
    plan = gang_plan(case, lanes=1)
    expected = gangs.run(case, plan)

    def goes_wrong(seed: int) -> bool:
        s = gangs.run(case, plan, kernel=kernel, seed=seed, delay_s=0.05)
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
    kernel = gangs.broken(tmp_path, (PUBLISH, ""))
    with pytest.raises(gangs.GangError, match="still ran"):
        gangs.run(case, gang_plan(case), kernel=kernel, limit_s=2.0, patience=2**31 - 1)
