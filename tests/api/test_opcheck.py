"""torch's own checks of a custom operator: schema, autograd, shapes for tracing, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from tests.support.cases import Case
from tests.support.operators import LAYOUTS, OperatorCall

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CALLS = [
    OperatorCall(layout, Case(T=4, B=3, I=3, H=4, D=D, nonlinearity=nonlinearity, hx=hx), backend)
    for layout in LAYOUTS
    for D, nonlinearity, hx, backend in [
        (1, "tanh", False, "torch"),
        (2, "relu", True, "torch"),
        (2, "tanh", True, "triton"),
    ]
]
CALLS += [
    replace(CALLS[1], lengths=True),
    replace(CALLS[5], lengths=True, reset=True),
    replace(CALLS[4], reset=True),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_elman_passes_opcheck(call):
    opcheck(torch.ops.tritonrnn.elman.default, call.forward(requires_grad=True))


def test_elman_passes_opcheck_where_nothing_is_trained():
    opcheck(torch.ops.tritonrnn.elman.default, CALLS[0].forward())


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_elman_backward_passes_opcheck(call):
    opcheck(torch.ops.tritonrnn.elman_backward.default, call.backward())


@pytest.mark.parametrize("with_grads", [(True, False), (False, True)], ids=str)
def test_elman_backward_passes_opcheck_with_one_cotangent(with_grads):
    opcheck(torch.ops.tritonrnn.elman_backward.default, CALLS[1].backward(with_grads))
