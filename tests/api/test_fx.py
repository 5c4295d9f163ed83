"""A call is one node of what ``torch.fx`` traces, as a call of torch.nn's modules is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import tritonrnn
from tests.support.cases import Case, pair, plain

pytestmark = pytest.mark.usefixtures("torch_back_end")


class Around(nn.Module):
    """A model whose layer takes whatever the model does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, input, hx):
        return self.layer(input, hx)


def nodes_of(graph_module) -> list[tuple]:
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes]


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("kind", ["RNN", "RNNCell", "a subclass", "a converted subclass"])
def test_modules_are_leaves(kind, hx):
    class Theirs(nn.RNN):
        pass

    class Ours(tritonrnn.RNN):
        pass

    layer = {
        "RNN": tritonrnn.RNN,
        "RNNCell": tritonrnn.RNNCell,
        "a subclass": Ours,
        "a converted subclass": lambda *sizes: tritonrnn.convert(Theirs(*sizes)),
    }[kind](3, 5)
    given = torch.randn(4, 3), torch.randn(4 if kind == "RNNCell" else 1, 5)
    model = Around(layer) if hx else nn.Sequential(layer)
    graph_module = symbolic_trace(model)
    assert [op for op, _ in nodes_of(graph_module) if op not in ("placeholder", "output")] == [
        "call_module"
    ]
    given = given if hx else given[:1]
    torch.testing.assert_close(graph_module(*given), model(*given))


@pytest.mark.parametrize("layout", ["time-major", "unsorted"])
def test_traced_model_agrees_whatever_the_length(layout):
    case = Case(L=2, D=2, layout=layout, dropout=0.5)
    theirs, ours = (symbolic_trace(Around(module)) for module in pair(case))
    assert nodes_of(ours) == nodes_of(theirs)
    for T in (4, 7):
        other = Case(T=T, L=2, D=2, layout=layout)
        data, hx = other.tensors()
        (expected, expected_h_n), (output, h_n) = (
            model.eval()(other.input(data), hx) for model in (theirs, ours)
        )
        torch.testing.assert_close([plain(output), h_n], [plain(expected), expected_h_n])


def test_hooks_run_once():
    rnn = tritonrnn.RNN(3, 5)
    rnn.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:]))
    rnn.register_forward_hook(lambda module, inputs, results: (results[0] + 1, results[1]))
    x, hx = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    torch.testing.assert_close(symbolic_trace(Around(rnn))(x, hx), rnn(x, hx))


def test_functions_and_a_module_alone_are_traced():
    """torch.nn.RNN alone is not."""
    rnn, x, hx = tritonrnn.RNN(5, 5), torch.randn(4, 2, 5), torch.randn(1, 2, 5)
    nothing = {"lengths": None, "reset": None}
    torch.testing.assert_close(symbolic_trace(rnn, nothing)(x, hx), rnn(x, hx))

    def run(x, lengths, *weights):
        output, _ = tritonrnn.functional.rnn(x, None, weights, lengths=lengths)
        return tritonrnn.functional.rnn_cell(x[0], output[-1], *weights)

    class Run(nn.Module):
        def forward(self, x, lengths, w_ih, w_hh):
            return run(x, lengths, w_ih, w_hh)

    arguments = x, torch.tensor([3, 4]), rnn.weight_ih_l0, rnn.weight_hh_l0
    traced = symbolic_trace(Run())
    assert sum(op == "call_function" and "rnn" in target for op, target in nodes_of(traced)) == 2
    torch.testing.assert_close(traced(*arguments), run(*arguments))


def test_prepare_fx_leaves_it_whole():
    with warnings.catch_warnings():
        # It is deprecated for a package that torch does not bring along.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        model, x = nn.Sequential(tritonrnn.RNNCell(3, 5), nn.Linear(5, 2)).eval(), torch.randn(4, 3)
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (x,))
        torch.testing.assert_close(prepared(x), model(x))
        assert isinstance(convert_fx(prepared).get_submodule("0"), tritonrnn.RNNCell)
