"""What a step costs in the compiled kernels, read in their SASS, for GPUs that need not be there.

Whether the kernels are right, tests.support.ptxsim shows. It executes PTX, though, and knows
nothing of what ptxas makes of it: spills, instructions, and what is waited for on the chain of a
step, from one product to the next.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

from perf.compile import static
from tests.support.compiled import Kernel, compile_kernels, events
from tests.support.processes import run_alone
from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES
from tritonrnn.kernels.plan import PLANS, Problem

# What ``perf static`` made of every plan, by device.
TABLES = sorted((Path(static.__file__).parents[1] / "results" / "static").glob("*.jsonl"))


class Cost(NamedTuple):
    """What a step of a kernel may cost.

    mma         the MMA instructions that make its products
    barriers    block barriers, at most
    check       of its other instructions, or None
    """

    mma: str
    barriers: int
    check: Callable[[dict], None] | None = None


def prefetches(row: dict) -> None:
    """Check that a resident step waits for no load, and what is on its chain.

    From a product to the next one: a wait for async copies issued steps before, a barrier, the
    epilogue, the state's way to shared memory, for the product and for the store to global memory,
    and a barrier. Nothing is loaded to a register but the row of packed batches, which a later
    iteration uses. The async copies of all steps ahead remain in flight.
    """
    loop = row["step_sass"]
    step = events(loop)
    copies = 2 if row["epilogue"].endswith("_grad") else 1
    assert step.count("LDGSTS") >= copies
    rows = [name for name in step if name.startswith("LDG.")]
    assert rows == (["LDG.E.64"] if row["layout"] == "packed" else [])
    assert not rows or not used_before_the_product_is_made("LDG.E.64", loop)
    chain = [
        name
        for name in step
        if name in ("BAR", "STS", "STSM", "FENCE") or name.startswith("DEPBAR")
    ]
    wait = f"DEPBAR.LE SB0, {copies * (row['num_stages'] - 2):#x}"
    fence = ["FENCE"] if "HGMMA" in step else []
    stores = [name for name in chain if name.startswith("STS")]
    if row["precision"] == "tf32x3":
        # The store beside the product; the state in two parts, one after the other.
        expected = [*2 * ["BAR"], wait, *4 * ["BAR"]]
        assert [name for name in chain if name not in stores] == expected
        # Each of the four tiles' products begins from zero.
        assert len([line for line in loop if re.search(r"HMMA.*, RZ\b", line)]) == 4
    else:
        # Once for the product and once for the store.
        assert len(stores) >= 2
        assert chain == [wait, "BAR", *stores, "BAR", *fence]


def used_before_the_product_is_made(load: str, loop: list[str]) -> bool:
    """Return whether a loaded value is used in the same iteration, before the last MMA."""
    start, register = next(
        (i, match[1])
        for i, line in enumerate(loop)
        if (match := re.search(rf"{re.escape(load)} (R\d+),", line))
    )
    end = max(i for i, line in enumerate(loop) if re.search("HGMMA|HMMA", line))
    return any(re.search(rf"\b{register}\b", line) for line in loop[start + 1 : end])


def overlaps(row: dict) -> None:
    """Check that loads, stores and changes of layout of ``registers`` run beside the product.

    That nothing disturbs a product in flight is a matter of ptxas, which the emulator does not see.
    From a product's end to the next one's beginning there is the epilogue, the state's way to
    shared memory, a fence (before which ptxas puts one for all memory), a wait for the copies of
    two steps before, and a barrier; then all MMA instructions at once, none of which is waited for
    by itself, as ptxas does it wherever it is in doubt.
    """
    step = events(row["step_sass"])
    # Of the row map, in packed batches: the rows to store and to prefetch.
    assert [name for name in step if name.startswith("LDG.")] == 8 * ["LDG.E.64"]
    copies = 2 if row["epilogue"].endswith("_grad") else 1
    assert step.count("LDGSTS") >= 4 * copies
    step = [name for name in step if not name.startswith("LDG")]
    parts = [list(part) for _, part in itertools.groupby(step, lambda name: name == "HGMMA")]
    assert len(parts) == 8, "four steps, in each of which the product is one block"
    bits = 32 if row["dtype"] == "tf32" else 16
    # Of 16 bits, 8 by 8 matrices change their layout on the way; the state is read back.
    if bits == 16:
        aside, kept = ["LDS", *copies * ["LDSM"]], ["STSM"]
    else:
        aside, kept = 4 * copies * ["LDS"], 4 * ["STS"]
    for product, rest in zip(parts[::2], parts[1::2]):
        # 256 bits of a row of M each.
        assert len(product) == row["block_h"] * bits // 256
        wait = next(i for i, name in enumerate(rest) if name.startswith("WARPGROUP"))
        assert sorted(rest[:wait]) == sorted(aside)
        assert rest[wait + 1 :] == [*kept, "MEMBAR", "FENCE", "DEPBAR.LE SB0, 0x2", "BAR"]
    # From an MMA instruction to the wait nothing else uses its four sums, or writes to the four
    # registers of M that it takes.
    sums: set[str] = set()
    weights: set[str] = set()
    for line in 2 * row["step_sass"]:
        product = re.search(r"HGMMA\S*\s+R(\d+), R(\d+),", line)
        written = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?[A-Z]\S*\s+(R\d+)\b", line)
        if product:
            sums = {f"R{int(product[1]) + i}" for i in range(4)}
            weights |= {f"R{int(product[2]) + i}" for i in range(4)}
        elif "DEPBAR.LE gsb0, 0x0" in line:
            sums, weights = set(), set()
        else:
            assert not sums & set(re.findall(r"\bR\d+\b", line)), line
            assert written is None or written[1] not in weights, line


def overlaps_mma_sync(row: dict) -> None:
    """Check that a step of ``registers`` by mma.sync has one barrier, and what is on its chain.

    After a step's last product there is the state's way to shared memory, a wait for the copies of
    two steps before, and the barrier. M stays where the product takes it: nothing is shuffled.
    """
    loop = row["step_sass"]
    step = events(loop)
    assert static.count(loop, r"SHFL\S*") == 0
    has_copies = "LDGSTS" in step
    rows = [name for name in step if name.startswith("LDG.") and "16" not in name]
    # Of the row map, in packed batches: the rows to store and to prefetch.
    assert rows == (8 * ["LDG.E.64"] if row["layout"] == "packed" else [])
    assert not any(name.startswith("LDG.") for name in step if has_copies and name not in rows)
    # From barrier to barrier.
    last = max(i for i, name in enumerate(step) if name == "BAR")
    step = step[last + 1 :] + step[:last]
    steps = [list(part) for is_bar, part in itertools.groupby(step, "BAR".__eq__) if not is_bar]
    assert len(steps) == 4
    bits = {"bf16": 16, "fp16": 16}.get(row["dtype"], 32)
    for part in steps:
        # 16 rows and 256 bits of each.
        products = row["block_h"] // 16 // row["num_warps"] * row["block_h"] * bits // 256
        assert part.count("HMMA") == products * (3 if row["precision"] == "tf32x3" else 1)
        end = len(part) - 1 - part[::-1].index("HMMA")
        kept = [i for i, name in enumerate(part) if name.startswith("STS")]
        assert kept
        assert min(kept) > end
        waits = [name for name in part[max(kept) :] if name.startswith("DEPBAR")]
        assert waits == (["DEPBAR.LE SB0, 0x2"] if has_copies else [])


def reads_at_once(row: dict) -> None:
    """Check that all 16 reads of the state are issued before one is waited for; of two blocks.

    And that they go past L1 (``.STRONG``), which an acquire empties in the emulator.
    """
    found = re.findall(r"LDG\.E\.128\.STRONG|STS\.128|HGMMA", "\n".join(row["sass"]))
    order = [(event, len(list(same))) for event, same in itertools.groupby(found)]
    reads = [i for i, (event, _) in enumerate(order) if event.startswith("LDG")]
    assert len(reads) == 2
    for i in reads:
        assert [count for _, count in order[i : i + 3]] == [16, 16, 64]


def one_instruction_for_tanh(row: dict) -> None:
    """Check the epilogue: of 16 sequences of 64 units by four warps, eight elements a thread."""
    counts = [static.count(row["sass"], f"MUFU.{name}") for name in ("TANH", "EX2")]
    assert counts == ([8, 0] if row["dtype"] == "bf16" else [0, 8])


# The kernels of most and of fewest registers, largest weights, odd rows, one product a state and
# several. Barriers are today's; of a stepwise kernel those of the loop over H count once, and one
# is of the last step only.
COSTS = {
    Kernel("resident", "sm_90", "bf16", 64, "tanh", "padded"): Cost("hgmma", 2, prefetches),
    Kernel("resident", "sm_90", "fp16", 128, "relu"): Cost("hgmma", 2, prefetches),
    Kernel("resident", "sm_90", "bf16", 256, "tanh_grad"): Cost("hgmma", 2, prefetches),
    Kernel("resident", "sm_90", "bf16", 100, "tanh"): Cost("hgmma", 2, prefetches),
    Kernel("resident", "sm_90", "tf32", 128, "tanh_grad"): Cost("hmma", 2, prefetches),
    Kernel("resident", "sm_90", "fp32", 128, "tanh", "padded"): Cost("hmma", 6, prefetches),
    Kernel("resident", "sm_90", "bf16", 201, "tanh_grad"): Cost("hgmma", 12),
    Kernel("resident", "sm_90", "fp16", 64, "tanh", "padded"): Cost(
        "hgmma", 2, one_instruction_for_tanh
    ),
    Kernel("registers", "sm_90", "fp16", 128, "tanh"): Cost("hgmma", 1, overlaps),
    Kernel("registers", "sm_90", "bf16", 256, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_90", "bf16", 98, "tanh_grad"): Cost("hgmma", 1, overlaps),
    Kernel("registers", "sm_90", "fp16", 64, "relu_grad"): Cost("hgmma", 1, overlaps),
    Kernel("registers", "sm_90", "tf32", 128, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_80", "bf16", 256, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_80", "fp16", 64, "tanh", "padded"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_86", "bf16", 255, "relu_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_89", "tf32", 128, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_89", "fp32", 128, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_90", "fp32", 97, "tanh"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_100", "bf16", 201, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_120", "fp16", 250, "tanh_grad"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("registers", "sm_120", "tf32", 64, "relu", "padded"): Cost("hmma", 1, overlaps_mma_sync),
    Kernel("cooperative", "sm_80", "bf16", 1024, "tanh_grad"): Cost("hmma", 20),
    Kernel("cooperative", "sm_86", "fp32", 333, "tanh_grad"): Cost("hmma", 30),
    Kernel("cooperative", "sm_89", "bf16", 1024, "tanh_grad"): Cost("hmma", 12),
    Kernel("cooperative", "sm_89", "tf32", 512, "tanh_grad"): Cost("hmma", 48),
    Kernel("cooperative", "sm_100", "bf16", 1024, "tanh_grad"): Cost("hmma", 12),
    Kernel("cooperative", "sm_120", "fp16", 201, "relu_grad"): Cost("hmma", 20),
    Kernel("cooperative", "sm_120", "bf16", 768, "relu_grad"): Cost("hmma", 24),
    Kernel("cooperative", "sm_90", "bf16", 1024, "tanh", "padded"): Cost(
        "hgmma", 16, reads_at_once
    ),
    Kernel("cooperative", "sm_90", "bf16", 1272, "tanh_grad"): Cost("hgmma", 20),
    Kernel("cooperative", "sm_90", "bf16", 1536, "tanh_grad"): Cost("hgmma", 12),
    Kernel("cooperative", "sm_90", "fp16", 1023, "tanh"): Cost("hgmma", 14),
    Kernel("cooperative", "sm_90", "tf32", 768, "tanh_grad"): Cost("hgmma", 20),
    Kernel("cooperative", "sm_90", "tf32", 1024, "tanh_grad"): Cost("hmma", 10),
    Kernel("cooperative", "sm_90", "fp32", 1024, "tanh_grad"): Cost("hmma", 12),
    Kernel("cooperative", "sm_90", "fp32", 333, "tanh_grad"): Cost("hmma", 10),
    Kernel("stepwise", "sm_90", "fp16", 201, "tanh_grad"): Cost("hgmma", 10),
    Kernel("stepwise", "sm_80", "fp32", 100, "tanh_grad"): Cost("hmma", 10),
    Kernel("stepwise", "sm_86", "fp16", 640, "relu"): Cost("hmma", 26),
}
ELSEWHERE = [
    Kernel(plan, "gfx942", dtype, 128 if dtype == "bf16" else 64, "tanh_grad")
    for plan in ("resident", "stepwise")
    for dtype in ("bf16", "fp32")
]
if not triton.__version__.startswith("3.6."):
    # Whose cuobjdump does not know it.
    ELSEWHERE += [
        Kernel(plan, "sm_103", "bf16", 128, "tanh") for plan in PLANS if plan != "resident"
    ]


@pytest.fixture(scope="module")
def rows() -> dict[Kernel, dict]:
    return compile_kernels([*COSTS, *ELSEWHERE])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", COSTS, ids=str)
def test_step_costs_what_it_may(kernel, rows):
    row, cost = rows[kernel], COSTS[kernel]
    assert row["spills_per_step"] == 0
    assert row["shared_bytes"] <= row["planned_bytes"]
    assert row[cost.mma] > 0
    assert row["bar"] <= cost.barriers
    assert row["is_cooperative_launch"] == (kernel.plan == "cooperative")
    reads_past_l1 = any(re.search(r"\bLDG\S*\.STRONG", line) for line in row["step_sass"])
    assert reads_past_l1 == (kernel.plan == "cooperative")
    if cost.check is not None:
        cost.check(row)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ELSEWHERE, ids=str)
def test_plans_compile_for_devices_without_tests_of_their_own(kernel, rows):
    assert rows[kernel]["shared_bytes"] <= rows[kernel]["planned_bytes"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_committed_static_table_is_of_todays_plans(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        dtype, tf32 = static.DTYPES[row["dtype"]]
        epilogue = row["epilogue"].removesuffix("_approx")
        problem = Problem(
            static.T, static.B, row["G"], row["H"], launch.DTYPES[dtype], tf32, epilogue
        )
        plan = PLANS[row["plan"]](problem, DEVICES[row["arch"]])
        assert plan is not None
        assert row["planned_bytes"] == plan.shared_bytes
        assert {name: row[name] for name in static.PLAN_COLUMNS} == {
            name: getattr(plan, name) for name in static.PLAN_COLUMNS
        }
    # AMD's listing does not say where it spills. What spills before the time loop costs a launch
    # less than a step.
    is_amd = path.stem.startswith("gfx")
    spilling = [row for row in rows if row["spill_bytes" if is_amd else "spills_per_step"]]
    for row in spilling:
        # Few, where a step is thousands of instructions.
        assert (row["plan"], row["block_h"]) == ("cooperative", 16)
        assert row["spills_per_step"] <= row["sass_per_step"] / 500
    assert max(row["spill_bytes"] for row in rows) <= 296
    assert [row for row in rows if row["shared_bytes"] > row["planned_bytes"]] == []
    # Every plan in every arithmetic, as far as it fits.
    fit = {(case.plan.name, case.dtype) for case in static.compile_cases(path.stem)}
    assert {(row["plan"], row["dtype"]) for row in rows} == fit
    for row in rows if path.stem == "sm_90" else []:
        is_large = row["dtype"] in ("bf16", "fp16") and row["H"] >= 64
        by_registers = row["plan"] == "registers"
        is_cooperative = row["plan"] == "cooperative"
        assert (
            row["hgmma"] or by_registers or row["block_h"] < 64 or not (is_large or is_cooperative)
        )


def test_committed_static_tables_have_every_device():
    # Triton 3.6's tools don't know sm_103.
    assert {path.stem for path in TABLES} == set(static.ARCHS) - {"sm_103"}


@pytest.mark.slow
def test_kernels_do_not_recompile_for_new_lengths_and_batch_sizes():
    """Whatever T and B are: 1, odd, multiples of 16, each of which Triton would specialise on."""
    counts = run_alone("""
        from perf.compile.static import *
        for name in PLANS:
            for T, B in [(1, 1), (7, 16), (1024, 33), (4096, 64), (3, 5000)]:
                problem = Problem(T, B, 2, 64, "bf16")
                plan = PLANS[name](problem, DEVICES["sm_90"])
                for layout in ("padded", "packed"):
                    compile_case(CompileCase("bf16", problem, layout, True, plan))
            caches = launch.kernel_of(plan).device_caches.values()
            print(sum(len(cache[0]) for cache in caches))
    """)
    # One for padded batches, one for packed ones.
    assert counts.split() == ["2"] * len(PLANS)


@pytest.mark.slow
def test_fp32_compiles_for_amd_devices_without_tf32():
    fits = run_alone("""
        import dataclasses
        from perf.compile.static import *
        for arch, warp_size in [("gfx90a", 64), ("gfx1100", 32)]:
            device = dataclasses.replace(DEVICES["gfx942"], arch=arch, warp_size=warp_size)
            problem = Problem(T, 16, 2, 64, "fp32", tf32=True)
            for name in ("resident", "stepwise"):
                plan = PLANS[name](problem, device)
                compiled = compile_case(CompileCase("fp32", problem, "padded", True, plan))
                print(compiled.kernel.metadata.shared <= plan.shared_bytes)
    """)
    assert fits.split() == ["True"] * 4
