"""Layers in torch's own kernels: ATen's on the CPU, cuDNN's on CUDA, MIOpen's on ROCm.

Those for a GPU have a backward pass that can't be differentiated. A second derivative is taken of
the same layers on the composite path instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritonrnn.paths.composite import elman_composite, gradients, is_batched, why_composite


def is_differentiated_once(input: Tensor) -> bool:
    """Return whether torch's kernels for this input have a backward pass that has none itself."""
    return input.is_cuda


def forward(
    input: Tensor,
    hx: Tensor | None,
    layers: Sequence[Sequence[Tensor]],
    seq_metadata: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    dropout: float = 0.0,
    B: Any = None,
) -> tuple[Tensor, Tensor]:
    """Run a stack of L layers. Its results can be differentiated as often as wanted.

    With a ``dropout``, once only where :func:`is_differentiated_once` is True: the kernels keep the
    masks to themselves.

    Args:
        input: ``[T, B, I]`` ("time_major"), ``[B, T, I]`` ("batch_major") or ``[N, I]`` ("packed").
        hx: ``[L * G, B, H]``, or None for zero.
        layers: each layer's weights, in the order of ``torch.nn.RNN``.
        seq_metadata: the batch_sizes of a packed input.
        layout, nonlinearity, bidirectional: as :func:`tritonrnn.ops.elman` takes them.
        dropout: the probability between layers, by masks of torch's own.
        B: the number of sequences, if it is known: to read it takes time.

    Returns:
        ``output``, shaped as the input with G * H features, and ``h_n``, shaped as ``hx``.
    """
    weights = layers[0] if len(layers) == 1 else [w for layer in layers for w in layer]
    if hx is None:
        G, H = 2 if bidirectional else 1, layers[0][1].shape[0]
        # Straight from the tensors: a tracer takes a layout's numbers for constants.
        if B is None and seq_metadata is not None:
            B = seq_metadata[0]
        elif B is None:
            B = input.shape[0 if layout == "batch_major" else 1]
        initial = input.new_zeros(len(layers) * G, B, H)
    else:
        initial = hx
    has_biases = len(layers[0]) == (8 if bidirectional else 4)
    # cuDNN can't differentiate what ran in evaluation mode. The mode changes the dropout only.
    train = dropout > 0 or torch.is_grad_enabled()
    settings = has_biases, len(layers), dropout, train, bidirectional
    run = torch.rnn_tanh if nonlinearity == "tanh" else torch.rnn_relu
    arguments: tuple[Any, ...] = input, initial, weights, *settings, layout == "batch_major"
    if seq_metadata is not None:
        arguments = input, seq_metadata, initial, weights, *settings
    if input.is_cuda:
        with _ignoring_scattered_weights():
            results = run(*arguments)
    else:
        results = run(*arguments)
    # torch found out whether any source requires a gradient.
    if not (results[0].requires_grad and is_differentiated_once(input) and dropout == 0):
        return results
    stack = functools.partial(
        _stack_composite, len(layers), seq_metadata, layout, nonlinearity, bidirectional
    )
    return _DoubleBackward.apply(stack, *results, input, hx, *weights)


def has_reserve(input: Tensor) -> bool:
    """Return whether torch takes kernels for this input that reserve memory for a backward pass."""
    if torch.version.hip is None:
        return torch.cudnn_is_acceptable(input)
    # As ATen's use_miopen has it, which can't be asked.
    is_known = input.is_cuda and input.dtype in (torch.float32, torch.float16)
    return is_known and input.numel() > 0 and torch.backends.cudnn.enabled


def forward_with_reserve(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *settings: Any,
    num_layers: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a stack of layers where :func:`has_reserve`, without a graph.

    Takes the arguments of :func:`tritonrnn.ops.elman`, but no reset and no back end, and of
    ``num_layers`` the weights and initial states one after the other.

    Returns:
        ``output``, ``h_n``, the reserve, and the buffer in which the kernels have the weights.
    """
    arguments, is_transposed = _arguments(input, hx, weights, num_layers, *settings)
    # Not by torch.ops, which hands no warning to Python: it would be printed, or raised later.
    run: Any = torch._cudnn_rnn if torch.version.hip is None else torch.miopen_rnn
    if torch.version.hip is None:
        arguments["weight_buf"] = None
    with _ignoring_scattered_weights():
        output, h_n, _, reserve, weight_buf = run(**arguments)
    if is_transposed:
        output = output.transpose(0, 1).contiguous()
    return output, h_n, reserve, weight_buf


def backward_with_reserve(
    cotangents: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    needs: Sequence[bool],
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *settings: Any,
    num_layers: int = 1,
) -> list[Tensor]:
    """Differentiate :func:`forward_with_reserve`.

    Args:
        cotangents: of ``output`` and ``h_n``, not both None.
        kept: ``output``, the reserve and the buffer of the weights.
        needs: for ``input``, ``hx`` and each of ``weights`` whether its gradient is wanted.
        input, hx, weights, settings, num_layers: as given to :func:`forward_with_reserve`.

    Returns:
        The gradients that are wanted.
    """
    arguments, is_transposed = _arguments(input, hx, weights, num_layers, *settings)
    (grad_output, grad_h_n), (output, reserve, weight_buf) = cotangents, kept
    if is_transposed:
        output = output.transpose(0, 1)
        grad_output = None if grad_output is None else grad_output.transpose(0, 1)
    if torch.version.hip is None:
        run = torch.ops.aten._cudnn_rnn_backward
    else:
        run = torch.ops.aten.miopen_rnn_backward
    grad_input, grad_hx, _, grads = run(
        **arguments,
        weight_buf=weight_buf,
        output=output.contiguous(),
        grad_output=grad_output,
        grad_hy=grad_h_n,
        grad_cy=None,
        # The kernels overwrite it, and a graph that is retained needs it again.
        reserve=reserve.clone(),
        output_mask=[needs[0], needs[1], False, any(needs[2:])],
    )
    if is_transposed and needs[0]:
        grad_input = grad_input.transpose(0, 1).contiguous()
    # Gradients of weights that are not wanted may be missing.
    found = [grad_input, grad_hx, *(grads or [None] * len(weights))]
    return [grad for grad, need in zip(found, needs) if need]


def _arguments(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    seq_metadata: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[dict[str, Any], bool]:
    """Return what both passes of the kernels take, and whether the input was transposed for it."""
    groups, H = num_layers * (2 if bidirectional else 1), weights[1].shape[0]
    is_transposed = layout == "batch_major"
    if is_transposed:
        input = input.transpose(0, 1)
    batch_sizes = [] if seq_metadata is None else seq_metadata.tolist()
    if hx is None:
        hx = input.new_zeros(groups, batch_sizes[0] if batch_sizes else input.shape[1], H)
    arguments = {
        "input": input,
        "weight": list(weights),
        "weight_stride0": len(weights) // groups,
        "hx": hx.contiguous(),
        "cx": None,
        "mode": ["relu", "tanh"].index(nonlinearity),
        "hidden_size": H,
        "num_layers": num_layers,
        "batch_first": False,
        "dropout": 0.0,
        "train": True,
        "bidirectional": bidirectional,
        "batch_sizes": batch_sizes,
        "dropout_state": None,
    }
    if torch.version.hip is None:
        arguments["proj_size"] = 0
    return arguments, is_transposed


@contextmanager
def _ignoring_scattered_weights() -> Iterator[None]:
    """Silence cuDNN's warning that it copies weights which do not lie in one buffer.

    Where the weights lie is their owner's choice.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        yield


class _DoubleBackward(torch.autograd.Function):
    """Pass on the results of kernels whose own backward pass can be differentiated no further.

    A plain backward pass goes through to the kernels. Where that is to be differentiated itself,
    the kernels get no gradient, and the sources get theirs from the composite path instead.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.stack, output, h_n, *sources = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sources)
        # Detached, because a view of an input could not be changed in place. It shares its version
        # counter, so that the kernels' backward pass notices such a change.
        return output.detach(), h_n.detach()

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, *_ = sources = ctx.saved_tensors
        cotangents = grad_output, grad_h_n
        composite = torch.is_grad_enabled() or why_composite(input.dtype) or is_batched(cotangents)
        if not composite or (grad_output is None and grad_h_n is None):
            return (None, *cotangents, *[None] * len(sources))
        needs = ctx.needs_input_grad[3:]
        found = iter(gradients(ctx.stack, sources, needs, cotangents))
        return (*[None] * 3, *[next(found) if need else None for need in needs])


def _stack_composite(
    num_layers: int,
    seq_metadata: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    data: Tensor,
    hx: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the same layers on the composite path."""
    each = len(weights) // num_layers
    states = [None] * num_layers if hx is None else hx.chunk(num_layers)
    finals = []
    for index, h_0 in enumerate(states):
        layer = weights[index * each : (index + 1) * each]
        data, h_n = elman_composite(
            data, h_0, layer, seq_metadata, None, layout, nonlinearity, bidirectional
        )
        finals.append(h_n)
    return data, torch.cat(finals)
