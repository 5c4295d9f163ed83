"""Translate exported programs to ONNX: a layer becomes ONNX's RNN operator.

Needs ``tritonrnn[onnx]``. ``import tritonrnn`` alone loads neither this module nor onnxscript.
Import it by name::

    import tritonrnn.onnx

    program = torch.export.export(model, (x,), dynamic_shapes=({0: "steps", 1: "batch"},))
    torch.onnx.export(
        program,
        f="model.onnx",
        dynamo=True,
        custom_translation_table=tritonrnn.onnx.translation_table(),
    )

A model itself is exported without the table: ``torch.onnx.export(model, (x,), "model.onnx")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir, opset18

from tritonrnn.layer import split_weights

# The stubs of opset18 demand tensors where it takes Python numbers too.
op: Any = opset18

_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the ``custom_translation_table`` for ``torch.onnx.export(dynamo=True)``.

    A layer with all its directions becomes one node of
    https://onnx.ai/onnx/operators/onnx__RNN.html. A padded input, time or batch first, needs no
    other nodes but transpositions; steps and batch may be dynamic, and ``lengths`` become the
    node's ``sequence_lens``. A model may also make a ``PackedSequence`` of its arguments (data and
    batch_sizes). It is padded for the node, with ``sequence_lens``, and packed again.

    ONNX's RNN computes in float16, float32 and float64, but onnxruntime 1.32 on a CPU not in
    float64.

    Returns:
        The translating functions, by operator.

    Raises:
        torch.onnx.errors.OnnxExporterError: from the export, with the reason, if the node can't
            compute a layer.
    """
    return {torch.ops.tritonrnn.elman.with_reserve: _elman}


# The exporter reads the annotations: a number or a string is an attribute of the node, anything
# else an input.
def _elman(
    input: Any,
    hx: Any,
    weights: Any,
    seq_metadata: Any,
    reset: Any,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs_grad: bool,
) -> tuple[Any, Any]:
    """Translate :func:`tritonrnn.ops.elman`. The reserve is left out: no node reads it."""
    if input.dtype not in _DTYPES:
        raise NotImplementedError(
            f"ONNX's RNN computes in float16, float32 and float64, not in {input.dtype}"
        )
    if reset is not None:
        raise NotImplementedError("ONNX's RNN has no reset: export the model without one")
    groups = split_weights(weights, bidirectional)
    biases = [op.Concat(g.b_ih, g.b_hh, axis=0) for g in groups if g.b_ih is not None]
    operands = (
        _stack([group.w_ih for group in groups]),
        _stack([group.w_hh for group in groups]),
        _stack(biases) if biases else None,
    )
    settings = {
        "hidden_size": weights[1].shape[0],
        "direction": "bidirectional" if bidirectional else "forward",
        "activations": ["Tanh" if nonlinearity == "tanh" else "Relu"] * len(groups),
    }
    if layout in ("time_major", "batch_major"):
        lengths = None if seq_metadata is None else op.Cast(seq_metadata, to=ir.DataType.INT32)
    if layout == "time_major":
        output, h_n = op.RNN(input, *operands, lengths, hx, **settings)
        return _merge_groups(output), h_n
    if layout == "batch_major":
        # The node's own attribute `layout` is unknown to onnxruntime.
        time_major = op.Transpose(input, perm=[1, 0, 2])
        output, h_n = op.RNN(time_major, *operands, lengths, hx, **settings)
        return op.Transpose(_merge_groups(output), perm=[1, 0, 2]), h_n
    if layout == "packed":
        rows, live = _packed_rows(seq_metadata)
        lengths = op.ReduceSum(op.Cast(live, to=ir.DataType.INT32), [0], keepdims=False)
        output, h_n = op.RNN(op.Gather(input, rows), *operands, lengths, hx, **settings)
        # In the order of [T, B], the live tokens are the rows of the packed data.
        padded = op.Reshape(_merge_groups(output), [-1, len(groups) * settings["hidden_size"]])
        return op.Compress(padded, op.Reshape(live, [-1]), axis=0), h_n
    raise NotImplementedError(f"ONNX's RNN takes no input whose layout is {layout!r}")


def _stack(tensors: Sequence[Any]) -> Any:
    return op.Concat(*(op.Unsqueeze(tensor, [0]) for tensor in tensors), axis=0)


def _merge_groups(output: Any) -> Any:
    """Return ``[T, B, G * H]`` from the node's ``[T, G, B, H]``."""
    return op.Reshape(op.Transpose(output, perm=[0, 2, 1, 3]), [0, 0, -1])


def _packed_rows(batch_sizes: Any) -> tuple[Any, Any]:
    """Return each token's row in the packed data, ``[T, B]``, and whether there is such a token.

    Where there is none, the row is 0, which always exists.
    """
    count = op.Unsqueeze(batch_sizes, [1])
    b = op.Range(0, op.Squeeze(op.Slice(batch_sizes, [0], [1]), [0]), 1)
    before = op.CumSum(count, 0, exclusive=1)
    live = op.Less(b, count)
    return op.Where(live, op.Add(before, b), 0), live
