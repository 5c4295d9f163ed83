"""A second derivative of what torch's own kernels differentiate once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonrnn import native, ops
from tritonrnn.differentiable import gradients, is_batched
from tritonrnn.dispatch import why_recorded


def is_differentiated_once(input: Tensor) -> bool:
    """Whether torch's own kernels for this input have a backward pass that has none itself."""
    return input.is_cuda


def forward(
    input: Tensor,
    hx: Tensor | None,
    layers: Sequence[Sequence[Tensor]],
    extents: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run :func:`tritonrnn.native.forward`, differentiable as often as wanted.

    With a ``dropout``, once only where :func:`is_differentiated_once` says so: the masks are
    known to nobody but the kernels.
    """
    settings = extents, layout, nonlinearity, bidirectional
    results = native.forward(input, hx, layers, *settings, dropout)
    # Whether any of its sources is trained, torch has found out.
    if not (results[0].requires_grad and is_differentiated_once(input) and dropout == 0):
        return results
    weights = [weight for layer in layers for weight in layer]
    return _Twice.apply(len(layers), settings, *results, input, hx, *weights)


class _Twice(torch.autograd.Function):
    """The identity, of results that their own backward pass can follow once.

    A first derivative passes through to it. Where a derivative of that is wanted, it is left
    nothing to do, and the first is taken of the same layers run again, every step recorded.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.num_layers, (ctx.extents, *ctx.settings), output, h_n, *sources = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sources)
        # Detached, as views of what comes in could not be changed in place; that the kernels'
        # backward pass sees such a change, they share with it.
        return output.detach(), h_n.detach()

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, *_ = sources = ctx.saved_tensors
        cotangents = grad_output, grad_h_n
        recorded = torch.is_grad_enabled() or why_recorded(input.dtype) or is_batched(cotangents)
        if not recorded or (grad_output is None and grad_h_n is None):
            return (None, None, *cotangents, *[None] * len(sources))
        needs = ctx.needs_input_grad[4:]
        run = functools.partial(_recorded, ctx)
        found = iter(gradients(run, sources, needs, cotangents))
        return (*[None] * 4, *[next(found) if need else None for need in needs])


def _recorded(ctx: Any, data: Tensor, hx: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same layers, every step recorded by autograd."""
    each = len(weights) // ctx.num_layers
    layout, nonlinearity, bidirectional = ctx.settings
    G = 2 if bidirectional else 1
    finals = []
    for index in range(ctx.num_layers):
        h_0 = None if hx is None else hx[index * G : (index + 1) * G]
        layer = weights[index * each : (index + 1) * each]
        data, h_n = ops.elman_recorded(
            data, h_0, layer, ctx.extents, None, layout, nonlinearity, bidirectional, "torch"
        )
        finals.append(h_n)
    return data, torch.cat(finals)
