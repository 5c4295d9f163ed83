"""What only a GPU shows of the cooperative plan: its memory order, its streams, its graphs."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.cases import DTYPE_NAMES
from tests.support.recurrence import DEVICE, assert_close, make_case, plan_of, ragged_case
from tritonrnn.layout import SequenceLayout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("epilogue", ["tanh", "tanh_grad"])
@pytest.mark.parametrize("seed", range(5))
def test_cooperative_random_ragged_calls(seed, epilogue, dtype):
    """Also with one CTA group a direction, which walks all blocks, in bf16 interleaved.

    A kernel on another stream, of random length, takes some of the multiprocessors for a while, so
    that programs do not start together.
    """
    case = ragged_case(seed, epilogue, dtype)
    first = case.run("cooperative")
    assert_close(case, first)
    plan = plan_of(case, "cooperative")
    cta_group_size = -(-case.M.shape[-1] // plan.block_h)
    plans = [plan, replace(plan, programs=cta_group_size * len(case.reverse))]
    chance = random.Random(seed)
    busy, square = torch.cuda.Stream(), torch.ones(2048, 2048, device="cuda")
    for call in range(500):
        with torch.cuda.stream(busy):
            for _ in range(chance.randrange(3)):
                size = chance.randrange(64, 2048)
                torch.mm(square[:size], square, out=torch.empty_like(square[:size]))
        assert torch.equal(case.run(plans[call % 2]), first)


def test_cooperative_calls_on_two_streams():
    """Each waits until all of its programs can run, and has counters of its own."""
    layout = SequenceLayout.packed([40] * 200 + [9] * 100, 40 * 200 + 9 * 100)
    cases = [make_case(layout, 512, epilogue, torch.bfloat16) for epilogue in ("tanh", "relu")]
    expected = [case.run("cooperative") for case in cases]
    plans = [plan_of(case, "cooperative") for case in cases]
    calls = [[case.a.clone() for _ in range(50)] for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        # Its copy of the row map, for which the host may wait.
        with torch.cuda.stream(stream):
            layout.terms(DEVICE)
    torch.cuda.synchronize()
    # Both begin when all has been queued, so that each has a launch to run at any time.
    torch.cuda._sleep(10**9)
    queued = torch.cuda.Event()
    queued.record()
    for stream in streams:
        stream.wait_event(queued)
    for call in range(50):
        for which, case in enumerate(cases):
            with torch.cuda.stream(streams[which]):
                case.walk(calls[which][call], plans[which])
    torch.cuda.synchronize()
    for which, results in enumerate(calls):
        assert all(torch.equal(s, expected[which]) for s in results)


def test_cooperative_grid_that_can_not_run_at_once_is_refused():
    case = ragged_case(0)
    plan = plan_of(case, "cooperative")
    with pytest.raises(RuntimeError, match="cooperative launch"):
        case.walk(case.a.clone(), replace(plan, programs=1000 * plan.programs))


def test_cooperative_wait_in_vain_fails_the_next_synchronising_call():
    """In a process of its own, whose context does not survive it."""
    code = (
        "import torch\n"
        "from tests.support.recurrence import plan_of, ragged_case\n"
        "from tritonrnn.kernels import launch\n"
        "case = ragged_case(0)\n"
        "plan = plan_of(case, 'cooperative')\n"
        # Counters that begin too low: every program waits for one addition more than there is.
        "make = launch.barrier_counters\n"
        "def too_low(*of):\n"
        "    counters = make(*of)\n"
        "    counters[1:] -= 1\n"
        "    return counters\n"
        "launch.barrier_counters = too_low\n"
        "launch.MAX_SPINS = 1000\n"
        "s = case.a.clone()\n"
        "case.walk(s, plan)\n"
        "try:\n"
        "    torch.cuda.synchronize()\n"
        "except RuntimeError as error:\n"
        "    print('raised', flush=True)"
    )
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "raised" in process.stdout, process.stderr
    assert "gave up waiting" in process.stderr


def test_cooperative_capture_and_replay():
    case = make_case(SequenceLayout.time_major(30, 20), 512, "tanh", torch.bfloat16)
    expected = case.run("cooperative")
    plan = plan_of(case, "cooperative")
    s = case.a.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s.copy_(case.a)
        case.walk(s, plan)
    for _ in range(20):
        s.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(s, expected)
