"""torch.utils.flop_counter counts for ours what it counts for torch.nn.RNN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tritonrnn
from tests.support.cases import Case, pair, plain
from tests.support.processes import run_alone

CASES = [
    Case(L=2, D=2),
    Case(layout="batch-first", L=2, hx=False, nonlinearity="relu"),
    Case(layout="unbatched", D=2, bias=False, hx=False),
    Case(layout="unsorted", L=2, hx=False),
    Case(layout="packed"),
]


def counts(module: nn.Module, case: Case, train: str) -> list[int]:
    """Return the operations of the forward pass, and of forward and backward."""
    data, hx = case.tensors()
    if train == "weights":
        data, hx = (None if x is None else x.detach() for x in (data, hx))
    elif train == "input":
        module.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        output, _ = module(case.input(data), hx)
        forward = counter.get_total_flops()
        plain(output).sum().backward()
    return [forward, counter.get_total_flops()]


@pytest.mark.slow
@pytest.mark.parametrize("back_end", ["torch", "triton"])
@pytest.mark.parametrize("train", ["all", "weights", "input"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_are_those_of_torch(case, train, back_end):
    theirs, ours = pair(case)
    expected = counts(theirs, case, train)
    if back_end == "triton" and torch.cuda.is_available():
        case = replace(case, device="cuda")
        ours.cuda()
    with tritonrnn.backend(back_end):
        assert counts(ours, case, train) == expected


@pytest.mark.parametrize("given", ["lengths", "jagged"])
def test_ragged_batches_count_the_rows_of_their_input(given):
    rnn, lengths = tritonrnn.RNN(3, 5), torch.tensor([4, 0, 2])
    if given == "jagged":
        x = torch.nested.nested_tensor([torch.ones(n, 3) for n in lengths], layout=torch.jagged)
        N, options = 6, {}
    else:
        x, N, options = torch.ones(4, 3, 3), 12, {"lengths": lengths}
    with FlopCounterMode(display=False) as counter:
        _, h_n = rnn(x, **options)
        h_n.sum().backward()
    forward, backward = 2 * N * 5 * (3 + 5), 2 * N * 5 * (3 + 5) + 2 * (N - 3) * 5 * 5
    assert counter.get_total_flops() == forward + backward


@pytest.mark.slow
def test_counter_may_be_imported_later():
    """The other tests import it first. It imports Triton, so tritonrnn does not import it."""
    run_alone("""
        import sys, torch, tritonrnn
        assert "torch.utils.flop_counter" not in sys.modules
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            tritonrnn.RNN(3, 5)(torch.ones(4, 2, 3))
        assert counter.get_total_flops() == 2 * 8 * 5 * (3 + 5)
        assert not any("tritonrnn" in type(finder).__module__ for finder in sys.meta_path)
    """)
