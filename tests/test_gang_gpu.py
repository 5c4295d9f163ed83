"""What only a GPU shows of the cooperative plan: its memory order, its streams, its graphs."""

import random
from dataclasses import replace

import pytest
import torch
from test_recurrence import Case, assert_close, make_case, plan_of

from tritonrnn.kernels import launch
from tritonrnn.layout import SequenceLayout

pytestmark = pytest.mark.gpu


def ragged_case(seed: int, H: int = 512) -> Case:
    chance = random.Random(seed)
    sizes = sorted((chance.randint(1, 40) for _ in range(chance.randint(1, 60))), reverse=True)
    layout = SequenceLayout.packed(sizes, sum(sizes))
    return make_case(layout, H, "tanh", torch.bfloat16)


@pytest.mark.parametrize("seed", range(20))
def test_cooperative_random_ragged_calls(seed):
    """Also of one gang a direction, which walks its blocks by turns: the numbers are the same."""
    case = ragged_case(seed)
    first = case.run("cooperative")
    assert_close(case, first)
    plan = plan_of(case, "cooperative")
    gang = -(-case.M.shape[-1] // plan.block_h)
    plans = [plan, replace(plan, programs=gang * len(case.reverse))]
    for turn in range(500):
        assert torch.equal(case.run(plans[turn % 2]), first)


def test_cooperative_calls_on_two_streams():
    cases = [ragged_case(seed) for seed in (0, 1)]
    expected = [case.run("cooperative") for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(100):
        results = []
        for case, stream in zip(cases, streams):
            with torch.cuda.stream(stream):
                results.append(case.run("cooperative"))
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


def test_cooperative_capture_and_replay():
    case = make_case(SequenceLayout.time_major(30, 20), 512, "tanh", torch.bfloat16)
    expected = case.run("cooperative")
    plan = plan_of(case, "cooperative")
    s = case.a.clone()

    def walk() -> None:
        s.copy_(case.a)
        launch.recurrence(
            s,
            case.v_0,
            case.M,
            None,
            case.layout,
            epilogue="tanh",
            reverse=case.reverse,
            tf32=False,
            plan=plan,
        )

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    for _ in range(20):
        s.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(s, expected)
