"""Random numbers, autocast and devices are as torch.nn.RNN has them."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Case, assert_same_results, exact, gradients_of, pair, plain, run
from reference import assert_as_accurate

pytestmark = pytest.mark.usefixtures("torch_back_end")


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("L", [2, 3], ids="L{}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_torchs_for_a_seed(layout, L, dropout):
    case = Case(layout=layout, L=L, D=2, dropout=dropout, dtype=torch.float64)
    data, hx = case.tensors()
    results, states = [], []
    for module in pair(case):
        torch.manual_seed(7)
        results.append(run(case, module, data, hx))
        states.append(torch.get_rng_state())
    assert_same_results(results[1], results[0])
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


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_follows_torchs_rules(layout, hx, input_dtype):
    case = Case(T=12, H=33, layout=layout, L=2, D=2, hx=hx)
    theirs, ours = pair(case)
    data, state = case.tensors()
    data = data.detach().to(input_dtype).requires_grad_()
    truth = exact(case, theirs, data, state)
    with torch.autocast("cpu", torch.bfloat16):
        (expected, expected_h_n), (output, h_n) = (
            module(case.input(data), state) for module in (theirs, ours)
        )
    # The backward of autocast runs outside of it.
    expected, got = (
        gradients_of(case, module, data, state, plain(y), last)
        for module, y, last in ((theirs, expected, expected_h_n), (ours, output, h_n))
    )
    for name in expected:
        assert_as_accurate([got[name]], [expected[name]], [truth[name]], name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_autocast_leaves_what_torch_leaves(dtype):
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
def test_meta_device_gives_torchs_shapes(layout, hx):
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
