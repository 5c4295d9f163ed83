"""The oracle against torch.nn.RNN and finite differences, and the rules of accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support import oracle
from tests.support.cases import LAYOUTS, Case, assert_same_results, run

# Options vary along with the layout, so that a case covers both.
CASES = [
    Case(layout=layout, nonlinearity=nonlinearity, L=L, D=D, bias=bias, hx=hx, dtype=torch.float64)
    for layout in LAYOUTS
    for nonlinearity, L, D, bias, hx in (
        ("tanh", 2, 2, True, True),
        ("relu", 1, 2, False, True),
        ("tanh", 3, 1, True, False),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_computes_what_torch_does(case):
    results = [run(case, case.module(make), *case.tensors()) for make in (nn.RNN, oracle.RNN)]
    theirs, its = results
    assert_same_results(its, theirs, rtol=1e-11, atol=1e-12)


def test_oracle_of_complex_numbers_computes_what_torch_does():
    theirs = nn.RNN(2, 3, bidirectional=True, dtype=torch.complex128)
    its = oracle.RNN(2, 3, bidirectional=True, dtype=torch.complex128)
    its.load_state_dict(theirs.state_dict())
    x = 0.3 * torch.randn(4, 2, 2, dtype=torch.complex128)
    torch.testing.assert_close(its(x), theirs(x))


@pytest.mark.parametrize("layout", ["time-major", "unsorted"])
def test_oracle_passes_gradcheck(layout):
    case = Case(T=3, B=3, I=2, H=2, L=2, D=2, layout=layout, dtype=torch.float64)
    module = case.module(oracle.RNN)
    data, hx = case.tensors(0.7)

    def function(data, hx, *weights):
        parameters = dict(zip(dict(module.named_parameters()), weights))
        output, h_n = torch.func.functional_call(module, parameters, (case.input(data), hx))
        return output.data if case.is_packed else output, h_n

    weights = [weight.detach().clone().requires_grad_() for weight in module.parameters()]
    assert torch.autograd.gradcheck(function, (data, hx, *weights))


@pytest.mark.parametrize("epilogue", ["tanh", "relu"])
def test_epilogues_of_the_backward_pass_are_derivatives(epilogue):
    z = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = oracle.EPILOGUES[epilogue](z, None)
    cotangent = torch.randn_like(y)
    [expected] = torch.autograd.grad(y, z, cotangent)
    actual = oracle.EPILOGUES[f"{epilogue}_grad"](cotangent, y)
    torch.testing.assert_close(actual, expected)


EXACT = [torch.linspace(1, 2, 9, dtype=torch.float64)] * 3


def off_by(*errors: float) -> list[torch.Tensor]:
    """Return one draw for each relative error."""
    return [((1 + error) * EXACT[0]).float() for error in errors]


@pytest.mark.parametrize(
    ("got", "torchs"),
    [
        # Twice the error of torch and a rounding, in the median of the draws.
        (off_by(1.9e-3, 1.9e-3, 1.0), off_by(1e-3, 1e-3, 1e-3)),
        (off_by(1e-7, 0.0, 1e-7), off_by(0.0, 0.0, 0.0)),
        (off_by(9e-7, 9e-7, 9e-7), None),
    ],
    ids=["twice-torch", "rounding", "without-torch"],
)
def test_accurate_results_are_accepted(got, torchs):
    oracle.assert_as_accurate(got, torchs, EXACT)


@pytest.mark.parametrize(
    ("got", "torchs", "message"),
    [
        (off_by(2.1e-3, 2.1e-3, 0.0), off_by(1e-3, 1e-3, 1e-3), "h_n: relative error 2.10e-03"),
        (off_by(3e-7, 3e-7, 3e-7), off_by(0.0, 0.0, 0.0), "relative error"),
        (off_by(2e-6, 2e-6, 2e-6), None, "relative error"),
        (off_by(float("nan"), 0.0, 0.0), off_by(0.0, 0.0, 0.0), "not finite"),
        ([one[:8] for one in off_by(0.0, 0.0, 0.0)], off_by(0.0, 0.0, 0.0), "expected"),
        (EXACT, off_by(0.0, 0.0, 0.0), "expected"),
    ],
    ids=["twice-torch", "rounding", "without-torch", "nan", "shape", "dtype"],
)
def test_inaccurate_results_are_refused(got, torchs, message):
    with pytest.raises(oracle.InaccurateError, match=message):
        oracle.assert_as_accurate(got, torchs, EXACT, "h_n")


def test_dropout_of_the_oracle_is_between_layers_and_in_training_only():
    case = Case(L=2, dropout=1.0, dtype=torch.float64)
    for training in (True, False):
        theirs, its = (case.module(make).train(training) for make in (nn.RNN, oracle.RNN))
        assert_same_results(run(case, its, *case.tensors()), run(case, theirs, *case.tensors()))
