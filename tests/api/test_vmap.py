"""torch.func.vmap over inputs, weights and gradients; torch.nn.RNN has no rule for it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import tritonrnn
from tests.support.cases import Case, pair, plain
from tests.support.implementations import implementations

CASES = [
    Case(T=4, B=3, I=2, H=3, L=L, D=D, layout=layout, nonlinearity=nonlinearity,
         dtype=torch.float64)
    for layout, L, D, nonlinearity in [
        ("time-major", 2, 2, "tanh"),
        ("batch-first", 1, 2, "relu"),
        ("unbatched", 2, 1, "tanh"),
        ("packed", 1, 1, "tanh"),
        ("unsorted", 2, 2, "relu"),
    ]
]  # fmt: skip
cases = pytest.mark.parametrize("case", CASES, ids=str)


mapped = pytest.mark.feature(
    "`torch.func.vmap` over inputs, or over weights", nn="no", triton="yes, on torch"
)


def stacked(results):
    return [torch.stack(parts) for parts in zip(*results)]


def of_tensors(case: Case):
    """``(module, weights, data, hx) -> (output, h_n)``."""
    packed = case.input(case.tensors()[0])

    def run(module, weights, data, hx):
        input = packed._replace(data=data) if case.is_packed else data
        output, h_n = functional_call(module, weights, (input, hx))
        return plain(output), h_n

    return run


def several(case: Case, count: int = 4):
    """Return inputs and states, ``count`` of each."""
    data, hx = (x.detach() for x in case.tensors())
    scale = torch.linspace(-1, 1.5, count, dtype=data.dtype)
    return [torch.stack([x * factor for factor in scale]) for x in (data, hx)]


@mapped
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=str)
@cases
def test_vmap_over_inputs_agrees_with_a_loop(case, in_dims, implementation):
    case = implementation.of(case)
    theirs, module = (module.requires_grad_(False) for module in pair(case, implementation.rnn))
    weights, run = dict(module.named_parameters()), of_tensors(case)
    arguments = [x if dim == 0 else x[1] for x, dim in zip(several(case), in_dims)]
    got = vmap(lambda *x: run(module, weights, *x), in_dims)(*arguments)
    one_by_one = zip(*(x if dim == 0 else [x] * 4 for x, dim in zip(arguments, in_dims)))
    torch.testing.assert_close(list(got), stacked(run(theirs, {}, *x) for x in one_by_one))


@mapped
@cases
def test_ensemble_trains_as_its_members_do(case, implementation):
    """Over weights, stacked."""
    case = implementation.of(case)
    members, modules = zip(*(pair(case, implementation.rnn) for _ in range(3)))
    for factor, (member, module) in enumerate(zip(members, modules), 1):
        for parameter in (*member.parameters(), *module.parameters()):
            parameter.data.mul_(factor / 2)
    weights, buffers = stack_module_state(modules)
    assert not buffers
    (data, *_), (hx, *_) = several(case)
    run = of_tensors(case)
    got = vmap(lambda weights: run(modules[0], weights, data, hx))(weights)
    expected = stacked(run(member, {}, data, hx) for member in members)
    torch.testing.assert_close(list(got), expected)
    sum(y.square().sum() for y in got).backward()
    sum(y.square().sum() for y in expected).backward()
    for name, weight in weights.items():
        gradients = [member.get_parameter(name).grad for member in members]
        torch.testing.assert_close(weight.grad, torch.stack(gradients), msg=name)


@pytest.mark.feature(
    "gradients of each sample by `torch.func.vmap`", nn="not if packed", triton="yes, on torch"
)
@implementations("case", nn=CASES[3:], torch=CASES, triton=CASES)
def test_gradients_per_sample_agree_with_a_loop(case, implementation):
    case = implementation.of(case)
    theirs, module = pair(case, implementation.rnn)
    run, samples = of_tensors(case), several(case)

    def loss(module, weights, *x):
        output, h_n = run(module, weights, *x)
        return output.square().sum() + h_n.pow(3).sum()

    weights = dict(module.named_parameters())
    got = vmap(grad(functools.partial(loss, module)), in_dims=(None, 0, 0))(weights, *samples)
    expected = stacked(
        torch.autograd.grad(loss(theirs, {}, *x), list(theirs.parameters())) for x in zip(*samples)
    )
    torch.testing.assert_close(list(got.values()), expected)


def test_vmaps_nest_within_each_other_and_jacobians():
    case = CASES[0]
    module, run = case.module(tritonrnn.RNN), of_tensors(case)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    data, hx = several(case)

    def last(data, hx):
        return run(module, weights, data, hx)[1]

    outer = [torch.stack([x, x.cos()]) for x in (data, hx)]
    got = vmap(vmap(last))(*outer)
    torch.testing.assert_close(got, torch.stack([vmap(last)(*x) for x in zip(*outer)]))
    jacobians = vmap(jacrev(last))(data, hx)
    torch.testing.assert_close(
        jacobians, torch.stack([torch.autograd.functional.jacobian(
            lambda x, h=h: last(x, h), x) for x, h in zip(data, hx)])
    )  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_is_as_random_as_asked_for(randomness, batch_first):
    module = tritonrnn.RNN(3, 8, 2, dropout=0.5, batch_first=batch_first)
    data = torch.randn(5, 2, 3).expand(3, 5, 2, 3)
    output, _ = vmap(module, randomness=randomness)(data)
    assert torch.equal(output[0], output[1]) == (randomness == "same")


def test_vmap_over_a_cell_agrees_with_a_loop():
    cell = tritonrnn.RNNCell(3, 5)
    data, hx = torch.randn(4, 2, 3), torch.randn(4, 2, 5)
    torch.testing.assert_close(vmap(cell)(data, hx), torch.stack([*map(cell, data, hx)]))


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4]], ids=str)
def test_expanded_weights_give_the_gradients_of_each_sample(case):
    """The way of Opacus and of torch's own tests: weights that stand for one of each sample."""
    of_each = []
    for module in pair(case):
        data, hx = (x.detach() for x in case.tensors())
        run = call_for_per_sample_grads(module, batch_size=case.B)
        output, h_n = run(case.input(data), hx)
        (plain(output).square().sum() + h_n.pow(3).sum()).backward()
        of_each.append([weight.grad_sample for weight in module.parameters()])
    torch.testing.assert_close(of_each[1], of_each[0])
    with tritonrnn.backend("triton"), pytest.raises(RuntimeError, match="rules for torch's RNN"):
        call_for_per_sample_grads(case.module(tritonrnn.RNN).float(), batch_size=case.B)(
            case.input(data.float()), hx.float()
        )
