"""Try everything that differentiates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from perf.features.attempt import Side, WrongError, feature
from perf.features.problem import (
    TWO_LAYERS,
    Problem,
    assert_right,
    check,
    exactly,
)


@feature("backward in eval mode")
def _eval_mode(side: Side) -> None:
    check(side, Problem(TWO_LAYERS), lambda module, input, hx: module.eval()(input, hx))


@feature("activation checkpointing")
def _checkpointing(side: Side) -> None:
    for use_reentrant in (False, True):
        run = functools.partial(checkpoint, use_reentrant=use_reentrant)
        check(side, Problem(), run)  # type: ignore[arg-type]


def _second_derivatives(problem: Problem, module: nn.Module, device: str) -> list[Tensor]:
    data, hx = problem.tensors(device)
    output, h_n = module(data, hx)
    first = torch.autograd.grad(output.square().sum() + h_n.sum(), [data, hx], create_graph=True)
    penalty = sum((gradient.square().sum() for gradient in first), torch.zeros((), device=device))
    return list(torch.autograd.grad(penalty, [data, hx, *module.parameters()]))


def check_double_backward(side: Side) -> None:
    """Check the gradients of a gradient penalty."""
    problem = Problem()
    got = _second_derivatives(
        problem, problem.module(side.rnn_class, side.device), device=side.device
    )
    torchs = _second_derivatives(problem, problem.module(nn.RNN), "cpu")
    truth = _second_derivatives(*exactly(problem), "cpu")
    assert_right(got, truth, problem.dtype, torchs)


@feature("double backward, vectorised jacobians")
def _double_backward(side: Side) -> None:
    check_double_backward(side)
    problem = Problem()
    jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=True)
    assert_right(*_of_input(side, problem, jacobian), problem.dtype)


def _of_input(
    side: Side, problem: Problem, transform: Callable[..., Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a transform of input to output, and the oracle's jacobian by plain autograd."""
    module = problem.module(side.rnn_class, side.device)
    data, hx = (x.detach() for x in problem.tensors(side.device))
    got = transform(lambda x: module(x, hx)[0], data)
    wide, wide_module = exactly(problem)
    wide_data, wide_hx = (x.detach() for x in wide.tensors())
    truth = torch.autograd.functional.jacobian(lambda x: wide_module(x, wide_hx)[0], wide_data)
    return [got], [truth]  # type: ignore[list-item]


@feature("`torch.func.grad`, `jacrev`, `jvp`, forward AD")
def _transforms(side: Side) -> None:
    problem = Problem()
    [got], [jacobian] = _of_input(side, problem, lambda f, x: torch.func.jacrev(f)(x))
    assert_right([got], [jacobian], problem.dtype)

    def grad(f: Any, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: f(x).sum())(x)

    [got], _ = _of_input(side, problem, grad)
    assert_right([got], [jacobian.sum((0, 1, 2))], problem.dtype)

    def jvp(f: Any, x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    def dual(f: Any, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        if tangent is None:
            raise WrongError("forward AD lost the tangent")
        return tangent

    for transform in (jvp, dual):
        [got], _ = _of_input(side, problem, transform)
        assert_right([got], [jacobian.sum((3, 4, 5))], problem.dtype)


@feature("`torch.func.vmap`, gradients of each sample")
def _vmap(side: Side) -> None:
    problem = Problem()
    module = problem.module(side.rnn_class, side.device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    data, _ = (x.detach() for x in problem.tensors(side.device))

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output, h_n = torch.func.functional_call(module, parameters, (sample,))
        return output.square().sum() + h_n.sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, data)
    wide, wide_module = exactly(problem)
    each = []
    for sample in wide.tensors()[0].detach().unbind(1):
        output, h_n = wide_module(sample)
        value = output.square().sum() + h_n.sum()
        each.append(torch.autograd.grad(value, list(wide_module.parameters())))
    truth = [torch.stack(gradients) for gradients in zip(*each)]
    assert_right(list(got.values()), truth, problem.dtype)
