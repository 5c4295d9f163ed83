"""What the compiler makes of the plans, for GPUs that need not be there."""

import itertools
import json
import re

import pytest

from perf import static
from tests.support.compiled import ROOT, compile_in_a_fresh_process
from tritonrnn.kernels import launch
from tritonrnn.kernels.plan import DEVICES, PLANS, Problem

# What ``perf static`` made of every plan, by device.
TABLES = sorted((ROOT / "perf/results/static").glob("*.jsonl"))
KEPT = ("epilogue", "block_h", "block_b", "num_warps", "turns")


def static_rows(arch: str, *spreads: str) -> list[dict]:
    wanted = " + ".join(f"specimens({arch!r}, {spread})" for spread in spreads)
    code = f"from perf.static import *; print(table({wanted}).to_json(orient='records'))"
    return json.loads(compile_in_a_fresh_process(code))


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def rows(request) -> list[dict]:
    """The largest weights that fit, odd sizes, and the dearest epilogues and batches.

    ``perf static`` compiles all that is in between; its tables are in perf/results/static.
    """
    few = (
        "sizes=({},), epilogues=({!r},), dtypes=[{!r}], batches=[('packed', 2, True)], "
        "plans=('resident', 'stepwise')"
    )
    return static_rows(
        request.param,
        few.format(64, "tanh", "bf16"),
        few.format(256, "tanh_grad", "fp16"),
        few.format(201, "tanh_grad", "bf16"),
        few.format(97, "tanh", "tf32"),
        few.format(128, "tanh_grad", "tf32"),
        few.format(37, "tanh", "fp32"),
        few.format(100, "tanh_grad", "fp32"),
        few.format(128, "tanh_grad", "fp32"),
    )


def test_static_plans_do_not_spill(rows):
    assert len(rows) == 16
    assert [row for row in rows if row["spill_bytes"]] == []


def test_static_plans_know_their_shared_memory(rows):
    assert [row for row in rows if row["shared_bytes"] > row["planned_bytes"]] == []


def test_static_plans_multiply_with_matrix_instructions(rows):
    assert [row for row in rows if not row["hgmma"] and not row["hmma"]] == []
    sixteen_bit = [row for row in rows if row["dtype"] in ("bf16", "fp16")]
    assert [row for row in sixteen_bit if row["arch"] == "sm_90" and not row["hgmma"]] == []


def test_bf16_takes_tanh_from_the_hardware_and_fp16_does_not():
    counts = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "for dtype in ('bf16', 'fp16'):\n"
        "    problem = Problem(T, 16, 1, 64, dtype)\n"
        "    plan = PLANS['resident'](problem, DEVICES['sm_90'])\n"
        "    sass = compile_plan(problem, plan, DTYPES[dtype][0]).sass\n"
        "    print(count(sass, 'MUFU.TANH'), count(sass, 'MUFU.EX2'))"
    )
    # Sixteen sequences of 64 hidden units by four warps: eight numbers a thread.
    assert counts.splitlines() == ["8 0", "0 8"]


def test_static_table_of_hopper_is_kept():
    assert "sm_90" in [path.stem for path in TABLES]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_static_tables_that_are_kept_keep_their_promises(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Of the plans that are made today.
    for row in rows:
        dtype, tf32 = static.DTYPES[row["dtype"]]
        epilogue = row["epilogue"].removesuffix("_approx")
        problem = Problem(static.T, 16, row["G"], row["H"], launch.DTYPES[dtype], tf32, epilogue)
        plan = PLANS[row["plan"]](problem, DEVICES[row["arch"]])
        assert plan is not None
        assert row["planned_bytes"] == plan.shared_bytes
        assert {name: row[name] for name in KEPT} == {name: vars(plan)[name] for name in KEPT}
    # Elsewhere one of 1,456 kernels spills two registers.
    most = 0 if path.stem in ("sm_80", "sm_90") else 8
    assert [row for row in rows if row["spill_bytes"] > most] == []
    assert [row for row in rows if row["shared_bytes"] > row["planned_bytes"]] == []
    large = [row for row in rows if row["dtype"] in ("bf16", "fp16") and row["H"] >= 64]
    gangs = [row for row in rows if row["plan"] == "cooperative"]
    assert len(large) > 100
    assert path.stem != "sm_90" or [row for row in large + gangs if not row["hgmma"]] == []


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_static_plans_compile_elsewhere(arch):
    rows = static_rows(
        arch,
        "dtypes=['bf16', 'fp32'], sizes=(64, 128), epilogues=('tanh_grad',), "
        "batches=[('packed', 2, True)]",
    )
    assert [row for row in rows if row["shared_bytes"] > row["planned_bytes"]] == []
    assert {row["H"] for row in rows if row["plan"] == "resident"} == {64, 128}


def test_wgmma_reads_the_state_behind_a_barrier_and_a_proxy_fence():
    """Threads write the state through the generic proxy; wgmma reads it through the async one.

    The order wanted is: every thread's writes, a barrier, then in each reading thread a fence
    between the proxies before its wgmma. The fence may follow the barrier: what orders a write
    before a read of another proxy is a proxy fence anywhere on the path that leads from one to the
    other (PTX ISA, memory consistency model, causality order), and the barrier brings every
    thread's writes before the fence of each.
    """
    ptx = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "problem = Problem(T, 16, 1, 128, 'bf16')\n"
        "plan = PLANS['resident'](problem, DEVICES['sm_90'])\n"
        "print(compile_plan(problem, plan, torch.bfloat16).assembly['ptx'])"
    )
    body = ptx[: ptx.index("wgmma.mma_async")]
    events = re.findall(
        r"st(?:matrix\.sync\S*)?\.shared|bar\.sync|fence\.proxy\.async|wgmma\.fence", body
    )
    last_write = max(i for i, event in enumerate(events) if event.startswith("st"))
    after = events[last_write + 1 :]
    assert after.index("bar.sync") < after.index("fence.proxy.async") < after.index("wgmma.fence")


@pytest.mark.parametrize("plan", PLANS)
def test_new_lengths_and_batch_sizes_do_not_recompile(plan):
    """Whatever T and B are: 1, odd, multiples of 16, which Triton would each specialise on."""
    compiled = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "for steps, batch in [(1, 1), (7, 16), (1024, 33), (4096, 64), (3, 5000)]:\n"
        "    problem = Problem(steps, batch, 2, 64, 'bf16')\n"
        f"    plan = PLANS[{plan!r}](problem, DEVICES['sm_90'])\n"
        "    for layout in ('padded', 'packed'):\n"
        "        compile_plan(problem, plan, torch.bfloat16, layout)\n"
        "caches = launch.kernel_of(plan).device_caches.values()\n"
        "print(sum(len(cache[0]) for cache in caches))"
    )
    # One for padded batches, one for packed ones.
    assert compiled.split() == ["2"]


def test_fp32_compiles_for_amd_devices_without_tf32():
    compiled = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "for arch, warp_size in [('gfx90a', 64), ('gfx1100', 32)]:\n"
        "    device = DeviceLimits(arch, 96, 64 * 1024, warp_size)\n"
        "    problem = Problem(T, 16, 2, 64, 'fp32', tf32=True)\n"
        "    for plan in ('resident', 'stepwise'):\n"
        "        compiled = compile_plan(problem, PLANS[plan](problem, device), torch.float32)\n"
        "        print(arch, compiled.shared_bytes <= compiled.plan.shared_bytes)"
    )
    assert compiled.splitlines() == ["gfx90a True"] * 2 + ["gfx1100 True"] * 2


def test_cooperative_static_plans_keep_their_promises():
    spread = "sizes=({},), epilogues=({!r},), dtypes=[{!r}], batches=[{!r}], plans=('cooperative',)"
    rows = static_rows(
        "sm_90",
        spread.format(512, "tanh", "bf16", ("padded", 1, False)),
        spread.format(1272, "tanh_grad", "bf16", ("packed", 2, True)),
        spread.format(1536, "tanh", "bf16", ("padded", 1, False)),
        spread.format(1536, "tanh_grad", "bf16", ("packed", 2, True)),
        spread.format(1023, "tanh", "fp16", ("packed", 2, True)),
        spread.format(768, "tanh_grad", "tf32", ("packed", 2, True)),
        spread.format(333, "tanh_grad", "fp32", ("packed", 2, True)),
    )
    turns = {row["H"]: row["turns"] for row in rows}
    assert turns == {512: 2, 1272: 2, 1536: 1, 1023: 1, 768: 1, 333: 1}
    for row in rows:
        assert row["spill_bytes"] == 0
        assert row["hgmma"] > 0
        assert row["shared_bytes"] <= row["planned_bytes"] <= 227 * 1024


def test_cooperative_launch_is_one_that_the_driver_may_refuse():
    compiled = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "problem = Problem(T, 16, 1, 512, 'bf16')\n"
        "plan = PLANS['cooperative'](problem, DEVICES['sm_90'])\n"
        "print(compile_plan(problem, plan, torch.bfloat16).launches_at_once)"
    )
    assert compiled.split() == ["True"]


def test_cooperative_sends_all_reads_before_it_waits_for_one():
    """In the SASS of one step of one block: 16 reads of the state, then their way to shared."""
    sass = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "problem = Problem(T, 16, 1, 1024, 'bf16')\n"
        "plan = PLANS['cooperative'](problem, DEVICES['sm_90'])\n"
        "print('\\n'.join(compile_plan(problem, plan, torch.bfloat16).sass))"
    )
    events = re.findall(r"LDG\.E\.128\.STRONG|STS\.128|HGMMA", sass)
    order = [(event, len(list(same))) for event, same in itertools.groupby(events)]
    reads = [i for i, (event, _) in enumerate(order) if event.startswith("LDG")]
    for i in reads:
        assert [count for _, count in order[i : i + 3]] == [16, 16, 64]
    assert len(reads) == 2


def test_cooperative_publishes_and_reads_in_order():
    """In the PTX: stores, barrier, release; then acquire, barrier, read past L1."""
    ptx = compile_in_a_fresh_process(
        "from perf.static import *\n"
        "problem = Problem(T, 16, 1, 512, 'bf16')\n"
        "plan = PLANS['cooperative'](problem, DEVICES['sm_90'])\n"
        "print(compile_plan(problem, plan, torch.bfloat16).assembly['ptx'])"
    )
    lines = ptx[ptx.index("{\n", ptx.index(".entry")) :].splitlines()
    store, add = r"st\.global\.v4", r"atom\.\S*release\S*add"
    poll, read, barrier = r"ld\.acquire\.gpu", r"ld\.global\S*\.cg", r"bar\.sync"
    assert not first_of(lines, store, [add], before=barrier)
    assert first_of(lines, store, [add], before=poll)
    assert not first_of(lines, poll, [read], before=barrier)
    assert first_of(lines, poll, [read], before=add)
    # No way leads from the addition to the next read but through a poll.
    assert not first_of(lines, add, [read], before=poll)
    # Every read of the state is one of these, eight for each of the two blocks that are walked by
    # turns. The drive's loads are the program's own, and may take what L1 holds.
    assert len(re.findall(read, ptx)) == 2 * 8


def first_of(lines: list[str], start: str, targets: list[str], before: str) -> bool:
    """Whether the program's flow leads from a start to a target with no ``before`` between."""
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if ":" in line}
    pending = [i + 1 for i, line in enumerate(lines) if re.search(start, line)]
    assert pending, start
    seen = set()
    while pending:
        i = pending.pop()
        if i in seen or i >= len(lines):
            continue
        seen.add(i)
        line = lines[i]
        if any(re.search(target, line) for target in targets):
            return True
        if re.search(before, line):
            continue
        branch = re.search(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$\S+?);", line)
        if branch:
            pending.append(labels[branch[2]])
        if re.search(r"^\s*ret;", line) or (branch and not branch[1]):
            continue
        pending.append(i + 1)
    return False
