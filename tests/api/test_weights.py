"""Weights that are swapped, tied, frozen, parametrised or pruned are the ones used."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tritonrnn
from tests.support.cases import Case, assert_same_results, pair, run, with_gradients

pytestmark = pytest.mark.usefixtures("torch_back_end")


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
    # In training each access of the weight changes it, and forward may access it any number of
    # times.
    module.eval()


def prune_half(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def reset_data(module):
    module.weight_ih_l0.data = module.weight_ih_l0.data.clone() * 2


def delete_and_set(module):
    """Make a weight no Parameter, as DropConnect does."""
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
        results.append(with_gradients(case, module, data, hx, output, h_n))
    assert_same_results(results[1], results[0])


def assign_list(module):
    module._flat_weights = [w * 0.5 if w.dim() == 2 else w for w in module._flat_weights]


def assign_item(module):
    module._flat_weights[1] = module._flat_weights[1] * 0.5


def assign_item_of_list(module):
    assign_list(module)
    weights = module._flat_weights
    weights[0] = weights[0] * 0.5
    weights[1] = weights[1] * 0.5


def assign_then_copy(module):
    """As in torch, a copy goes by its attributes."""
    module._flat_weights = [weight.detach() * 0.5 for weight in module._flat_weights]
    return copy.deepcopy(module)


def assign_list_and_weight(module):
    assign_list(module)
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 0.3)


def assign_then_forget(module):
    """As torch does when the weights go elsewhere."""
    assign_list(module)
    module.float().double()


ASSIGNMENTS = [
    assign_list,
    assign_item,
    assign_item_of_list,
    assign_list_and_weight,
    assign_then_copy,
    assign_then_forget,
]


@pytest.mark.parametrize("is_converted", [False, True], ids=["ours", "converted"])
@pytest.mark.parametrize("change", ASSIGNMENTS, ids=lambda f: f.__name__)
def test_weights_assigned_as_torchs_list_are_the_ones_used(change, is_converted):
    """DropConnect wrappers assign them, private as the list is."""
    case = Case(L=2, D=2, dtype=torch.float64)
    data, hx = case.tensors()
    theirs, ours = pair(case)
    theirs = change(theirs) or theirs
    if is_converted:
        ours = case.module(nn.RNN)
    ours = tritonrnn.convert(change(ours) or ours)
    assert type(ours) is tritonrnn.RNN
    for others in ({}, {name: weight * 0.7 for name, weight in theirs.named_parameters()}, {}):
        (expected, _), (got, _) = (
            torch.func.functional_call(module, others, (data, hx)) for module in (theirs, ours)
        )
        torch.testing.assert_close(got, expected)
        if got.requires_grad:
            torch.testing.assert_close(
                *(torch.autograd.grad(y.sum(), data) for y in (got, expected))
            )


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


swapped = pytest.mark.feature(
    "weights swapped: `swap_tensors`, `load_state_dict` with swapping set", nn="no"
)


@swapped
def test_weights_swapped_by_torch_are_the_ones_used_and_trained(implementation):
    """torch.nn.RNN, which keeps weak references to its weights, refuses."""
    case = implementation.of(Case(T=3, L=2, D=2, dtype=torch.float64))
    data, hx = case.tensors()
    other, ours = replace(case, seed=3).module(), case.module(implementation.rnn)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(data, hx)
    for mine, new in zip(ours.parameters(), other.parameters()):
        torch.utils.swap_tensors(mine, nn.Parameter(new.detach().clone()))
    got, expected = run(case, ours, data, hx), run(case, other, data, hx)
    assert_same_results(got, expected, **implementation.tolerance)
    ours(data, hx)[0].sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, ours.parameters(), other.parameters()))


@swapped
def test_state_dict_loads_under_swap(implementation):
    source, module = (implementation.rnn(3, 5, 2, device=implementation.device) for _ in range(2))
    x = torch.randn(4, 2, 3, device=implementation.device)
    expected, _ = source(x)
    module(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(source.state_dict())
        assert torch.equal(module(x)[0], expected)
        assert module.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_weight_changed_between_forward_and_backward_raises():
    _, ours = pair(Case())
    data, hx = Case().tensors()
    output, _ = ours(data, hx)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_missing_weight_is_named():
    module = tritonrnn.RNN(3, 5)
    del module.bias_ih_l0
    with pytest.raises(AttributeError, match="bias_ih_l0"):
        module(torch.ones(4, 2, 3))
