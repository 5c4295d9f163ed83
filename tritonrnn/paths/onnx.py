"""A layer as ONNX's standard RNN operator, while ``torch.onnx.export`` traces a model.

The operator's inputs and results are described at
https://onnx.ai/onnx/operators/onnx__RNN.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonrnn.layer import split_weights


def is_exporting() -> bool:
    """Return whether ``torch.onnx.export`` is at work, by either of its exporters."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def serves(dtype: torch.dtype, layout: str, reset: Tensor | None) -> bool:
    """Return whether ONNX's operator can serve a layer."""
    known = (torch.float16, torch.float32, torch.float64)
    return dtype in known and layout != "jagged" and reset is None


def forward(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    seq_metadata: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Record what :func:`tritonrnn.ops.elman` does, if :func:`serves`. Take its arguments.

    The results have the right shapes, but no values.
    """
    if layout == "packed":
        assert seq_metadata is not None
        return _forward_packed(input, hx, weights, seq_metadata, nonlinearity, bidirectional)
    if layout == "batch_major":
        # The node's own attribute `layout` is unknown to onnxruntime.
        input = input.transpose(0, 1)
    output, h_n = _node(input, hx, weights, seq_metadata, nonlinearity, bidirectional)
    return output.transpose(0, 1) if layout == "batch_major" else output, h_n


def _forward_packed(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Pad the rows for the node, and pack its output again."""
    B = batch_sizes[0].item() if hx is None else hx.shape[1]
    starts = batch_sizes.cumsum(0) - batch_sizes
    b = torch.arange(B)
    live = b < batch_sizes[:, None]
    # Where there is no token any row will do, and row 0 exists.
    padded = input[torch.where(live, starts[:, None] + b, 0)]
    output, h_n = _node(padded, hx, weights, live.sum(0), nonlinearity, bidirectional)
    row = torch.arange(input.shape[0])
    t = (row[:, None] >= starts).sum(1) - 1
    return output[t, row - starts[t]], h_n


def _node(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``[T, B, G * H]`` and ``[G, B, H]`` of an input ``[T, B, I]``."""
    groups = split_weights(weights, bidirectional)
    biases = [
        torch.cat([g.b_ih, g.b_hh]) for g in groups if g.b_ih is not None and g.b_hh is not None
    ]
    T, B, G, H = *input.shape[:2], len(groups), weights[1].shape[0]
    output, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (
            input,
            torch.stack([group.w_ih for group in groups]),
            torch.stack([group.w_hh for group in groups]),
            torch.stack(biases) if biases else None,
            None if lengths is None else lengths.to(torch.int32),
            hx,
        ),
        {
            "hidden_size": H,
            "direction": "bidirectional" if bidirectional else "forward",
            "activations": ["Tanh" if nonlinearity == "tanh" else "Relu"] * G,
        },
        dtypes=(input.dtype, input.dtype),
        shapes=((T, G, B, H), (G, B, H)),
    )
    return output.transpose(1, 2).flatten(2), h_n
