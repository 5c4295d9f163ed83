"""Gradients: what has one, where it is stored, and what is saved to compute it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence

import tritonrnn
from tests.support.cases import (
    LAYOUTS,
    Case,
    RecordedCalls,
    assert_no_shared_storage,
    assert_same_results,
    pair,
    plain,
)
from tests.support.implementations import implementations

pytestmark = pytest.mark.usefixtures("torch_back_end")


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
def test_only_trained_leaves_have_a_gradient(trained, layout):
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
@pytest.mark.parametrize(
    ("T", "L", "D"),
    [(7, 1, 1), (7, 2, 2), (1, 1, 2)],
    ids=["T7-L1-D1", "T7-L2-D2", "T1-L1-D2"],
)
def test_no_two_gradients_share_storage(layout, T, L, D):
    assert_no_shared_storage(Case(T=T, layout=layout, L=L, D=D))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_share_no_storage(layout):
    """``output``, ``h_n``, ``input`` and ``hx`` are four storages."""
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
def test_output_changed_in_place_has_no_wrong_gradient(layout):
    """Backward may raise, as cuDNN's does: what it needs was overwritten."""
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


def tensors_saved(case: Case, module_class: type[torch.nn.Module]) -> int:
    """Return the bytes saved for backward, each storage once and no parameter."""
    ours = case.module(module_class)
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


def tensors_alive(case: Case, module_class: type[torch.nn.Module]) -> int:
    """Return the bytes that a forward pass allocates and keeps, its results included."""
    ours = case.module(module_class)
    data, hx = case.tensors()
    input = case.input(data)
    # What is derived once from an input may be cached with it.
    ours(input, hx)
    with RecordedCalls() as calls:
        results = ours(input, hx)
    assert results
    return calls.bytes_alive() + data.nbytes


KEPT = [
    Case(B=1 if layout == "unbatched" else 6, H=16, layout=layout, L=L, D=D, nonlinearity=phi)
    for layout, phi, (L, D) in product(LAYOUTS, ("tanh", "relu"), [(1, 1), (1, 2), (3, 1), (2, 2)])
]


@pytest.mark.feature("training keeps no more than each layer's input and output", nn="no")
@pytest.mark.parametrize("measure", [tensors_saved, tensors_alive], ids=lambda f: f.__name__)
@implementations("case", nn=KEPT[3:4], torch=KEPT, triton=[replace(KEPT[3], D=1, H=5)])
def test_backward_keeps_input_and_output_of_each_layer_only(case, measure, implementation):
    case, longer = (implementation.of(replace(case, T=T)) for T in (6, 12))
    more_tokens = int(longer.lengths().sum() - case.lengths().sum())
    grown = measure(longer, implementation.rnn) - measure(case, implementation.rnn)
    # Row maps: a few int64 elements a time step.
    row_maps = 4 * 8 * (longer.T - case.T)
    assert grown <= more_tokens * (case.I + case.L * case.D * case.H) * 4 + row_maps


@pytest.mark.parametrize("measure", [tensors_saved, tensors_alive], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_call_keeps_no_more_than_torchs(measure, layout, fewest_steps):
    case = Case(T=fewest_steps[False, True] - 1, B=1 if layout == "unbatched" else 3, layout=layout)
    # But for a copy of a batch-first output, which torch leaves in the order of steps.
    is_copied = layout == "batch-first" and measure is tensors_alive
    copied = 4 * case.B * case.T * case.H if is_copied else 0
    assert measure(case, tritonrnn.RNN) <= measure(case, torch.nn.RNN) + copied


@pytest.mark.parametrize("lengths", [False, True], ids=["padded", "lengths"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("D", [1, 2])
def test_infinite_output_of_one_sequence_stays_out_of_the_next(batch_first, D, lengths):
    """The last output of the first sequence overflows; it is no step's previous state."""
    data = torch.ones(2, 3, 1)
    data[0, -1], data[1, 0] = torch.inf, torch.inf
    data = data if batch_first else data.transpose(0, 1)
    gradients = []
    for module_class in (torch.nn.RNN, tritonrnn.RNN):
        module = module_class(1, 1, 1, "relu", False, batch_first, bidirectional=D == 2)
        for name, parameter in module.named_parameters():
            torch.nn.init.constant_(parameter, float("ih" in name))
        input, given = data, {}
        if lengths and module_class is tritonrnn.RNN:
            # Padding behind each sequence.
            input = torch.cat([data, torch.full_like(data, torch.nan)], 1 if batch_first else 0)
            given["lengths"] = torch.tensor([3, 3])
        output, _ = module(input, **given)
        output[output.isfinite()].sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], equal_nan=True)


def test_batch_sizes_made_in_inference_mode_train():
    with torch.inference_mode():
        batch_sizes = torch.tensor([2, 1])
    module = tritonrnn.RNN(3, 5)
    module(PackedSequence(torch.ones(3, 3), batch_sizes))[0].data.sum().backward()
    assert module.weight_hh_l0.grad is not None


def test_batch_sizes_changed_through_numpy_are_read_again():
    batch_sizes = torch.tensor([2, 2])
    module = tritonrnn.RNN(3, 5)
    packed = PackedSequence(torch.ones(4, 3), batch_sizes)
    assert module(packed)[1].shape == (1, 2, 5)
    batch_sizes.numpy()[:] = (3, 1)
    assert module(packed)[1].shape == (1, 3, 5)
