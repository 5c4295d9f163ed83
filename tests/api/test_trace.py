"""Traced by ``torch.jit.trace``, a module serves every length and batch, as torch's does."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

import tritonrnn
from tests.support.cases import Case
from tests.support.exported import Model, arguments_of

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # Checks of sizes are not traced. torch.nn's modules warn of that as well.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def saved_and_loaded(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=1, L=2, D=2, hx=False),
        Case(T=1, layout="batch-first"),
        Case(T=1, layout="unbatched", nonlinearity="relu"),
        Case(T=4, layout="unsorted", D=2, hx=False),
    ],
    ids=str,
)
def test_traced_model_agrees_whatever_the_length_and_batch(case, grad):
    model = Model(case).eval()
    with torch.set_grad_enabled(grad):
        # It compares two traces as well as their results.
        traced = torch.jit.trace(model, arguments_of(case), check_trace=True)
        if not grad:
            traced = saved_and_loaded(traced)
        for T, B in ((case.T, case.B), (1, 4), (6, 5)):
            arguments = arguments_of(replace(case, T=T, B=B, seed=T))
            torch.testing.assert_close(traced(*arguments), model(*arguments))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_traced_cell_agrees_whatever_the_batch(nonlinearity):
    cell = tritonrnn.RNNCell(3, 5, nonlinearity=nonlinearity)
    traced = saved_and_loaded(torch.jit.trace(cell, torch.randn(4, 3)))
    # Of torch's own operations: whoever loads it needs nothing else.
    assert "tritonrnn::" not in str(traced.graph)
    for B in (7, 1):
        input = torch.randn(B, 3)
        torch.testing.assert_close(traced(input), cell(input))


def test_traced_model_chooses_its_back_end_when_it_runs():
    rnn = tritonrnn.RNN(3, 5)
    with torch.no_grad():
        traced = torch.jit.trace(rnn, torch.randn(4, 2, 3))
    (call,) = (node for node in traced.graph.nodes() if node.kind() == "tritonrnn::elman")
    assert [*call.inputs()][-2].toIValue() == "auto"


class Called(torch.nn.Module):
    """Scripted by itself, torch.nn.RNN has no ``forward``."""

    def __init__(self, rnn: torch.nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, input: torch.Tensor):
        return self.rnn(input)


@pytest.mark.feature("`torch.jit.script`", torch="no", triton="no")
def test_scripted_model_agrees(implementation):
    model = Called(implementation.rnn(3, 5))
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
