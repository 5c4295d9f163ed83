"""tritonrnn.functional.rnn, without a module around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonrnn
from tests.support.cases import LAYOUTS, Case, plain
from tritonrnn.functional import rnn

pytestmark = pytest.mark.usefixtures("torch_back_end")


def options(case: Case, **changes) -> dict:
    given = {
        "nonlinearity": case.nonlinearity,
        "num_layers": case.L,
        "bidirectional": case.D == 2,
        "batch_first": case.layout == "batch-first",
        "dropout": case.dropout,
        "training": True,
    }
    return {**given, **changes}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_functional_form_is_torchs_module(layout, hx, nonlinearity, bias):
    case = Case(
        layout=layout, L=2, D=2, hx=hx, bias=bias, nonlinearity=nonlinearity, dtype=torch.float64
    )
    module = case.module(nn.RNN)
    data, state = case.tensors()
    output, h_n = rnn(case.input(data), state, list(module.parameters()), **options(case))
    expected, expected_h_n = module(case.input(data), state)
    assert type(output) is type(expected)
    torch.testing.assert_close(plain(output), plain(expected))
    torch.testing.assert_close(h_n, expected_h_n)


@pytest.mark.parametrize("container", [list, tuple, iter])
def test_weights_come_in_any_iterable_and_need_be_no_parameters(container):
    case = Case(dtype=torch.float64)
    module = case.module(nn.RNN)
    data, hx = case.tensors()
    weights = container([weight.detach() * 1 for weight in module.parameters()])
    output, _ = rnn(data, hx, weights, **options(case))
    torch.testing.assert_close(output, module(data, hx)[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_applied_in_training_only(training):
    case = Case(L=2, dropout=0.5, dtype=torch.float64)
    module = case.module(nn.RNN).train(training)
    data, hx = case.tensors()
    torch.manual_seed(5)
    expected, _ = module(data, hx)
    torch.manual_seed(5)
    output, _ = rnn(data, hx, list(module.parameters()), **options(case, training=training))
    torch.testing.assert_close(output, expected)


def test_options_are_keywords_only():
    case = Case()
    with pytest.raises(TypeError):
        rnn(*case.tensors(), list(case.module().parameters()), "tanh")


def wrong(case: Case) -> dict:
    weights = list(case.module().parameters())
    return {
        "one weight too few": (weights[:-1], {}),
        "weights of one layer for two": (weights, {"num_layers": 2}),
        "no weights": ([], {}),
        "w_hh not square": ([weights[0], weights[1][:, :-1], *weights[2:]], {}),
        "w_ih of another H": ([weights[0][:-1], *weights[1:]], {}),
        "bias of another H": ([*weights[:3], weights[3][:-1]], {}),
        "nonlinearity": (weights, {"nonlinearity": "sigmoid"}),
        "dropout": (weights, {"dropout": 1.5, "num_layers": 1}),
    }


@pytest.mark.parametrize("what", list(wrong(Case())))
def test_wrong_weights_and_options_raise(what):
    case = Case()
    weights, changes = wrong(case)[what]
    with pytest.raises((ValueError, RuntimeError)):
        rnn(*case.tensors(), weights, **options(case, **changes))


def test_module_and_functional_form_return_the_same_values():
    case = Case(L=2, D=2, layout="unsorted")
    module = case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    expected, expected_h_n = module(case.input(data), hx)
    output, h_n = rnn(case.input(data), hx, list(module.parameters()), **options(case))
    assert torch.equal(output.data, expected.data)
    assert torch.equal(h_n, expected_h_n)
