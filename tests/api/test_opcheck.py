"""The operators pass torch's own checks: schema, autograd, shapes for tracing, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from tests.support.cases import Case
from tests.support.implementations import implementations
from tests.support.operators import OperatorCall

pytestmark = [
    pytest.mark.slow,
    # The reserve tells of any other back end by a shape that no tracer can know.
    pytest.mark.usefixtures("torch_back_end"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CALLS = [
    OperatorCall(
        layout,
        Case(T=3, B=3, I=3, H=4, D=D, nonlinearity=nonlinearity, hx=hx),
        backend,
        lengths="lengths" in ragged,
        reset="reset" in ragged,
    )
    for layout, D, nonlinearity, hx, backend, *ragged in [
        ("time_major", 1, "tanh", False, "torch"),
        ("time_major", 2, "tanh", True, "auto"),
        ("time_major", 2, "relu", True, "torch", "lengths"),
        ("time_major", 2, "relu", True, "triton"),
        ("batch_major", 2, "tanh", True, "torch"),
        ("batch_major", 1, "relu", False, "triton"),
        ("batch_major", 2, "tanh", True, "torch", "reset"),
        ("batch_major", 2, "relu", True, "triton", "lengths", "reset"),
        ("packed", 2, "relu", True, "torch"),
        ("packed", 1, "tanh", False, "triton"),
        ("jagged", 1, "tanh", False, "torch"),
        ("jagged", 2, "relu", True, "triton"),
    ]
]


@pytest.mark.feature("`torch.library.opcheck` of its operators", nn="has none of its own")
@implementations(
    "call",
    torch=[call for call in CALLS if call.backend == "torch"],
    triton=[call for call in CALLS if call.backend == "triton"],
)
def test_elman_passes_opcheck(call, implementation):
    call = replace(call, case=implementation.of(call.case))
    opcheck(torch.ops.tritonrnn.elman.with_reserve, call.forward(requires_grad=True))


def test_elman_passes_opcheck_where_nothing_is_trained():
    opcheck(torch.ops.tritonrnn.elman.with_reserve, CALLS[0].forward())


def test_operators_of_sizes_on_the_cpu_pass_opcheck_and_stay_out_of_cuda_graphs():
    operators = torch.ops.tritonrnn
    call = next(call for call in CALLS if call.layout == "packed")
    for operator, arguments in (
        (operators.elman.sizes_on_cpu, call.forward(requires_grad=True)),
        (operators.elman_backward.sizes_on_cpu, call.backward()),
    ):
        assert torch.Tag.cudagraph_unsafe in operator.tags
        opcheck(operator, arguments)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_elman_backward_passes_opcheck(call):
    opcheck(torch.ops.tritonrnn.elman_backward.default, call.backward())


@pytest.mark.parametrize("with_grads", [(True, False), (False, True)], ids=str)
def test_elman_backward_passes_opcheck_with_one_cotangent(with_grads):
    opcheck(torch.ops.tritonrnn.elman_backward.default, CALLS[3].backward(with_grads))
