"""cuDNN's and MIOpen's recurrent networks imitated on the CPU, under torch's own names for them.

So torch checks each call against their schema. They can be differentiated once, as the real ones.
A reserve is random bytes. The backward pass needs those of its own forward pass, and overwrites
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ImitatedKernels:
    """Counts the passes, and remembers what each backward pass must be given."""

    def __init__(self, name: str):
        self.name = name
        self.forwards = self.backwards = 0
        self._kept: dict[bytes, list[Tensor]] = {}

    def forward(self, *values: Any) -> tuple[Tensor, ...]:
        given = self._named(self.name, values)
        results = _run(given, given.input, given.hx, given.weight)
        weight_buf = torch.cat([weight.flatten() for weight in given.weight])
        reserve = torch.empty(0, dtype=torch.uint8)
        if given.train:
            self.forwards += 1
            # Of a generator of their own: dropout draws from torch's.
            numbers = torch.Generator().manual_seed(self.forwards)
            reserve = torch.randint(256, (97,), dtype=torch.uint8, generator=numbers)
            self._kept[reserve.numpy().tobytes()] = [results[0].clone(), weight_buf.clone()]
        return *results, torch.empty(0), reserve, weight_buf

    def backward(self, *values: Any) -> tuple[Any, ...]:
        given = self._named(f"{self.name}_backward", values)
        self.backwards += 1
        assert given.train
        assert given.output.is_contiguous()
        kept = self._kept[given.reserve.numpy().tobytes()]
        given.reserve.zero_()
        torch.testing.assert_close([given.output, given.weight_buf], kept, rtol=0, atol=0)
        input, hx, *weights = _gradients(given)
        needs_input, needs_hx, _, needs_weights = given.output_mask
        grads = weights if needs_weights else []
        return input if needs_input else None, hx if needs_hx else None, None, grads

    def _named(self, name: str, values: tuple[Any, ...]) -> SimpleNamespace:
        schema = getattr(torch.ops.aten, name).default._schema
        names = [argument.name for argument in schema.arguments]
        given = SimpleNamespace(**dict(zip(names, values, strict=True)))
        assert given.hx.is_contiguous()
        assert not given.batch_first
        assert given.dropout == 0
        return given


def _run(given: SimpleNamespace, input: Tensor, hx: Tensor, weights: list[Tensor]) -> Any:
    run = (torch._VF.rnn_relu, torch._VF.rnn_tanh)[given.mode]
    settings = given.weight_stride0 == 4, given.num_layers, 0.0, True, given.bidirectional
    if given.batch_sizes:
        return run(input, torch.tensor(given.batch_sizes), hx, weights, *settings)
    return run(input, hx, weights, *settings, False)


def _gradients(given: SimpleNamespace) -> tuple[Tensor, ...]:
    def differentiate() -> tuple[Tensor, ...]:
        flat = given.weight_buf.split([weight.numel() for weight in given.weight])
        weights = [part.view_as(weight) for part, weight in zip(flat, given.weight)]
        leaves = [x.detach().requires_grad_() for x in (given.input, given.hx, *weights)]
        results = _run(given, leaves[0], leaves[1], leaves[2:])
        grads = [
            torch.zeros_like(y) if grad is None else grad
            for y, grad in zip(results, (given.grad_output, given.grad_hy))
        ]
        return torch.autograd.grad(results, leaves, grads)

    # Another thread has autograd on, which a kernel has not.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(differentiate).result()


@contextmanager
def imitated_kernels(name: str) -> Iterator[ImitatedKernels]:
    """Register the imitation of ``_cudnn_rnn`` or ``miopen_rnn`` as torch's kernels for the CPU."""
    kernels = ImitatedKernels(name)
    with torch.library._scoped_library("aten", "IMPL") as aten:
        aten.impl(name, kernels.forward, "CPU")
        aten.impl(f"{name}_backward", kernels.backward, "CPU")
        yield kernels


class _Differentiated(torch.autograd.Function):
    """``_cudnn_rnn`` with the formula that torch has for it.

    Where there is no cotangent, cuDNN's own returns a list of undefined tensors, which a kernel in
    Python can't.
    """

    @staticmethod
    def forward(ctx, settings, input, hx, *weights):
        stride, *others = settings
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        output, h_n, _, *kept = torch._cudnn_rnn(input, weights, stride, None, hx, None, *others)
        ctx.save_for_backward(input, hx, output, *kept, *weights)
        return output, h_n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_h_n):
        # Raises if one of them was changed in place, the output included.
        input, hx, output, reserve, weight_buf, *weights = ctx.saved_tensors
        if grad_output is None and grad_h_n is None:
            return (None,) * len(ctx.needs_input_grad)
        stride, *others = ctx.settings
        _, needs_input, needs_hx, *needs_weights = ctx.needs_input_grad
        mask = [needs_input, needs_hx, False, any(needs_weights)]
        sources = input, weights, stride, weight_buf, hx, None, output
        grads = grad_output, grad_h_n, None
        run = torch.ops.aten._cudnn_rnn_backward
        grad_input, grad_hx, _, rest = run(*sources, *grads, *others, reserve.clone(), mask)
        return None, grad_input, grad_hx, *(rest or [None] * len(weights))


def through_cudnn(mode: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return ``torch.rnn_relu`` (mode 0) or ``torch.rnn_tanh`` (1) as they are on a GPU."""

    def run(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        batch_sizes: list[int] = []
        batch_first = False
        if isinstance(arguments[1], Tensor):
            batch_sizes, *arguments = arguments[0].tolist(), *arguments[1:]
        else:
            *arguments, batch_first = arguments
        hx, weights, has_biases, num_layers, dropout, train, bidirectional = arguments
        sizes = mode, hx.shape[2], 0, num_layers
        options = False, dropout, train, bidirectional, batch_sizes, None
        settings = 4 if has_biases else 2, *sizes, *options
        if batch_first:
            input = input.transpose(0, 1)
        output, h_n = _Differentiated.apply(settings, input, hx, *weights)
        return output.transpose(0, 1) if batch_first else output, h_n

    return run
