"""One layer as a torch operator: its schema, its shapes for a tracer, its autograd.

A tracer sees ``torch.ops.tritonrnn.elman.with_reserve`` and ``elman_backward`` as one operator
each. So a compiled or exported program holds one node a layer, whatever the number of steps.

Such a program names no path: its operator chooses one when it runs. The backward pass takes the
path of the forward pass by ``reserve``, two tensors that only the operators read. Where cuDNN or
MIOpen served, they are its reserve and weight buffers; elsewhere both are empty, and the shape of
the first says which path it was. A tracer sees empty ones, as it does of torch's own
``_cudnn_rnn``: how much memory cuDNN reserves is known only when it runs, and sizes that are not
known keep a program out of CUDA graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonrnn import flops, layer
from tritonrnn.dispatch import choose_now, current_backend, recurrence_of
from tritonrnn.environment import Backend
from tritonrnn.layout import SequenceLayout, check_has_steps, is_in_memory
from tritonrnn.memo import is_traced, take, take_anew
from tritonrnn.paths import aten
from tritonrnn.paths.composite import elman_composite, gradients, is_batched, why_composite
from tritonrnn.precision import products_as_in_rnn
from tritonrnn.ragged import rows_of

# Saved programs name these arguments, so their names stay. `extents` is `seq_metadata` in Python.
# The first is for programs that were saved before there was the second.
_library = torch.library.Library("tritonrnn", "DEF")
_library.define(
    "elman(Tensor input, Tensor? hx, Tensor[] weights, Tensor? extents, Tensor? reset, str layout, "
    "str nonlinearity, bool bidirectional, str backend) -> (Tensor, Tensor)"
)
_FORWARD = (
    "(Tensor input, Tensor? hx, Tensor[] weights, Tensor? extents, "
    "Tensor? reset, str layout, str nonlinearity, bool bidirectional, str backend, "
    "bool needs_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
    "Tensor[] weights, Tensor output, Tensor? extents, Tensor? reset, str layout, "
    "str nonlinearity, bool bidirectional, str backend, bool[] needs, Tensor? reserve=None, "
    "Tensor? weight_buf=None) -> Tensor[]"
)
_library.define(f"elman.with_reserve{_FORWARD}")
_library.define(f"elman_backward{_BACKWARD}")
# A CUDA graph that is replayed does not read what lies on the CPU. The compiler leaves these out of
# its graphs.
_library.define(f"elman.sizes_on_cpu{_FORWARD}", tags=(torch.Tag.cudagraph_unsafe,))
_library.define(f"elman_backward.sizes_on_cpu{_BACKWARD}", tags=(torch.Tag.cudagraph_unsafe,))


class _Operators(NamedTuple):
    """The operators of both passes."""

    forward: Any
    backward: Any


_usual = _Operators(
    torch.ops.tritonrnn.elman.with_reserve, torch.ops.tritonrnn.elman_backward.default
)
_sizes_on_cpu = _Operators(
    torch.ops.tritonrnn.elman.sizes_on_cpu, torch.ops.tritonrnn.elman_backward.sizes_on_cpu
)
# Where `needs` stands among the arguments of elman_backward.
_NEEDS = 12
# For programs that are compiled. torch would compute a plain copy again in the backward pass.
_library.define("take(Tensor input) -> Tensor")


def elman(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    seq_metadata: Tensor | None,
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
        seq_metadata: batch_sizes ``[T]`` (packed), offsets ``[B + 1]`` (jagged) or lengths ``[B]``
            (padded, or None if all are T): integers, those of a packed input on the CPU.
        reset: where a sequence starts anew, bool, ``[T, B]`` or ``[B, T]`` as the input is, or
            None.
        layout: "time_major", "batch_major", "packed" or "jagged".
        nonlinearity: "tanh" or "relu".
        bidirectional: whether ``weights`` holds two directions.
        backend: "torch", or "triton:" and the name of a plan; by "auto" the operator chooses each
            time it runs.

    Returns:
        ``output``, shaped as the input with G * H features, and ``h_n [G, B, H]``.
    """
    settings = layout, nonlinearity, bidirectional, backend
    sources = input, hx, weights, seq_metadata, reset
    needs_grad = torch.is_grad_enabled()
    if not _is_eager(input, hx, *weights):
        if torch.jit.is_tracing():
            # torch.jit.trace compares a trace with another one, made without gradients.
            return _elman_of_trace(*sources, *settings, True)[:2]
        run = _usual.forward
        # Not of an exported program, which any runtime is to know.
        if (
            input.is_cuda
            and seq_metadata is not None
            and seq_metadata.is_cpu
            and torch.compiler.is_compiling()
            and not torch.compiler._is_exporting_flag
        ):
            run = _sizes_on_cpu.forward
        return run(*sources, *settings, backend != "auto" or needs_grad)[:2]
    if needs_grad and any(x is not None and x.requires_grad for x in (input, hx, *weights)):
        return _Elman.apply(_usual, *settings, input, hx, seq_metadata, reset, *weights)[:2]
    return _elman_kernel(*sources, *settings, needs_grad)[:2]


def _elman_of_trace(*arguments: Any) -> Any:
    """Run while ``torch.jit.trace`` records, which the operator's kernel can't see."""
    token = _is_of_trace.set(True)
    try:
        return _usual.forward(*arguments)
    finally:
        _is_of_trace.reset(token)


_is_of_trace: ContextVar[bool] = ContextVar("tritonrnn_is_of_trace", default=False)


def _is_eager(*tensors: Tensor | None) -> bool:
    """Return whether nobody but autograd is to see that operators run on these tensors.

    Then their kernels are called directly: torch's dispatcher takes some 20 us for an operator that
    is written in Python, for autograd as long again.
    """
    return (
        # First, as a compiler does not know the others.
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        # A profile is to name the operators.
        and not torch.autograd.profiler._is_profiler_enabled
        and _PLAIN.issuperset(map(type, tensors))
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


@contextmanager
def _below_autograd_and_autocast(input: Tensor) -> Iterator[None]:
    """Run the operator's kernel as torch runs its own: below autograd, views and autocast.

    When a kernel is called directly or by an exported program, autograd is still on: its results
    would be tracked views, which can't be changed in place. Autocast would cast again what was
    cast once for the whole call. Matrix products follow torch's switch for RNNs.
    """
    device = input.device
    products = products_as_in_rnn(device, input.dtype) if input.is_cuda else nullcontext()
    with torch._C._AutoDispatchBelowADInplaceOrView(), products:
        if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def _choose(
    asked: Backend,
    weights: Sequence[Tensor],
    hx: Tensor | None,
    where: SequenceLayout,
    nonlinearity: str,
    bidirectional: bool,
    needs_grad: bool = True,
    may_try: bool = False,
) -> str:
    """Return the path of a program's layer: "aten", or what :func:`elman` takes as back end."""
    w_ih, w_hh = weights[:2]
    choice = choose_now(
        asked,
        w_hh.device,
        w_hh.dtype,
        T=where.T,
        B=where.B,
        I=w_ih.shape[1],
        G=2 if bidirectional else 1,
        H=len(w_hh),
        nonlinearity=nonlinearity,
        mapped=not where.is_padded,
        ragged=where.is_ragged,
        hx=hx is not None,
        needs_grad=needs_grad,
        may_try=may_try,
    )
    return "aten" if choice.plan == "aten" else choice.operator_backend


# The back ends that programs took, in the order of their first use.
_taken = ["torch"]


def _empty_reserve(input: Tensor, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """Return the empty tensors by which a program's backward pass knows its back end."""
    if backend not in _taken:
        _taken.append(backend)
    shape = 0, _taken.index(backend)
    return input.new_empty(shape, dtype=torch.uint8), input.new_empty(0, dtype=torch.uint8)


# Of calls that name their back end: nobody reads their reserve, and to make one takes 2 us.
_unused: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _unused_reserve(input: Tensor) -> tuple[Tensor, Tensor]:
    if is_traced(input):
        return _empty_reserve(input)
    if input.device not in _unused:
        with torch.inference_mode(False):
            _unused[input.device] = _empty_reserve(torch.empty(0, device=input.device))
    return _unused[input.device]


def _elman_kernel(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _below_autograd_and_autocast(input):
        # A program that was exported calls nothing else that would check these.
        check_has_steps(input.shape, layout)
        rows, where = rows_of(input, layout, seq_metadata, reset)
        B = where.parent.B
        if hx is not None and hx.shape[1] != B:
            raise RuntimeError(f"Expected hidden states of {B} sequences, got {hx.shape[1]}")
        if backend != "auto":
            reserve = _unused_reserve(input)
        else:
            needs_grad = needs_grad and not torch.is_inference_mode_enabled()
            backend = _choose(
                current_backend(),
                weights,
                hx,
                where,
                nonlinearity,
                bidirectional,
                needs_grad,
                may_try=not _is_of_trace.get(),
            )
            if backend == "aten" and needs_grad and not aten.has_reserve(input):
                # Without a graph, torch's kernels leave nothing for a backward pass of their own.
                backend = "torch"
            if backend == "aten":
                settings = seq_metadata, layout, nonlinearity, bidirectional
                if needs_grad:
                    return aten.forward_with_reserve(input, hx, weights, *settings)
                with torch.no_grad():
                    output, h_n = aten.forward(input, hx, [weights], *settings)
                return output.contiguous(), h_n.contiguous(), *_empty_reserve(input)
            reserve = _empty_reserve(input, backend)
        recurrence = recurrence_of(backend, input.device, input.dtype)
        output, h_n = layer.forward(
            rows, hx, weights, where, nonlinearity, bidirectional, recurrence
        )
        return output.view(*input.shape[:-1], output.shape[-1]), h_n, *reserve


def _elman_backward_kernel(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs: Sequence[bool],
    reserve: Tensor | None = None,
    weight_buf: Tensor | None = None,
) -> list[Tensor]:
    with _below_autograd_and_autocast(input):
        if weight_buf is not None and len(weight_buf) > 0:
            assert reserve is not None
            cotangents, kept = (grad_output, grad_h_n), (output, reserve, weight_buf)
            settings = seq_metadata, layout, nonlinearity, bidirectional
            return aten.backward_with_reserve(
                cotangents, kept, needs, input, hx, weights, *settings
            )
        rows, where = rows_of(input, layout, seq_metadata, reset)
        if backend == "auto" and reserve is not None:
            backend = _taken[reserve.shape[1]]
        elif backend == "auto":
            # Of a program that was saved before there was a reserve. Not by the context, which was
            # for the forward pass and may have changed since.
            backend = _choose("auto", weights, hx, where, nonlinearity, bidirectional)
            backend = "torch" if backend == "aten" else backend
        shape = len(rows), output.shape[-1]
        if grad_output is None:
            a = dz = output.new_zeros(shape)
        elif grad_output.is_contiguous() and is_in_memory(grad_output):
            a = grad_output.view(shape)
            dz = torch.empty_like(a)
        else:
            # A copy of our own, which dz may overwrite.
            a = dz = grad_output.clone(memory_format=torch.contiguous_format).view(shape)
        grad_input, *grads = layer.backward(
            a,
            dz,
            grad_h_n,
            rows,
            hx,
            weights,
            output.reshape(shape),
            where,
            nonlinearity,
            bidirectional,
            recurrence_of(backend, input.device, input.dtype),
            needs,
        )
        if grad_input is not None:
            grad_input = grad_input.view(input.shape)
        return [grad for grad in (grad_input, *grads) if grad is not None]


def _elman_fake(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    G, H = 2 if bidirectional else 1, weights[1].shape[0]
    B: Any
    if hx is not None:
        B = hx.shape[1]
    elif layout == "packed":
        assert seq_metadata is not None
        # A tracer does not see values.
        is_known = not (seq_metadata.is_meta or is_traced(seq_metadata))
        B = int(seq_metadata[0]) if is_known else torch.library.get_ctx().new_dynamic_size()
    elif layout == "jagged":
        assert seq_metadata is not None
        B = seq_metadata.shape[0] - 1
    else:
        B = input.shape[1 if layout == "time_major" else 0]
    output, h_n = input.new_empty(*input.shape[:-1], G * H), input.new_empty(G, B, H)
    return output, h_n, *_empty_reserve(input)


def _elman_backward_fake(*args: Any) -> list[Tensor]:
    _, _, input, hx, weights, *_ = args
    needs = args[_NEEDS]
    sources = (input, hx, *weights)
    return [
        source.new_empty(source.shape)
        for source, need in zip(sources, needs)
        if need and source is not None
    ]


class _Elman(torch.autograd.Function):
    # Without setup_context, which only torch.func needs, and that takes the composite path: with
    # it, torch binds the arguments by inspection at each call, which takes 40 us.
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        operators, settings, (input, hx, seq_metadata, reset, *weights) = (
            args[0],
            args[1:5],
            args[5:],
        )
        # What was true where a program was traced may be so no more.
        needs_grad = True in ctx.needs_input_grad
        run: Callable[..., Sequence[Tensor]] = operators.forward
        if _is_eager(input, hx, *weights):
            run = _elman_kernel
        with torch._C._AutoDispatchBelowAutograd():
            output, h_n, *reserve = run(
                input, hx, weights, seq_metadata, reset, *settings, needs_grad
            )
        ctx.operators, ctx.settings = operators, settings
        ctx.set_materialize_grads(False)
        if settings[-1] != "auto":
            ctx.save_for_backward(output, input, hx, seq_metadata, reset, *weights)
            return output, h_n
        ctx.mark_non_differentiable(*reserve)
        ctx.save_for_backward(output, input, hx, seq_metadata, reset, *weights, *reserve)
        return output, h_n, *reserve

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        output, input, hx, seq_metadata, reset, *weights = ctx.saved_tensors
        needs_input, needs_hx, _, _, *needs_weights = ctx.needs_input_grad[5:]
        needs = [needs_input, needs_hx, *needs_weights]
        weights, reserve = weights[: len(needs_weights)], weights[len(needs_weights) :]
        if grad_output is None and grad_h_n is None:
            return (None,) * len(ctx.needs_input_grad)
        cotangents = grad_output, grad_h_n
        run: Callable[..., list[Tensor]] = ctx.operators.backward
        if is_batched(cotangents):
            run = _backward_composite
        elif not torch.is_grad_enabled() and _is_eager(*cotangents, input, hx, *weights):
            run = _elman_backward_kernel
        sources = input, hx, weights, output, seq_metadata, reset
        found = iter(run(*cotangents, *sources, *ctx.settings, needs, *reserve))
        grads = [next(found) if need else None for need in needs]
        return (*[None] * 5, grads[0], grads[1], None, None, *grads[2:])


def _elman_autograd(
    operators: _Operators, input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *args: Any
) -> tuple[Tensor, ...]:
    seq_metadata, reset, *settings, needs_grad = args
    seq_metadata = None if seq_metadata is None else take(seq_metadata)
    reset = None if reset is None else take(reset)
    if why_composite(input.dtype):
        results = elman_composite(input, hx, weights, seq_metadata, reset, *settings[:-1])
        return *results, *_empty_reserve(input)
    if torch.is_grad_enabled():
        results = _Elman.apply(operators, *settings, input, hx, seq_metadata, reset, *weights)
        return results if settings[-1] == "auto" else (*results, *_unused_reserve(input))
    with torch._C._AutoDispatchBelowAutograd():
        # The forward pass of a compiled program runs here, and its gradient may be needed.
        return operators.forward(input, hx, weights, seq_metadata, reset, *settings, needs_grad)


def _elman_backward_autograd(operators: _Operators, *args: Any) -> list[Tensor]:
    """Take the composite path where the result is to be differentiated again.

    Within a backward pass, grad mode is on in that case only.
    """
    grad_output, grad_h_n, input, hx, weights, *_ = args
    tensors = (grad_output, grad_h_n, input, hx, *weights)
    differentiated = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    if differentiated or why_composite(input.dtype):
        return _backward_composite(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operators.backward(*args)


def _backward_composite(*args: Any) -> list[Tensor]:
    """Run the layer again on the composite path, and let autograd differentiate that."""
    grad_output, grad_h_n, input, hx, weights, _, seq_metadata, reset, *settings, _ = args[:_NEEDS]

    def run(input: Tensor, hx: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return elman_composite(input, hx, weights, seq_metadata, reset, *settings)

    return gradients(run, (input, hx, *weights), args[_NEEDS], (grad_output, grad_h_n))


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hide a function of the operator's from ``torch.compile``.

    Where a compiled program falls back to Python, the compiler traces every function that is
    called, these included. ``torch.compiler.disable`` would import the compiler at the first call;
    so the hidden function is used only where the compiler is loaded already.
    """
    hidden = torch._disable_dynamo(function)

    def run(*args: Any) -> Any:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args)

    return run


_library.impl("elman", _uncompiled(elman), "CompositeImplicitAutograd")
for _operators in (_usual, _sizes_on_cpu):
    for _operator, _kernel, _autograd, _fake in (
        (_operators.forward, _elman_kernel, _elman_autograd, _elman_fake),
        (
            _operators.backward,
            _elman_backward_kernel,
            _elman_backward_autograd,
            _elman_backward_fake,
        ),
    ):
        _library.impl(_operator, _uncompiled(_kernel), "CompositeExplicitAutograd")
        _library.impl(_operator, _uncompiled(partial(_autograd, _operators)), "Autograd")
        torch.library.register_fake(_operator, _fake, lib=_library)

_library.impl("take", _uncompiled(take_anew), "CompositeExplicitAutograd")
torch.library.register_fake("tritonrnn::take", torch.empty_like, lib=_library)

flops.register()
