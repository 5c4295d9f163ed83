"""Export to ONNX: a layer becomes the standard operator RNN. Needs ``tritonrnn[onnx]``.

Import it by name, as ``import tritonrnn`` alone loads neither this nor onnxscript::

    import tritonrnn.onnx

    torch.onnx.export(
        model,
        (x,),
        "model.onnx",
        dynamo=True,
        dynamic_shapes=({0: "steps", 1: "batch"},),
        custom_translation_table=tritonrnn.onnx.translation_table(),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir, opset18

from tritonrnn.layer import split_weights

# Its stubs want tensors where it takes numbers.
op: Any = opset18

_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export(dynamo=True)`` takes as its ``custom_translation_table``.

    A layer becomes one node of https://onnx.ai/onnx/operators/onnx__RNN.html, all its directions
    in it. An input that is padded, time or batch first, needs no other node but transpositions,
    and steps and batch may be dynamic; its ``lengths`` are the node's ``sequence_lens``. A
    ``PackedSequence`` that the model makes of its arguments (its data and its batch_sizes) is
    padded for the node, whose ``sequence_lens`` keep out what was added, and packed again.

    ONNX's RNN computes in float16, float32 and float64; onnxruntime 1.32, on a CPU, not in float64.
    For what the operator can't compute, the export fails with a
    ``torch.onnx.errors.OnnxExporterError`` that says what that was.

    Returns:
        The functions that translate, by operator.
    """
    return {torch.ops.tritonrnn.elman.default: _elman}


# Annotated for the exporter, which takes what is annotated as a number or a string for an
# attribute of the node, and anything else for an input of it.
def _elman(
    input: Any,
    hx: Any,
    weights: Any,
    extents: Any,
    reset: Any,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
) -> tuple[Any, Any]:
    """Translate :func:`tritonrnn.ops.elman`."""
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
        lengths = None if extents is None else op.Cast(extents, to=ir.DataType.INT32)
    if layout == "time_major":
        output, h_n = op.RNN(input, *operands, lengths, hx, **settings)
        return _joined(output), h_n
    if layout == "batch_major":
        # Not by the node's own attribute `layout`, which onnxruntime does not know.
        time_major = op.Transpose(input, perm=[1, 0, 2])
        output, h_n = op.RNN(time_major, *operands, lengths, hx, **settings)
        return op.Transpose(_joined(output), perm=[1, 0, 2]), h_n
    if layout == "packed":
        rows, live = _packed_rows(extents)
        lengths = op.ReduceSum(op.Cast(live, to=ir.DataType.INT32), [0], keepdims=False)
        output, h_n = op.RNN(op.Gather(input, rows), *operands, lengths, hx, **settings)
        # Of [T, B], in that order, the live ones are the rows of what is packed.
        everywhere = op.Reshape(_joined(output), [-1, len(groups) * settings["hidden_size"]])
        return op.Compress(everywhere, op.Reshape(live, [-1]), axis=0), h_n
    raise NotImplementedError(f"ONNX's RNN takes no input whose layout is {layout!r}")


def _stack(tensors: Sequence[Any]) -> Any:
    return op.Concat(*(op.Unsqueeze(tensor, [0]) for tensor in tensors), axis=0)


def _joined(output: Any) -> Any:
    """``[T, B, G * H]`` of the node's ``[T, G, B, H]``."""
    return op.Reshape(op.Transpose(output, perm=[0, 2, 1, 3]), [0, 0, -1])


def _packed_rows(batch_sizes: Any) -> tuple[Any, Any]:
    """For every step and sequence, ``[T, B]``: its row in the packed data, and whether it has one.

    Row 0, which there is, stands for a row that there isn't.
    """
    count = op.Unsqueeze(batch_sizes, [1])
    b = op.Range(0, op.Squeeze(op.Slice(batch_sizes, [0], [1]), [0]), 1)
    before = op.CumSum(count, 0, exclusive=1)
    live = op.Less(b, count)
    return op.Where(live, op.Add(before, b), 0), live
