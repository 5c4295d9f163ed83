"""Weights that are swapped, tied, frozen, parametrised or pruned are the ones used."""

from __future__ import annotations

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


def test_weights_swapped_by_torch_are_the_ones_used_and_trained():
    """torch.nn.RNN, which keeps weak references to its weights, refuses."""
    case = Case(L=2, D=2, dtype=torch.float64)
    data, hx = case.tensors()
    other, ours = replace(case, seed=3).module(), case.module(tritonrnn.RNN)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(data, hx)
    for mine, new in zip(ours.parameters(), other.parameters()):
        torch.utils.swap_tensors(mine, nn.Parameter(new.detach().clone()))
    assert_same_results(run(case, ours, data, hx), run(case, other, data, hx))
    ours(data, hx)[0].sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, ours.parameters(), other.parameters()))


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
