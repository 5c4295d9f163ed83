"""tritonrnn.RNN does what torch.nn.RNN does: values, gradients, errors, transforms."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import LAYOUTS, Case, exact, plain, run
from reference import assert_as_accurate
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import tritonrnn

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # torch's own rules for forward AD are scripted at their first use.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

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


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """torch.nn.RNN and ours, with the same weights, saturating here and there."""
    theirs = case.module(nn.RNN)
    ours = case.module(tritonrnn.RNN)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_results(got: dict, expected: dict, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


class RecordedCalls(TorchDispatchMode):
    """Names of the operators called, and the storages their results brought with them."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(
                    storage._cdata, (StorageWeakRef(storage), storage.nbytes())
                )
        return results

    def bytes_alive(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())


# Values and gradients.


def assert_accurate_over(cases: list[Case], scale: float = 4.0) -> None:
    expected, truth, got = [], [], []
    for case in cases:
        theirs, ours = pair(case)
        data, hx = case.tensors(scale)
        expected.append(run(case, theirs, data, hx))
        truth.append(exact(case, theirs, data, hx))
        got.append(run(case, ours, data, hx))
        assert got[-1].keys() == expected[-1].keys()
    for name in expected[0]:
        assert_as_accurate(
            *([draw[name] for draw in draws] for draws in (got, expected, truth)), name
        )


@pytest.mark.parametrize("case", EVERY_OPTION + EVERY_DTYPE + SIZES, ids=str)
def test_results_are_as_accurate_as_torch(case):
    kinks = case.nonlinearity == "relu" and case.dtype in (torch.bfloat16, torch.float16)
    assert_accurate_over([replace(case, seed=seed) for seed in range(5 if kinks else 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_these_tests_saturate(dtype):
    case = Case(dtype=dtype)
    output, _ = case.module()(*case.tensors())
    assert (output.abs() > 0.98).float().mean() > 0.05
    assert (output.abs() < 0.5).float().mean() > 0.05


@pytest.mark.parametrize("scale", [30.0, 1e-4], ids=["saturated", "linear"])
@pytest.mark.parametrize("layout", ["time-major", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_inputs_are_as_accurate_as_torch(scale, layout, dtype):
    case = Case(T=20, layout=layout, dtype=dtype, H=33, bias=scale > 1, hx=scale > 1)
    assert_accurate_over([case], scale)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_complex_numbers_agree_with_torch(layout, dtype):
    case = Case(layout=layout, L=2, D=2)
    theirs = nn.RNN(case.I, case.H, **case.options, dtype=dtype)
    ours = tritonrnn.RNN(case.I, case.H, **case.options, dtype=dtype)
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
def test_output_is_what_the_caller_handed_in(layout):
    """A packed output carries the same index objects, a tensor's is contiguous as torch's is."""
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
def test_no_tokens_leak_between_sequences(layout, D):
    """A NaN in one sequence stays there."""
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
    case = Case(B=0, layout=layout, L=L, D=D)
    theirs, ours = pair(case)
    data, hx = case.tensors()
    got, expected = run(case, ours, data, hx), run(case, theirs, data, hx)
    assert_same_results(got, expected)
    output, h_n = ours(data)
    (output.sum() + h_n.sum()).backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


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
def test_backward_works_in_eval_mode(layout):
    case = Case(layout=layout, L=2, D=2, dropout=0.5, dtype=torch.float64)
    theirs, ours = (module.eval() for module in pair(case))
    data, hx = case.tensors()
    assert_same_results(run(case, ours, data, hx), run(case, theirs, data, hx))


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


# Gradients: whose they are, and where they live.


@pytest.mark.parametrize(
    "trained",
    [
        ["input"],
        ["hx"],
        ["weight_hh_l0"],
        ["bias_hh_l0"],
        ["weight_ih_l1"],
        ["bias_ih_l1_reverse", "weight_hh_l0_reverse"],
        [],
    ],
    ids=lambda names: "+".join(names) or "nothing",
)
@pytest.mark.parametrize("layout", ["time-major", "unsorted"])
def test_only_what_is_trained_gets_a_gradient(trained, layout):
    case = Case(layout=layout, L=2, D=2, dtype=torch.float64)
    outcomes = []
    for module in pair(case):
        data, hx = case.tensors()
        leaves = {"input": data, "hx": hx, **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in trained)
        output, h_n = module(case.input(data), hx)
        assert plain(output).requires_grad == h_n.requires_grad == bool(trained)
        if trained:
            c_output, c_h_n = case.cotangents(plain(output), h_n)
            ((plain(output) * c_output).sum() + (h_n * c_h_n).sum()).backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(trained)
        outcomes.append({name: leaves[name].grad for name in trained})
    assert_same_results(outcomes[1], outcomes[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "L", "D"), [(7, 1, 1), (7, 2, 2), (1, 1, 2)], ids=str)
def test_no_two_gradients_share_storage(layout, T, L, D):
    case = Case(T=T, layout=layout, L=L, D=D)
    _, ours = pair(case)
    data, hx = case.tensors()
    output, h_n = ours(case.input(data), hx)
    cotangents = case.cotangents(plain(output), h_n)
    leaves = {"input": data, "hx": hx, **dict(ours.named_parameters())}
    handed_in = {"cotangent of output": cotangents[0], "cotangent of h_n": cotangents[1], **leaves}
    gradients = torch.autograd.grad(
        (plain(output), h_n), leaves.values(), cotangents, retain_graph=True
    )
    owners = {x.untyped_storage().data_ptr(): name for name, x in handed_in.items()}
    owners[plain(output).untyped_storage().data_ptr()] = "output"
    for name, gradient in zip(leaves, gradients):
        owner = owners.setdefault(gradient.untyped_storage().data_ptr(), f"gradient of {name}")
        assert owner == f"gradient of {name}"
    torch.autograd.backward((plain(output), h_n), cotangents)
    assert len({x.grad.untyped_storage().data_ptr() for x in leaves.values()}) == len(leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_share_no_storage(layout):
    """Changing h_n in place leaves output alone, and both leave the input alone."""
    case = Case(layout=layout, L=2, D=2)
    _, ours = pair(case)
    data, hx = case.tensors()
    with torch.no_grad():
        output, h_n = ours(case.input(data), hx)
    pointers = {x.untyped_storage().data_ptr() for x in (plain(output), h_n, data, hx)}
    assert len(pointers) == 4


@pytest.mark.parametrize("layout", ["time-major", "batch-first", "packed"])
def test_h_n_may_be_changed_in_place(layout):
    case = Case(layout=layout, dtype=torch.float64)
    data, hx = case.tensors()
    gradients = []
    for module in pair(case):
        output, h_n = module(case.input(data), hx)
        h_n.mul_(3)
        loss = plain(output).square().sum() + h_n.square().sum()
        gradients.append(torch.autograd.grad(loss, [data, hx]))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("layout", ["time-major", "batch-first", "packed"])
def test_output_changed_in_place_never_gives_wrong_gradients(layout):
    """Refusing in backward is right as well, as cuDNN does: what backward needs is gone."""
    case = Case(layout=layout, dtype=torch.float64)
    data, hx = case.tensors()
    gradients = []
    for module in pair(case):
        output, h_n = module(case.input(data), hx)
        plain(output).mul_(3)
        loss = plain(output).square().sum() + h_n.square().sum()
        with contextlib.suppress(RuntimeError):
            gradients.append(torch.autograd.grad(loss, [data, hx]))
    assert gradients
    if len(gradients) == 2:
        torch.testing.assert_close(gradients[1], gradients[0])


def tensors_saved(case: Case) -> int:
    """Bytes saved for backward outside the parameters, and counted once."""
    _, ours = pair(case)
    data, hx = case.tensors()
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = ours(case.input(data), hx)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    assert results
    return sum(nbytes for pointer, (nbytes, _) in saved.items() if pointer not in parameters)


def tensors_alive(case: Case) -> int:
    """Bytes made by a forward and alive after it, the two results included."""
    _, ours = pair(case)
    data, hx = case.tensors()
    input = case.input(data)
    # What a layout derives once may stay on the input it was derived from.
    ours(input, hx)
    with RecordedCalls() as calls:
        results = ours(input, hx)
    assert results
    return calls.bytes_alive() + data.nbytes


@pytest.mark.parametrize("measure", [tensors_saved, tensors_alive], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(("L", "D"), [(1, 1), (1, 2), (3, 1), (2, 2)], ids=str)
def test_backward_keeps_input_and_output_of_each_layer_only(layout, nonlinearity, L, D, measure):
    case = Case(T=24, B=1 if layout == "unbatched" else 6, H=16, layout=layout, L=L, D=D)
    case = replace(case, nonlinearity=nonlinearity)
    longer = replace(case, T=48)
    more_tokens = int(longer.lengths().sum() - case.lengths().sum())
    grown = measure(longer) - measure(case)
    # Row maps: a few int64 numbers a time step.
    row_maps = 4 * 8 * (longer.T - case.T)
    assert grown <= more_tokens * (case.I + L * D * case.H) * 4 + row_maps


# Random numbers.


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


# Autocast, devices, dtypes.


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


def gradients_of(case, module, data, hx, output, h_n):
    leaves = {"input": data, "hx": hx, **dict(module.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    cotangents = [c.to(y.dtype) for c, y in zip(case.cotangents(output, h_n), (output, h_n))]
    gradients = torch.autograd.grad((output, h_n), leaves.values(), cotangents)
    named = {f"grad of {name}": g for name, g in zip(leaves, gradients)}
    return {"output": output.detach(), "h_n": h_n.detach(), **named}


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


# Weights.


def swap(module):
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 0.5)


def tie(module):
    module.weight_hh_l1 = module.weight_hh_l0
    module.bias_hh_l0 = module.bias_ih_l0


def weight_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(0.5)


def spectral_norm(module):
    torch.manual_seed(5)
    parametrizations.spectral_norm(module, "weight_hh_l1_reverse")
    # In training each look at the weight changes it, and nobody promises how often forward looks.
    module.eval()


def prune_half(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def reset_data(module):
    module.weight_ih_l0.data = module.weight_ih_l0.data.clone() * 2


def delete_and_set(module):
    """A weight that is no Parameter, as DropConnect has it."""
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.raw_weight = raw
    module.weight_hh_l0 = raw * 0.9


CHANGES = [swap, tie, weight_norm, spectral_norm, prune_half, reset_data, delete_and_set]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_the_ones_used(change):
    case = Case(L=2, D=2, dtype=torch.float64)
    data, hx = case.tensors()
    results = []
    for module in pair(case):
        before, _ = module(data, hx)
        change(module)
        output, h_n = module(data, hx)
        assert not torch.equal(before, output)
        results.append(gradients_of(case, module, data, hx, output, h_n))
    assert_same_results(results[1], results[0])


def test_functional_call_uses_and_differentiates_the_weights_given():
    case = Case(L=2, D=2, layout="unsorted", dtype=torch.float64)
    data, hx = case.tensors()
    theirs, ours = pair(case)
    other = {n: (p * 0.7).detach().requires_grad_() for n, p in theirs.named_parameters()}
    gradients = []
    for module in (theirs, ours):
        output, h_n = torch.func.functional_call(module, other, (case.input(data), hx))
        loss = output.data.square().sum() + h_n.sum()
        gradients.append(torch.autograd.grad(loss, other.values()))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_weights_stepped_by_an_optimizer_are_the_ones_used():
    case = Case(L=2, dropout=0.0, dtype=torch.float64)
    data, hx = case.tensors()
    curves = []
    for module in pair(case):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            output, h_n = module(data, hx)
            loss = output.square().mean() + h_n.mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)
    assert curves[0][-1] < curves[0][0]


def test_weight_changed_between_forward_and_backward_raises():
    _, ours = pair(Case())
    data, hx = Case().tensors()
    output, _ = ours(data, hx)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Transforms of autograd.


TRANSFORMED = [
    Case(
        T=3, B=3, I=2, H=2, L=L, D=D, layout=layout, nonlinearity=nonlinearity, dtype=torch.float64
    )
    for layout, (L, D), nonlinearity in [
        ("time-major", (1, 1), "tanh"),
        ("time-major", (2, 2), "tanh"),
        ("batch-first", (1, 2), "tanh"),
        ("unbatched", (2, 1), "relu"),
        ("packed", (1, 1), "tanh"),
        ("unsorted", (2, 2), "tanh"),
    ]
]
transformed = pytest.mark.parametrize("case", TRANSFORMED, ids=str)


def as_function(case: Case, module: nn.Module):
    """(data, hx, *weights) -> (output, h_n)."""
    names = [name for name, _ in module.named_parameters()]
    data, hx = case.tensors(0.7)
    packed = case.input(data)

    def function(data, hx, *weights):
        input = packed._replace(data=data) if case.is_packed else data
        parameters = dict(zip(names, weights))
        output, h_n = torch.func.functional_call(module, parameters, (input, hx))
        return plain(output), h_n

    weights = [weight.detach().clone().requires_grad_() for weight in module.parameters()]
    return function, (data, hx, *weights)


@transformed
def test_gradcheck_passes_backward_and_forward(case):
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    assert gradcheck(function, arguments, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("case", TRANSFORMED[:1] + TRANSFORMED[4:5], ids=str)
def test_gradcheck_passes_element_by_element(case):
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    assert gradcheck(function, arguments)


@transformed
def test_gradgradcheck_passes(case):
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    assert gradgradcheck(function, arguments, fast_mode=True)


@transformed
def test_double_backward_agrees_with_torch(case):
    """A gradient penalty, as a Wasserstein critic has it."""
    outcomes = []
    for module in pair(case):
        data, hx = case.tensors()
        output, h_n = module(case.input(data), hx)
        loss = plain(output).square().sum() + h_n.sum()
        gradients = torch.autograd.grad(loss, [data, hx], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        leaves = [data, hx, *module.parameters()]
        # relu has no second derivative in its biases: torch says None or zero.
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        outcomes.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, second)])
    torch.testing.assert_close(outcomes[1], outcomes[0])


def scalar(function):
    def loss(*arguments):
        output, h_n = function(*arguments)
        return (output * output.detach().cos()).sum() + h_n.pow(3).sum()

    return loss


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(scalar(f))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(scalar(f))(x),
    "jacobian": torch.autograd.functional.jacobian,
    "jacobian-vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "jacobian-forward": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "jvp-of-two-vjps": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos()),
    "hvp": lambda f, x: torch.autograd.functional.hvp(scalar(f), x, x.cos()),
    "double-vjp": lambda f, x: torch.autograd.functional.hessian(scalar(f), x),
}


@transformed
@pytest.mark.parametrize("argument", [0, 1, 3], ids=["input", "hx", "weight_hh"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_agree_with_the_recurrence_written_out(case, argument, transform):
    """Written out, for torch.nn.RNN takes no packed input under torch.func."""
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    arguments = [x.detach() for x in arguments]
    # Found before the transform: reading lengths within one is not the subject here.
    assert case.rows

    def ours(x):
        return function(*arguments[:argument], x, *arguments[argument + 1 :])

    def written_out(x):
        data, hx, *weights = [*arguments[:argument], x, *arguments[argument + 1 :]]
        return case.written_out(weights, data, hx)

    expected = TRANSFORMS[transform](written_out, arguments[argument])
    assert any(x.any() for x in tree_leaves(expected))
    torch.testing.assert_close(TRANSFORMS[transform](ours, arguments[argument]), expected)


@transformed
@pytest.mark.parametrize("leaf", ["input", "hx", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_forward_ad_never_gives_a_silent_zero_tangent(case, leaf):
    tangents = []
    for module in pair(case):
        data, hx = (x.detach() for x in case.tensors())
        with forward_ad.dual_level():
            parameters = {n: p.detach() for n, p in module.named_parameters()}
            leaves = {"input": data, "hx": hx, **parameters}
            tangent = torch.linspace(-1, 1, leaves[leaf].numel(), dtype=torch.float64)
            leaves[leaf] = forward_ad.make_dual(leaves[leaf], tangent.view(leaves[leaf].shape))
            output, h_n = torch.func.functional_call(
                module,
                {name: leaves[name] for name in parameters},
                (case.input(leaves["input"]), leaves["hx"]),
            )
            tangents.append([forward_ad.unpack_dual(y).tangent for y in (plain(output), h_n)])
    for expected, got in zip(*tangents):
        assert expected.any()
        assert got is not None
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["recomputed", "reentrant"])
@pytest.mark.parametrize("layout", ["time-major", "packed"])
def test_checkpointing_agrees_and_repeats_dropout(layout, use_reentrant):
    case = Case(layout=layout, L=2, dropout=0.4, dtype=torch.float64)
    _, ours = pair(case)
    data, hx = case.tensors()

    def function(data, hx):
        output, h_n = ours(case.input(data), hx)
        return plain(output), h_n

    results = []
    for call in (function, lambda *a: checkpoint(function, *a, use_reentrant=use_reentrant)):
        ours.zero_grad()
        data.grad = None
        torch.manual_seed(3)
        output, h_n = call(data, hx)
        (output.square().sum() + h_n.sum()).backward()
        results.append([data.grad, *(parameter.grad for parameter in ours.parameters())])
    torch.testing.assert_close(results[1], results[0])


# Errors: torch's type and wording, before any work.


def packed_rows(rows: int, batch_sizes: list[int], width: int = 3) -> PackedSequence:
    return PackedSequence(torch.ones(rows, width), torch.tensor(batch_sizes))


BAD_CALLS = {
    "1-D input": lambda: (torch.ones(3),),
    "4-D input": lambda: (torch.ones(1, 4, 2, 3),),
    "input size": lambda: (torch.ones(4, 2, 4),),
    "input size, unbatched": lambda: (torch.ones(4, 2),),
    "input size, packed": lambda: (packed_rows(3, [2, 1], width=4),),
    "input dtype float64": lambda: (torch.ones(4, 2, 3).double(),),
    "input dtype int64": lambda: (torch.ones(4, 2, 3).long(),),
    "input dtype, packed": lambda: (packed_rows(3, [2, 1])._replace(data=torch.ones(3, 3).half()),),
    "input device": lambda: (torch.ones(4, 2, 3, device="meta"),),
    "3-D packed data": lambda: (PackedSequence(torch.ones(2, 1, 3), torch.tensor([1, 1])),),
    "T = 0": lambda: (torch.ones(0, 2, 3),),
    "T = 0, unbatched": lambda: (torch.ones(0, 3),),
    "T = 0 and B = 0": lambda: (torch.ones(0, 0, 3),),
    "hx layers": lambda: (torch.ones(4, 2, 3), torch.ones(1, 2, 5)),
    "hx batch": lambda: (torch.ones(4, 2, 3), torch.ones(4, 3, 5)),
    "hx batch of 1": lambda: (torch.ones(4, 2, 3), torch.ones(4, 1, 5)),
    "hx size": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 6)),
    "1-D hx": lambda: (torch.ones(4, 2, 3), torch.ones(5)),
    "2-D hx of a batch": lambda: (torch.ones(4, 2, 3), torch.ones(4, 5)),
    "4-D hx": lambda: (torch.ones(4, 2, 3), torch.ones(1, 4, 2, 5)),
    "3-D hx of no batch": lambda: (torch.ones(4, 3), torch.ones(4, 1, 5)),
    "hx size of no batch": lambda: (torch.ones(4, 3), torch.ones(4, 6)),
    "hx device": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 5, device="meta")),
    "hx batch, packed": lambda: (packed_rows(3, [2, 1]), torch.ones(4, 3, 5)),
    "2-D hx, packed": lambda: (packed_rows(3, [2, 1]), torch.ones(4, 5)),
    "no input": lambda: (),
    "None": lambda: (None,),
    "a list": lambda: ([1.0, 2.0],),
}
# Where torch raises from the middle of its work, in words of the operator that tripped.
TYPE_ONLY = {
    "hx dtype": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 5).double()),
    "hx dtype int64": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 5).long()),
    "hx dtype, packed": lambda: (packed_rows(3, [2, 1]), torch.ones(4, 2, 5).double()),
    "hx batch of 1, unsorted": lambda: (unsorted(), torch.ones(4, 1, 5)),
}


def unsorted() -> PackedSequence:
    return pack_sequence([torch.ones(1, 3), torch.ones(2, 3)], enforce_sorted=False)


def raised(function, *arguments, **options) -> Exception:
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_torchs_own(call, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    arguments = BAD_CALLS[call]()
    if batch_first and call == "T = 0":
        arguments = (arguments[0].transpose(0, 1),)
    ours = tritonrnn.RNN(3, 5, **options)
    expected = raised(nn.RNN(3, 5, **options), *arguments)
    message = str(expected).replace("RNN.forward()", f"{type(ours).__name__}.forward()")
    with pytest.raises(type(expected), match=f"^{re.escape(message)}$"):
        ours(*arguments)


@pytest.mark.parametrize("call", TYPE_ONLY)
def test_errors_from_the_middle_of_torch_keep_their_type(call):
    options = {"num_layers": 2, "bidirectional": True}
    arguments = TYPE_ONLY[call]()
    expected = raised(nn.RNN(3, 5, **options), *arguments)
    with pytest.raises(type(expected)):
        tritonrnn.RNN(3, 5, **options)(*arguments)


SILENT_FAULTS = {
    "more rows than batch_sizes": (lambda: (packed_rows(7, [2, 2, 1]),), "7.*5|5.*7"),
    "a last step of no rows": (lambda: (packed_rows(4, [2, 2, 0]),), "batch_sizes"),
    "more states than sequences": (lambda: (unsorted(), torch.ones(4, 3, 5)), "hidden size|hx"),
    "more states than sequences, H": (lambda: (unsorted(), torch.ones(4, 9, 5)), "hidden size|hx"),
}


@pytest.mark.parametrize("fault", SILENT_FAULTS)
def test_silent_faults_of_torch_raise(fault):
    arguments, match = SILENT_FAULTS[fault]
    options = {"num_layers": 2, "bidirectional": True}
    nn.RNN(3, 5, **options)(*arguments())
    with pytest.raises((RuntimeError, ValueError), match=match):
        tritonrnn.RNN(3, 5, **options)(*arguments())


@pytest.mark.parametrize(
    ("rows", "batch_sizes"), [(4, [2, 2, 1]), (5, [2, 3]), (0, []), (3, [2, -1, 2])], ids=str
)
def test_impossible_packed_sequences_raise(rows, batch_sizes):
    packed = PackedSequence(torch.ones(rows, 3), torch.tensor(batch_sizes, dtype=torch.int64))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        tritonrnn.RNN(3, 5)(packed)


@pytest.mark.parametrize("call", [*BAD_CALLS, *TYPE_ONLY, *SILENT_FAULTS])
def test_errors_come_before_any_work(call):
    """Whatever is called before the error only looks: it makes no tensor, single numbers aside."""
    module = tritonrnn.RNN(3, 5, num_layers=2, bidirectional=True)
    faults = {name: arguments for name, (arguments, _) in SILENT_FAULTS.items()}
    arguments = {**BAD_CALLS, **TYPE_ONLY, **faults}[call]()
    known = [*module.parameters()]
    known += [x for argument in arguments if argument is not None for x in leaves_of(argument)]
    known = {x.untyped_storage()._cdata for x in known if isinstance(x, torch.Tensor)}
    with RecordedCalls() as calls:
        raised(module, *arguments)
    made = [key for key, (_, nbytes) in calls.storages.items() if key not in known and nbytes > 8]
    assert not made, calls.names


def leaves_of(argument):
    return argument if isinstance(argument, (PackedSequence, list)) else [argument]


# The same through the kernels: on a machine without a GPU in Triton's interpreter, hence few.


ON_TRITON = [
    Case(T=3, B=2, H=5, dtype=dtype, nonlinearity=nonlinearity, layout=layout, L=L, D=D, hx=hx)
    for layout, (L, D), nonlinearity, dtype, hx in [
        ("time-major", (1, 1), "tanh", torch.float32, True),
        ("batch-first", (2, 1), "tanh", torch.float32, False),
        ("unbatched", (1, 2), "tanh", torch.float32, True),
        ("packed", (1, 2), "relu", torch.float32, False),
        ("unsorted", (2, 2), "tanh", torch.float32, True),
        ("unsorted", (1, 1), "tanh", torch.bfloat16, True),
        ("time-major", (1, 2), "tanh", torch.float16, False),
    ]
]
on_triton = pytest.mark.parametrize("case", ON_TRITON, ids=str)


@pytest.fixture
def triton_back_end(torch_back_end):
    with tritonrnn.backend("triton"):
        yield


@on_triton
@pytest.mark.usefixtures("triton_back_end")
def test_kernels_are_as_accurate_as_torch(case):
    data, hx = case.tensors()
    assert tritonrnn.explain(case.module(tritonrnn.RNN), case.input(data), hx).backend == "triton"
    assert_accurate_over([case])


@pytest.mark.usefixtures("triton_back_end")
def test_kernels_share_no_storage_between_gradients():
    case = ON_TRITON[2]
    test_no_two_gradients_share_storage(case.layout, T=2, L=1, D=2)


@pytest.mark.usefixtures("triton_back_end")
def test_kernels_give_an_empty_batch_zero_gradients():
    test_empty_batch_has_zero_gradients("time-major", L=1, D=2)


@pytest.mark.usefixtures("triton_back_end")
def test_double_backward_through_a_kernel_agrees_with_torch():
    case = replace(ON_TRITON[0], T=2)
    outcomes = []
    for module in pair(case):
        data, hx = case.tensors(1.0)
        output, h_n = module(data, hx)
        loss = output.square().sum() + h_n.sum()
        gradients = torch.autograd.grad(loss, [data, hx], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        outcomes.append(torch.autograd.grad(penalty, [data, hx, *module.parameters()]))
    torch.testing.assert_close(outcomes[1], outcomes[0])


@pytest.mark.usefixtures("triton_back_end")
def test_forced_kernels_refuse_forward_ad_rather_than_drop_a_tangent():
    case = ON_TRITON[0]
    module = case.module(tritonrnn.RNN)
    data, hx = (x.detach() for x in case.tensors())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        module(forward_ad.make_dual(data, torch.ones_like(data)), hx)


# Threads.


@pytest.mark.parametrize("layout", ["time-major", "packed"])
def test_number_of_threads_is_left_as_it_was(layout):
    case = Case(layout=layout, H=8)
    _, ours = pair(case)
    data, hx = case.tensors()
    torch.set_num_threads(2)
    try:
        output, h_n = ours(case.input(data), hx)
        assert torch.get_num_threads() == 2
        (plain(output).sum() + h_n.sum()).backward()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_calls_from_several_threads_agree():
    case = Case(T=40, H=16, D=2, dtype=torch.float64)
    _, ours = pair(case)
    data, hx = case.tensors()
    expected = run(case, ours, data, hx)

    def again(_):
        return run(case, ours, data, hx)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(again, range(12)):
            assert_same_results(got, expected)
    assert torch.get_num_threads() == 1
