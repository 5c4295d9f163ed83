"""Dropout, autocast and the meta device behave as with torch.nn.RNN."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import tritonrnn
from tests.support.cases import (
    DTYPE_NAMES,
    LAYOUTS,
    Case,
    assert_autocast_as_accurate,
    assert_same_results,
    pair,
    plain,
    run,
)
from tests.support.implementations import implementations

pytestmark = pytest.mark.usefixtures("torch_back_end")


@pytest.mark.feature("tanh and relu, bias or none, layers, both directions, dropout")
@pytest.mark.parametrize("dropout", [0.3, 1.0])
@implementations(
    "layout,L",
    nn=[("unsorted", 3)],
    torch=product(LAYOUTS, (2, 3)),
    triton=[("unsorted", 3)],
)
def test_dropout_is_torchs_for_a_seed(layout, L, dropout, implementation):
    case = Case(T=3, layout=layout, L=L, D=2, dropout=dropout, dtype=torch.float64)
    case = implementation.of(case)
    data, hx = case.tensors()
    results, states = [], []
    for module in pair(case, implementation.rnn):
        torch.manual_seed(7)
        results.append(run(case, module, data, hx))
        states.append(torch.get_rng_state())
    assert_same_results(results[1], results[0], **implementation.tolerance)
    assert torch.equal(*states)


@pytest.mark.parametrize("layout", ["time-major", "packed"])
def test_dropout_does_nothing_in_eval_mode(layout):
    case = Case(layout=layout, L=2, dropout=0.5)
    _, ours = pair(case)
    data, hx = case.tensors()
    ours.eval()
    before = torch.get_rng_state()
    first, _ = ours(case.input(data), hx)
    assert torch.equal(torch.get_rng_state(), before)
    ours.dropout = 0.0
    second, _ = ours.train()(case.input(data), hx)
    assert torch.equal(plain(first), plain(second))


AUTOCASTS = [
    (layout, hx, dtype, input_dtype)
    for layout in LAYOUTS
    for hx, dtype, input_dtype in [
        (True, torch.bfloat16, torch.float32),
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.bfloat16, torch.float32),
        (False, torch.bfloat16, torch.bfloat16),
        (True, torch.float16, torch.float32),
    ]
]
FEWER = [("unsorted", True, dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.feature("autocast to bfloat16 and float16, `GradScaler`")
@implementations("layout,hx,dtype,input_dtype", nn=FEWER, torch=AUTOCASTS, triton=FEWER)
def test_autocast_follows_torchs_rules(layout, hx, dtype, input_dtype, implementation):
    case = implementation.of(Case(T=12, H=33, layout=layout, L=2, D=2, hx=hx))
    assert_autocast_as_accurate(case, dtype, input_dtype, implementation.rnn)


ON_CUDA = [
    Case(T=12, H=H, layout=layout, L=2, D=2, device="cuda") for layout in LAYOUTS for H in (33, 512)
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("case", ON_CUDA, ids=str)
def test_autocast_on_cuda_returns_its_dtype_as_accurately_as_torch(case, dtype):
    """With 33 hidden units the kernels serve the call, with 512 perhaps torch."""
    with tritonrnn.backend("auto"):
        assert_autocast_as_accurate(case, dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=DTYPE_NAMES.get)
def test_autocast_keeps_the_dtypes_that_torch_keeps(dtype):
    """float64 stays float64; a disabled region inside an enabled one is disabled."""
    case = Case(dtype=dtype)
    data, hx = case.tensors()
    for module in pair(case):
        with torch.autocast("cpu", torch.bfloat16):
            inside = module(data, hx)
            with torch.autocast("cpu", enabled=False):
                outside = module(data, hx)
        assert {y.dtype for y in (*inside, *outside)} == {dtype}


@pytest.mark.parametrize("layout", ["time-major", "batch-first", "unbatched"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
def test_meta_device_returns_torchs_shapes(layout, hx):
    case = Case(layout=layout, L=2, D=2, hx=hx)
    data, state = case.tensors()
    results = []
    for module in pair(case):
        meta_state = None if state is None else state.to("meta")
        results.append(module.to("meta")(data.to("meta"), meta_state))
    for expected, got in zip(*results):
        assert (got.device, got.dtype, got.shape) == (
            expected.device,
            expected.dtype,
            expected.shape,
        )
