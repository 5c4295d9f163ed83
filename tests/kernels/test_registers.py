"""The walk with M in registers: what the imitation of Hopper notices, what the compiler makes."""

import itertools
import re

import pytest
import torch

from tests.support import compiled, gangs, oracle
from tests.support.recurrence import LAYOUTS, Case, assert_close, make_case
from tritonrnn.kernels import launch
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the imitation is not used")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "tf32"])
@pytest.mark.parametrize("epilogue", oracle.EPILOGUES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registers_match_float64(layout, epilogue, dtype):
    case = make_case(LAYOUTS[layout], 38, epilogue, dtype, tf32=dtype == torch.float32)
    assert_close(case, case.run("registers"))


@pytest.mark.parametrize("T", range(1, 9))
@pytest.mark.parametrize("layout", [SequenceLayout.time_major, SequenceLayout.batch_major])
def test_registers_walk_any_number_of_steps(T, layout):
    """Steps are walked by fours, and what they take is under way for several."""
    case = make_case(layout(T, 9), 20, "tanh_grad", torch.bfloat16)
    assert_close(case, case.run("registers"))


def test_registers_walk_blocks_without_a_token():
    lengths = torch.tensor([0, 2, 3, 0, 0, 0, 0, 1, *8 * [0], 4, 0])
    layout = RaggedLayout.jagged(torch.cat([torch.tensor([0]), lengths.cumsum(0)]), 10)
    case = make_case(layout, 20, "tanh", torch.float16)
    assert_close(case, case.run("registers"))


def test_registers_let_a_state_overflow_as_torch_does():
    """To infinity, and not to NaN by way of hidden units that are not there."""
    case = make_case(SequenceLayout.time_major(9, 3), 20, "relu", torch.float16, with_v_0=False)
    case.a, case.M = case.a.abs(), 9 * case.M.abs()
    s = case.run("registers")
    assert s.isinf().any()
    assert torch.equal(s.isnan(), case.expected(torch.float16).isnan())


FENCE = "    hopper.fence_async_shared()\n"
BARRIER = "    hopper.barrier()\n"
WAIT = "    hopper.wait_group(2)\n"
STATE = "    state.store(operand.to(s.dtype))\n"
KEEP = "    keep_state(s, next_state, PRECISION, INTERPRETED)\n"
ON_THE_CHAIN = "    # On the chain again.\n"
BROKEN = {
    "no-fence": [(FENCE, "")],
    "no-barrier": [(BARRIER, "")],
    "fence-behind-the-barrier": [(BARRIER, BARRIER + FENCE), (FENCE + "    # For", "    # For")],
    "fence-before-the-state": [(FENCE, ""), (STATE, FENCE + STATE)],
    "one-state-for-both-parities": [("odd if i % 2 == 0 else even", "even if i % 2 == 0 else odd")],
    "state-overwritten-under-the-product": [
        (ON_THE_CHAIN, "    state.store(state.load(MEMORY))\n")
    ],
    "first-state-not-zero": [("keep_state(s, even, PRECISION, INTERPRETED)", "pass")],
    "no-wait-for-what-was-sent": [(WAIT, "")],
    "wait-for-too-few": [("hopper.wait_group(2)", "hopper.wait_group(3)")],
    "wait-behind-the-barrier": [(WAIT, ""), (BARRIER, BARRIER + WAIT)],
    "sent-over-what-is-being-read": [
        ("                a_tiles[i],", "                a_tiles[(i + 1) % 4],")
    ],
    "numbers-of-another-step": [("send_for(step + 4, ", "send_for(step + 5, ")],
    "aux-of-another-step": [("next_aux_tile.load", "aux_tile.load")],
    "first-aux-missing": [
        ("prepare(0, a, aux, batch, block, EPI", "prepare(0, a, a, batch, block, EPI")
    ],
    "store-of-no-step": [("store_state(step - 1, ", "store_state(step, ")],
    "last-state-not-stored": [("block.longest + 1, 4", "block.longest, 4")],
    "v_0-in-every-step": [("(time_at(step, block) == block.joins)", "(block.joins >= 0)")],
}


@on_cpu
@pytest.mark.parametrize("change", BROKEN)
def test_registers_notice_a_broken_walk(change, tmp_path, monkeypatch):
    cases = [
        make_case(LAYOUTS["packed"], 20, "tanh", torch.float16),
        # Of a whole number of turns, and of fp32 numbers.
        make_case(SequenceLayout.time_major(4, 3), 20, "tanh", tf32=True),
        make_case(LAYOUTS["jagged"], 20, "tanh_grad", torch.bfloat16),
    ]
    expected = [case.run("registers") for case in cases]
    text = (gangs.PACKAGE / "registers.py").read_text()
    broken = gangs.changed(text, tmp_path, *BROKEN[change])
    monkeypatch.setattr(launch, "kernel_of", lambda plan: broken.recurrence_in_registers_kernel)

    def is_right(case: Case, expected: torch.Tensor) -> bool:
        try:
            return torch.equal(case.run("registers"), expected)
        except AssertionError:
            # It stored in rows that are not its own.
            return False

    assert not all(map(is_right, cases, expected))


# The kernels of most registers, and of rows of an odd number of pairs.
DEAREST = [
    ("fp16", 252, "tanh"),
    ("bf16", 256, "tanh_grad"),
    ("bf16", 98, "tanh_grad"),
    ("fp16", 64, "relu_grad"),
    ("tf32", 128, "tanh_grad"),
]


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    spread = (
        "'sm_90', dtypes=[{!r}], sizes=[{}], epilogues=[{!r}], plans=['registers'], "
        "batches=[('packed', 2, True)]"
    )
    return compiled.kernels([spread.format(*kernel) for kernel in DEAREST])


def test_registers_suffice(kernels):
    assert [kernel["spilled"] for kernel in kernels] == [0] * len(DEAREST)
    assert [kernel for kernel in kernels if kernel["shared"] > kernel["planned"]] == []


def test_registers_keep_memory_off_the_chain(kernels):
    """In the SASS of the time loop: reads, stores and changes of layout run beside the product.

    From a product's end to the next one's beginning there is the epilogue, the state's way to
    shared memory, a fence (before which ptxas puts one for all memory), a wait for what was sent
    for two steps before, and a barrier; then at once all matrix instructions, none of which is
    waited for by itself, as ptxas has it wherever it is in doubt. No number of a step is loaded to
    a register, which would be waited for in the step that loads it, but all come to shared memory
    by themselves.
    """
    for kernel in kernels:
        events = compiled.events(kernel["loop"])
        # Of the row map, in packed batches: the rows to store and to send for.
        rows = [name for name in events if name.startswith("LDG.")]
        assert rows == 8 * ["LDG.E.64"]
        changes = 2 if kernel["has_aux"] else 1
        assert events.count("LDGSTS") >= 4 * changes
        events = [name for name in events if not name.startswith("LDG")]
        parts = [list(part) for _, part in itertools.groupby(events, lambda e: e == "HGMMA")]
        assert len(parts) == 8, "four steps, in each of which the product is one block"
        height = max(64, 1 << (kernel["H"] - 1).bit_length())
        # Of 16 bits, matrices of 8 by 8 change their layout on the way; the state is read back.
        if kernel["bits"] == 16:
            aside, kept = ["LDS", *changes * ["LDSM"]], ["STSM"]
        else:
            aside, kept = 4 * changes * ["LDS"], 4 * ["STS"]
        for product, rest in zip(parts[::2], parts[1::2]):
            # 256 bits of a row of M each.
            assert len(product) == height * kernel["bits"] // 256
            wait = next(i for i, name in enumerate(rest) if name.startswith("WARPGROUP"))
            assert sorted(rest[:wait]) == sorted(aside)
            assert rest[wait + 1 :] == [*kept, "MEMBAR", "FENCE", "DEPBAR.LE SB0, 0x2", "BAR"]


def test_registers_leave_a_product_under_way_alone(kernels):
    """In the SASS: from a matrix instruction to the wait nothing else takes up its four sums."""
    for kernel in kernels:
        sums: set[str] = set()
        products = 0
        for line in 2 * kernel["loop"]:
            product = re.search(r"HGMMA\S*\s+R(\d+),", line)
            if product:
                first = int(product[1])
                sums = {f"R{first + i}" for i in range(4)}
                products += 1
            elif "DEPBAR.LE gsb0, 0x0" in line:
                sums = set()
            else:
                assert not sums & set(re.findall(r"\bR\d+\b", line)), line
        assert products
