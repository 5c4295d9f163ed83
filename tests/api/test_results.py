"""tritonrnn.RNN returns what torch.nn.RNN returns: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from tests.support.cases import (
    DTYPE_NAMES,
    LAYOUTS,
    Case,
    assert_accurate_over,
    assert_as_accurate_as_on_cpu,
    assert_cotangents_of_any_memory,
    assert_same_results,
    assert_zero_gradients,
    pair,
    plain,
    run,
)
from tests.support.implementations import here_and_on_gpu, implementations

pytestmark = pytest.mark.usefixtures("torch_back_end")

EVERY_OPTION = [
    Case(layout=layout, nonlinearity=nonlinearity, bias=bias, L=L, D=D, hx=hx)
    for layout, nonlinearity, (bias, hx), L, D in product(
        LAYOUTS,
        ("tanh", "relu"),
        ((True, True), (False, True), (True, False)),
        (1, 2),
        (1, 2),
    )
    if not (bias or hx) or L == D or layout in ("time-major", "unsorted")
]
EVERY_DTYPE = [
    Case(layout=layout, dtype=dtype, L=2, D=2, H=11)
    for layout, dtype in product(LAYOUTS, (torch.float64, torch.bfloat16, torch.float16))
]
# Few units, or one of them is near 0 in nearly every draw.
EVERY_DTYPE += [
    Case(T=3, B=3, H=5, D=2, layout=layout, nonlinearity="relu", dtype=dtype)
    for layout, dtype in product(LAYOUTS, (torch.float64, torch.bfloat16, torch.float16))
]
SIZES = [
    Case(T=63, B=3, I=33, H=97),
    Case(T=64, B=8, I=32, H=64, dtype=torch.bfloat16),
    Case(T=33, B=1, I=1, H=31, D=2),
    Case(T=1, B=3, I=5, H=17, L=3),
    Case(T=2, B=17, I=3, H=16, L=3, D=2, layout="unsorted"),
    Case(T=31, B=9, I=7, H=1, layout="packed"),
    Case(T=1, B=4, I=7, H=13, D=2, layout="packed"),
    Case(T=40, B=3, I=130, H=65, layout="batch-first", nonlinearity="relu"),
]


# Few, for Triton's interpreter.
FEWER = [
    Case(T=3, B=2, H=5, layout=layout, L=L, D=D, nonlinearity=nonlinearity, dtype=dtype,
         bias=bias, hx=hx)
    for layout, (L, D), nonlinearity, dtype, (bias, hx) in [
        ("time-major", (1, 1), "tanh", torch.float32, (True, True)),
        ("batch-first", (2, 1), "tanh", torch.float32, (True, False)),
        ("unbatched", (1, 2), "tanh", torch.float32, (True, True)),
        ("packed", (1, 2), "relu", torch.float32, (False, False)),
        ("unsorted", (2, 2), "tanh", torch.float32, (True, True)),
        ("unsorted", (1, 1), "tanh", torch.bfloat16, (True, True)),
        ("time-major", (1, 2), "tanh", torch.float16, (True, False)),
    ]
]  # fmt: skip


@pytest.mark.feature("tanh and relu, bias or none, layers, both directions, dropout")
@pytest.mark.feature("padded, batch_first, unbatched, `PackedSequence`, `hx`")
@pytest.mark.feature("float32, bfloat16, float16")
@implementations("case", nn=FEWER, torch=EVERY_OPTION + EVERY_DTYPE + SIZES, triton=FEWER)
def test_results_are_as_accurate_as_torch(case, implementation):
    case = implementation.of(case)
    kinks = case.nonlinearity == "relu" and case.dtype in (torch.bfloat16, torch.float16)
    # The error of what has a few elements, as hx and the biases of one sequence, is luck in one.
    count = 5 if kinks else 3 if case.layout == "unbatched" else 1
    draws = [replace(case, seed=seed) for seed in range(count)]
    assert_accurate_over(draws, module_class=implementation.rnn)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get
)
def test_inputs_of_these_tests_saturate(dtype):
    case = Case(dtype=dtype)
    output, _ = case.module()(*case.tensors())
    assert (output.abs() > 0.98).float().mean() > 0.05
    assert (output.abs() < 0.5).float().mean() > 0.05


@pytest.mark.parametrize("scale", [30.0, 1e-4], ids=["saturated", "linear"])
@pytest.mark.parametrize("layout", ["time-major", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPE_NAMES.get)
def test_extreme_inputs_are_as_accurate_as_torch(scale, layout, dtype):
    case = Case(T=20, layout=layout, dtype=dtype, H=33, bias=scale > 1, hx=scale > 1)
    assert_accurate_over([case], scale)


@pytest.mark.feature("float64, complex numbers", triton="yes, on torch")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.complex128], ids=DTYPE_NAMES.get
)
@implementations("layout", nn=["time-major"], torch=LAYOUTS, triton=["unsorted"])
def test_float64_and_complex_numbers_agree_with_torch(layout, dtype, implementation):
    case = Case(layout=layout, L=2, D=2)
    theirs = nn.RNN(case.I, case.H, **case.options, dtype=dtype)
    ours = implementation.rnn(case.I, case.H, **case.options, dtype=dtype)
    # Small, for tanh has poles in the complex plane.
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(0.3)
    ours.load_state_dict(theirs.state_dict())
    data, hx = (
        (0.3 * torch.randn_like(x, dtype=dtype)).detach().requires_grad_() for x in case.tensors()
    )
    case = replace(case, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.complex64 else 1e-11
    assert_same_results(
        run(case, ours, data, hx), run(case, theirs, data, hx), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_the_type_of_the_input(layout):
    """A packed output has the same index tensors as its input."""
    case = Case(layout=layout, D=2)
    theirs, ours = pair(case)
    data, hx = case.tensors()
    input = case.input(data)
    expected, expected_h_n = theirs(input, hx)
    output, h_n = ours(input, hx)
    assert type(output) is type(expected)
    if case.is_packed:
        assert output.batch_sizes is input.batch_sizes
        assert output.sorted_indices is input.sorted_indices
        assert output.unsorted_indices is input.unsorted_indices
    assert plain(output).shape == plain(expected).shape
    assert h_n.shape == expected_h_n.shape


def test_unsorted_packed_takes_and_returns_states_in_the_callers_order():
    case = Case(layout="unsorted", dtype=torch.float64, L=2, D=2)
    theirs, ours = pair(case)
    data, hx = case.tensors()
    _, h_n = ours(case.input(data), hx)
    alone = Case(T=case.T, layout="unbatched", dtype=torch.float64, L=2, D=2)
    for b, rows in enumerate(case.rows):
        _, expected = alone.written_out(theirs.parameters(), data[rows], hx[:, b])
        torch.testing.assert_close(h_n[:, b], expected)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_unbatched_input_ignores_batch_first(batch_first):
    case = Case(layout="unbatched", dtype=torch.float64, L=2, D=2)
    theirs, ours = pair(case)
    theirs.batch_first = ours.batch_first = batch_first
    data, hx = case.tensors()
    assert_same_results(run(case, ours, data, hx), run(case, theirs, data, hx))


@pytest.mark.parametrize("D", [1, 2], ids="D{}".format)
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (4, 1, 1), (1, 3)], ids=str)
def test_sequences_of_one_token_work(lengths, D):
    case = Case(dtype=torch.float64, D=D, L=2)
    theirs, ours = pair(case)
    sequences = [torch.randn(length, case.I, dtype=torch.float64) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted=False)
    output, h_n = ours(packed)
    expected, expected_h_n = theirs(packed)
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(h_n, expected_h_n)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "unbatched"])
@pytest.mark.parametrize("D", [1, 2], ids="D{}".format)
def test_nan_in_one_sequence_stays_there(layout, D):
    case = Case(layout=layout, D=D, L=2)
    _, ours = pair(case)
    data, hx = case.tensors()
    rows = case.rows
    poisoned = data.detach().clone()
    poisoned.view(-1, case.I)[rows[1][0]] = float("nan")
    clean, clean_h_n = ours(case.input(data), hx)
    output, h_n = ours(case.input(poisoned), hx)
    assert h_n[:, 1].isnan().any()
    for b in (0, *range(2, case.B)):
        assert torch.equal(h_n[:, b], clean_h_n[:, b])
        got, expected = (plain(y).reshape(-1, D * case.H)[rows[b]] for y in (output, clean))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["time-major", "batch-first"])
@pytest.mark.parametrize(("L", "D"), [(1, 1), (2, 2)], ids=str)
def test_empty_batch_has_zero_gradients(layout, L, D):
    assert_zero_gradients(Case(B=0, layout=layout, L=L, D=D))


@pytest.mark.parametrize("what", ["transposed", "expanded", "strided", "flipped-hx", "weights"])
@pytest.mark.parametrize("layout", ["time-major", "batch-first", "packed"])
def test_memory_order_does_not_matter(what, layout):
    case = Case(layout=layout, L=2, D=2, dtype=torch.float64)
    theirs, ours = pair(case)
    data, hx = (x.detach() for x in case.tensors())
    if what == "transposed":
        data = data.mT.contiguous().mT
    elif what == "expanded":
        data = data[..., :1].expand_as(data)
    elif what == "strided":
        data = data.repeat_interleave(2, dim=-1)[..., ::2]
    elif what == "flipped-hx":
        hx = hx.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    elif what == "weights":
        for module in (theirs, ours):
            for name, weight in list(module.named_parameters()):
                if weight.dim() == 2:
                    setattr(module, name, nn.Parameter(weight.detach().T.contiguous().T))
    assert not all(x.is_contiguous() for x in (data, hx, *ours.parameters()))
    data.requires_grad_()
    hx.requires_grad_()
    assert_same_results(run(case, ours, data, hx), run(case, theirs, data, hx))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("H", [4, 60, 300])
@pytest.mark.parametrize("layout", ["time-major", "batch-first", "packed"])
def test_steps_of_every_size_agree(H, layout, threads):
    case = Case(T=5, B=20, I=3, H=H, D=2, layout=layout, dtype=torch.float64)
    theirs, ours = pair(case)
    assert_same_results(run(case, ours, *case.tensors()), run(case, theirs, *case.tensors()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["output", "h_n"])
def test_one_result_alone_can_be_differentiated(which, layout):
    case = Case(layout=layout, L=2, D=2, dtype=torch.float64)
    data, hx = case.tensors()
    gradients = []
    for module in pair(case):
        output, h_n = module(case.input(data), hx)
        # The gradient of a sum is expanded: all its strides are 0.
        chosen = plain(output) if which == "output" else h_n
        gradients.append(torch.autograd.grad(chosen.sum(), [data, hx, *module.parameters()]))
    theirs, ours = gradients
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_cotangents_does_not_matter_and_is_left_as_it_is(layout):
    assert_cotangents_of_any_memory(Case(layout=layout, D=2, dtype=torch.float64))


@pytest.mark.feature("backward in eval mode", nn_on_gpu="no")
@pytest.mark.parametrize("layout", LAYOUTS)
@here_and_on_gpu
def test_backward_works_in_eval_mode(layout, where, implementation):
    # On a GPU float32 may round to TF32, which a CPU does not know.
    dtype = torch.bfloat16 if implementation.device == "cuda" else torch.float64
    case = implementation.of(Case(layout=layout, L=2, D=2, dropout=0.5, dtype=dtype))
    got = run(case, case.module(implementation.rnn).eval(), *case.tensors())
    assert_as_accurate_as_on_cpu(case, got)


def test_backward_twice_through_one_graph_agrees():
    case = Case(D=2, L=2)
    _, ours = pair(case)
    data, hx = case.tensors()
    output, h_n = ours(data, hx)
    leaves = [data, hx, *ours.parameters()]
    loss = (output * output).sum() + h_n.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_agrees_with_torch(layout, context):
    case = Case(layout=layout, L=2, D=2, dtype=torch.float64)
    theirs, ours = pair(case)
    data, hx = case.tensors()
    with context():
        output, h_n = ours(case.input(data), hx)
        expected, expected_h_n = theirs(case.input(data), hx)
        torch.testing.assert_close(plain(output), plain(expected))
        torch.testing.assert_close(h_n, expected_h_n)
    assert not plain(output).requires_grad
    assert not h_n.requires_grad
