"""Layers in torch's own kernels: on CUDA cuDNN's, on ROCm MIOpen's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tritonrnn.ragged import layout_of


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
    """Run a stack of L layers.

    Args:
        input: ``[T, B, I]`` ("time_major"), ``[B, T, I]`` ("batch_major") or ``[N, I]`` ("packed").
        hx: ``[L * G, B, H]``, or None for zero.
        layers: each layer's weights, in the order of ``torch.nn.RNN``.
        extents: a packed input's batch_sizes.
        layout, nonlinearity, bidirectional: as :func:`tritonrnn.ops.elman` takes them.
        dropout: between layers, by masks of torch's own.

    Returns:
        ``output``, shaped as the input with G * H features, and ``h_n``, shaped as ``hx``.
    """
    run = torch.rnn_tanh if nonlinearity == "tanh" else torch.rnn_relu
    weights = [weight for layer in layers for weight in layer]
    G = 2 if bidirectional else 1
    if hx is None:
        B = layout_of(layout, input.shape[:-1], extents, None).B
        hx = input.new_zeros(len(layers) * G, B, layers[0][1].shape[0])
    has_biases = len(layers[0]) == 4 * G
    # cuDNN can't differentiate what ran in evaluation mode, which differs by the dropout only.
    settings = (has_biases, len(layers), dropout, dropout > 0 or torch.is_grad_enabled())
    with _wherever_weights_lie(input):
        if extents is not None:
            return run(input, extents, hx, weights, *settings, bidirectional)
        return run(input, hx, weights, *settings, bidirectional, layout == "batch_major")


@contextmanager
def _wherever_weights_lie(input: Tensor) -> Iterator[None]:
    """Silence cuDNN, which copies weights that do not lie in one buffer of its own and warns.

    Where they lie is their owner's to say.
    """
    if not input.is_cuda:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        yield
