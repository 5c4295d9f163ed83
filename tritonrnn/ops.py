"""One layer as a torch operator: schema, shapes for tracing, autograd.

``torch.ops.tritonrnn.elman`` and ``elman_backward`` hide a layer's walk from tracers, so that a
compiled or exported program holds one node a layer, whatever its length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritonrnn import differentiable, layer, native
from tritonrnn.dispatch import Backend, choose_now, current_backend, why_recorded
from tritonrnn.layout import SequenceLayout
from tritonrnn.precision import products_as_in_rnn
from tritonrnn.ragged import layout_of

# `layout`, `extents` and `reset` are what layout_of takes, beyond the shape of the input.
_library = torch.library.Library("tritonrnn", "DEF")
_library.define(
    "elman(Tensor input, Tensor? hx, Tensor[] weights, Tensor? extents, Tensor? reset, str layout, "
    "str nonlinearity, bool bidirectional, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "elman_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
    "Tensor[] weights, Tensor output, Tensor? extents, Tensor? reset, str layout, "
    "str nonlinearity, bool bidirectional, str backend, bool[] needs) -> Tensor[]"
)


def elman(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run one layer.

    Args:
        input: ``[T, B, I]`` ("time_major"), ``[B, T, I]`` ("batch_major") or ``[N, I]``
            ("packed", "jagged").
        hx: ``[G, B, H]``, or None for zero.
        weights: the layer's, in the order of ``torch.nn.RNN``.
        extents: batch_sizes ``[T]`` (packed), offsets ``[B + 1]`` (jagged) or lengths ``[B]``
            (of a padded input, None if all are T): integers, of a packed input on the CPU.
        reset: where a sequence of its own begins, ``[T, B]`` or ``[B, T]`` bool as the input is,
            or None.
        layout: "time_major", "batch_major", "packed" or "jagged".
        nonlinearity: "tanh" or "relu".
        bidirectional: whether ``weights`` holds two directions.
        backend: "torch" or "triton"; "auto" chooses between them when it runs.

    Returns:
        ``output``, shaped as the input with G * H features, and ``h_n [G, B, H]``.
    """
    return torch.ops.tritonrnn.elman(
        input, hx, weights, extents, reset, layout, nonlinearity, bidirectional, backend
    )


def _rows(
    input: Tensor, layout: str, extents: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, SequenceLayout]:
    """The input as ``[N, I]``, and where its rows lie."""
    where = layout_of(layout, input.shape[:-1], extents, reset)
    return input.reshape(where.N, input.shape[-1]), where


@contextmanager
def _plainly(input: Tensor) -> Iterator[None]:
    """Run a kernel with nothing between it and torch's own.

    A kernel is not below autograd by itself when called directly or from an exported program; what
    it returns would be views of what it made, which can't be changed in place; and autocast would
    cast again what was cast once for the whole call.
    """
    device = input.device
    with torch._C._AutoDispatchBelowADInplaceOrView(), products_as_in_rnn(device, input.dtype):
        if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def _resolve(
    backend: str,
    asked: Callable[[], Backend],
    w_hh: Tensor,
    where: SequenceLayout,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[str, bool]:
    """The back end, and whether torch's own kernels serve there.

    That of a compiled program's call was not chosen when it was traced.
    """
    if backend != "auto":
        return backend, False
    choice = choose_now(
        asked(),
        w_hh.device,
        w_hh.dtype,
        T=where.T,
        B=where.B,
        G=2 if bidirectional else 1,
        H=len(w_hh),
        nonlinearity=nonlinearity,
        ragged=where.is_ragged,
    )
    return choice.backend, choice.plan == "native"


def _elman_kernel(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _plainly(input):
        rows, where = _rows(input, layout, extents, reset)
        B = where.whole.B
        if hx is not None and hx.shape[1] != B:
            raise RuntimeError(f"Expected hidden states of {B} sequences, got {hx.shape[1]}")
        backend, is_native = _resolve(
            backend, current_backend, weights[1], where, nonlinearity, bidirectional
        )
        if is_native:
            # Without a graph: the backward pass walks, and wants the output only.
            with torch.no_grad():
                output, h_n = native.forward(
                    input, hx, [weights], extents, layout, nonlinearity, bidirectional
                )
            return output.contiguous(), h_n.contiguous()
        output, h_n = layer.forward(rows, hx, weights, where, nonlinearity, bidirectional, backend)
        return output.view(*input.shape[:-1], output.shape[-1]), h_n


def _elman_backward_kernel(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    with _plainly(input):
        rows, where = _rows(input, layout, extents, reset)
        # Not by the context: that was the forward pass's to obey, and may be another by now.
        backend, _ = _resolve(
            backend, lambda: "auto", weights[1], where, nonlinearity, bidirectional
        )
        # The walk is in place: on a copy, which for an odd layout is the only one.
        if grad_output is None:
            dz = output.new_zeros(output.shape)
        else:
            dz = grad_output.clone(memory_format=torch.contiguous_format)
        grad_input, *grads = layer.backward(
            dz.view(len(rows), output.shape[-1]),
            grad_h_n,
            rows,
            hx,
            weights,
            output.reshape(len(rows), output.shape[-1]),
            where,
            nonlinearity,
            bidirectional,
            backend,
            needs,
        )
        if grad_input is not None:
            grad_input = grad_input.view(input.shape)
        return [grad for grad in (grad_input, *grads) if grad is not None]


def _elman_fake(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    G, H = 2 if bidirectional else 1, weights[1].shape[0]
    B: Any
    if hx is not None:
        B = hx.shape[1]
    elif layout == "packed":
        # batch_sizes[0]: data, which a tracer does not see.
        B = torch.library.get_ctx().new_dynamic_size()
    elif layout == "jagged":
        assert extents is not None
        B = extents.shape[0] - 1
    else:
        B = input.shape[1 if layout == "time_major" else 0]
    return input.new_empty(*input.shape[:-1], G * H), input.new_empty(G, B, H)


def _elman_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    sources = (input, hx, *weights)
    return [
        source.new_empty(source.shape)
        for source, need in zip(sources, needs)
        if need and source is not None
    ]


def elman_recorded(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The same as :func:`elman`, every step recorded by autograd instead."""
    rows, where = _rows(input, layout, extents, reset)
    with products_as_in_rnn(input.device, input.dtype):
        output, h_n = differentiable.forward(rows, hx, weights, where, nonlinearity, bidirectional)
    return output.unflatten(0, input.shape[:-1]), h_n


class _Elman(torch.autograd.Function):
    # Not with setup_context: torch then binds the arguments by inspection, 40 us a call, for the
    # sake of torch.func, which never comes here.
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        settings, (input, hx, extents, reset, *weights) = args[:4], args[4:]
        with torch._C._AutoDispatchBelowAutograd():
            output, h_n = torch.ops.tritonrnn.elman(input, hx, weights, extents, reset, *settings)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, input, hx, _saveable(extents), _saveable(reset), *weights)
        return output, h_n

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        output, input, hx, extents, reset, *weights = ctx.saved_tensors
        needs_input, needs_hx, _, _, *needs_weights = ctx.needs_input_grad[4:]
        needs = [needs_input, needs_hx, *needs_weights]
        if grad_output is None and grad_h_n is None:
            return (None,) * len(ctx.needs_input_grad)
        run: Callable[..., list[Tensor]] = torch.ops.tritonrnn.elman_backward
        if differentiable.is_batched((grad_output, grad_h_n)):
            run = _recorded_backward
        found = iter(
            run(
                grad_output,
                grad_h_n,
                input,
                hx,
                weights,
                output,
                extents,
                reset,
                *ctx.settings,
                needs,
            )
        )
        grads = [next(found) if need else None for need in needs]
        return (*[None] * 4, grads[0], grads[1], None, None, *grads[2:])


def _saveable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, but a copy of one that was made in inference mode, as autograd saves none."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _elman_autograd(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    extents: Tensor | None,
    reset: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    if why_recorded(input.dtype):
        return elman_recorded(input, hx, weights, extents, reset, *settings)
    if torch.is_grad_enabled():
        return _Elman.apply(*settings, input, hx, extents, reset, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tritonrnn.elman(input, hx, weights, extents, reset, *settings)


def _elman_backward_autograd(*args: Any) -> list[Tensor]:
    """Record every step where a derivative of the derivative is wanted.

    Within a backward pass, grad mode says so.
    """
    grad_output, grad_h_n, input, hx, weights, *_ = args
    tensors = (grad_output, grad_h_n, input, hx, *weights)
    differentiated = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    if differentiated or why_recorded(input.dtype):
        return _recorded_backward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tritonrnn.elman_backward(*args)


def _recorded_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Run the layer again, every step recorded, and leave its derivative to autograd."""

    def run(input: Tensor, hx: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return elman_recorded(
            input, hx, weights, extents, reset, layout, nonlinearity, bidirectional, backend
        )

    cotangents = grad_output, grad_h_n
    return differentiable.gradients(run, (input, hx, *weights), needs, cotangents)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hide what the operator calls from ``torch.compile``.

    Where a compiled program falls back to Python, it looks into every function that is called,
    these included. (torch's own way to hide one imports the compiler at the first call.)
    """
    hidden = torch._disable_dynamo(function)

    def run(*args: Any) -> Any:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args)

    return run


for _name, _kernel, _autograd, _fake in (
    ("elman", _elman_kernel, _elman_autograd, _elman_fake),
    ("elman_backward", _elman_backward_kernel, _elman_backward_autograd, _elman_backward_fake),
):
    _library.impl(_name, _uncompiled(_kernel), "CompositeExplicitAutograd")
    _library.impl(_name, _uncompiled(_autograd), "Autograd")
    torch.library.register_fake(f"tritonrnn::{_name}", _fake, lib=_library)
