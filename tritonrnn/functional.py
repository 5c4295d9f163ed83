"""The stateless form of the modules: all layers, with dropout between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from tritonrnn import ops
from tritonrnn.dispatch import current_backend
from tritonrnn.nested import like_jagged
from tritonrnn.paths import aten, onnx
from tritonrnn.paths.composite import elman_composite
from tritonrnn.validation import Call, check


@overload
def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def rnn(
    input: PackedSequence,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[PackedSequence, Tensor]: ...


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Run a multi-layer Elman RNN over whole sequences, ``torch.nn.RNN`` without its module.

        h_t = φ(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)    (Elman 1990; torch.nn.RNN)

    T is the number of steps, B of sequences, I the input size, H the number of hidden units, L of
    layers, and D of directions, 2 if ``bidirectional`` and else 1.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)`` for one unbatched
            sequence, a ``PackedSequence``, or a nested tensor of layout ``torch.jagged``, B
            sequences of ``(length, I)``. Of the weights' dtype, except under autocast.
        hx: the initial states, ``(L * D, B, H)``, or ``(L * D, H)`` if unbatched; for a
            ``PackedSequence`` in the order that its sequences had before they were sorted. None
            means zero.
        weights: for each layer, and in it for each direction, ``w_ih (H, I)`` (``(H, D * H)``
            above the first layer), ``w_hh (H, H)`` and, for all or for none, ``b_ih (H,)`` and
            ``b_hh (H,)``: the order of ``torch.nn.RNN``'s parameters.
        nonlinearity: φ, "tanh" or "relu".
        num_layers: L.
        bidirectional: whether a second direction goes from the last step to the first.
        batch_first: whether B comes first in ``input`` and ``output``. It never does in ``hx`` and
            ``h_n``, nor in an unbatched or packed input.
        dropout: the probability with which an output of a layer, but the last, is zeroed.
        training: whether ``dropout`` is applied.
        lengths: of a padded batch, how many tokens each sequence has, ``(B,)``, integers from 0
            to T, in any order and on any device. The steps after them are not read, so that they
            may hold NaN, and the output is 0 there; ``h_n`` is the state after each sequence's own
            last token, or ``hx`` where it has none. None means T for all. The call does not wait
            for lengths on a GPU: if one is out of range, the next call that waits for the device
            raises.
        reset: of a padded batch, where a sequence starts anew, bool, ``(T, B)``, or ``(B, T)`` if
            ``batch_first``, or ``(T,)`` if unbatched. A marked step starts from a state of 0
            instead of the step before; step 0 starts from 0 instead of ``hx``. The second
            direction comes from the other side, so that the step before a marked one starts from
            0. It is read on the host: a call waits for a ``reset`` that is on a GPU, as it does for
            the offsets of a nested input.

    What describes the sequences, ``lengths``, ``reset``, ``batch_sizes`` and offsets, is taken at
    the call: its memory may be written to before the backward pass.

    Returns:
        ``output``, the last layer's state at every step, shaped as the input with D * H features
        (a ``PackedSequence`` or nested if the input is, else contiguous), and ``h_n``, every
        layer's and direction's last state, shaped as ``hx``.

    Raises:
        ValueError: the input is neither 2-D nor 3-D, or of another dtype than the weights;
            ``nonlinearity`` or ``dropout`` is out of range; a weight, ``lengths`` or ``reset``
            has the wrong shape; ``lengths`` has a value outside 0 to T; ``lengths`` or ``reset``
            is given with an input that is not padded; or a nested input is not jagged in its
            second dimension, or has holes.
        TypeError: ``lengths`` or ``reset`` is no tensor of integers, or of bool.
        IndexError: a ``PackedSequence`` holds no step.
        RuntimeError: the input has no step, or not I features; ``batch_sizes`` don't describe the
            packed rows; ``hx`` has the wrong shape or dtype; tensors lie on different devices;
            ``torch.func.vmap`` maps over ``lengths`` or ``reset``; or the back end that was asked
            for (see :func:`tritonrnn.backend`) can't serve the call.
    """
    if isinstance(input, Proxy):
        settings = {
            "nonlinearity": nonlinearity,
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "batch_first": batch_first,
            "dropout": dropout,
            "training": training,
            "lengths": lengths,
            "reset": reset,
        }
        return input.tracer.create_proxy("call_function", rnn, (input, hx, weights), settings)
    call = check(
        input,
        hx,
        # Module.parameters() is no sequence.
        list(weights),
        nonlinearity,
        num_layers,
        bidirectional,
        batch_first,
        dropout,
        training,
        lengths,
        reset,
    )
    data, h_n = _run(call, dropout if training else 0.0)
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            h_n = h_n.index_select(1, input.unsorted_indices)
        # Built anew: a compiler knows the constructor, but not _replace.
        _, batch_sizes, sorted_indices, unsorted_indices = input
        return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), h_n
    if input.is_nested:
        return like_jagged(input, data), h_n
    if input.dim() == 2:
        return data.squeeze(1), h_n.squeeze(1)
    # torch's kernels leave a batch-first output in the order of steps, the others do not. A model
    # that takes a view of it must not depend on which of them served.
    return data.contiguous() if batch_first else data, h_n


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """Take one step of an Elman RNN, ``torch.nn.RNNCell`` without its module.

        h' = φ(x W_ihᵀ + b_ih + h W_hhᵀ + b_hh)

    Args:
        input: ``(B, I)``, or ``(I,)``.
        hx: ``(B, H)``, or ``(H,)`` if the input is 1-D; zero if None.
        w_ih, w_hh, b_ih, b_hh: ``(H, I)``, ``(H, H)``, and both or neither of ``(H,)``.
        nonlinearity: φ, "tanh" or "relu".

    Returns:
        The next state, shaped as ``hx``.

    Raises:
        ValueError: ``input`` or ``hx`` is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices disagree, or ``nonlinearity`` is unknown.
    """
    if isinstance(input, Proxy):
        given, settings = (input, hx, w_ih, w_hh, b_ih, b_hh), {"nonlinearity": nonlinearity}
        return input.tracer.create_proxy("call_function", rnn_cell, given, settings)
    if input.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    if input.dim() == 1:
        hx = None if hx is None else hx.unsqueeze(0)
        return _step(input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh, nonlinearity).squeeze(0)
    return _step(input, hx, w_ih, w_hh, b_ih, b_hh, nonlinearity)


def _is_torchs_cell() -> bool:
    """Return whether torch's own cell serves a step here.

    For one step it is as fast as any, and a compiler fuses its operations with what is around them.
    It serves whatever the back end is not forced to do otherwise, but has no rule for
    ``torch.func.vmap``.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or current_backend() != "triton"


def _step(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    # Not len(), which a tracer takes for a constant.
    h_0 = input.new_zeros(input.shape[0], w_hh.shape[0]) if hx is None else hx
    step = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
    if _is_torchs_cell():
        return step(input, h_0, w_ih, w_hh, b_ih, b_hh)
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    try:
        call = check(
            input.unsqueeze(0),
            None if hx is None else hx.unsqueeze(0),
            weights,
            nonlinearity,
            num_layers=1,
            bidirectional=False,
            batch_first=False,
            dropout=0.0,
            training=False,
            lengths=None,
            reset=None,
        )
    except (RuntimeError, ValueError):
        # What torch's own cell refuses too, it refuses in the words that are expected of a cell.
        step(input, h_0, w_ih, w_hh, b_ih, b_hh)
        raise
    output, _ = _run(call, 0.0)
    return output.squeeze(0)


def _run(call: Call, dropout: float) -> tuple[Tensor, Tensor]:
    """Run all layers on the path that was chosen."""
    is_aten = call.choice.plan == "aten"
    if is_aten and call.seq_metadata is not None and call.layout != "packed":
        return _run_with_lengths(call, dropout)
    data, hx, layers = _prepared(call)
    # A second derivative runs the layers again, with the same masks, which cuDNN keeps to itself.
    # So each layer runs alone there, with masks of torch's. It does so without a graph as well, for
    # a checkpoint to draw the same masks when it runs the layers again.
    alone = dropout > 0 and aten.is_differentiated_once(data)
    if is_aten and not alone:
        return aten.forward(
            data,
            hx,
            layers,
            call.seq_metadata,
            call.layout,
            call.nonlinearity,
            call.bidirectional,
            dropout,
            call.B,
        )
    D = 2 if call.bidirectional else 1
    finals = []
    for index, weights in enumerate(layers):
        h_0 = None if hx is None else hx[index * D : (index + 1) * D]
        data, h_n = _run_layer(call, data, h_0, weights)
        if dropout > 0 and index + 1 < len(layers):
            data = _dropout(data, dropout, call.layout)
        finals.append(h_n)
    return data, finals[0] if len(finals) == 1 else torch.cat(finals)


def _run_with_lengths(call: Call, dropout: float) -> tuple[Tensor, Tensor]:
    """Run a padded batch with lengths on torch's kernels."""
    assert call.seq_metadata is not None
    is_single_step = call.data.shape[1 if call.layout == "batch_major" else 0] == 1
    # Of one step, each sequence has it or none: no need to wait for lengths on a GPU.
    if not is_single_step and bool(call.seq_metadata.all()):
        return _run_packed(call, dropout)
    # A sequence without a token gets one, of zeros like its hx, and what comes of that is dropped.
    absent = (call.seq_metadata.to(call.data.device) == 0)[:, None]
    rows = absent if call.layout == "time_major" else absent[:, None]
    alive = call._replace(
        data=call.data.masked_fill(rows, 0),
        hx=None if call.hx is None else call.hx.masked_fill(absent, 0),
        seq_metadata=None if is_single_step else call.seq_metadata.clamp(min=1),
    )
    output, h_n = _run(alive, dropout)
    h_0 = h_n.new_zeros(()) if call.hx is None else call.hx.to(h_n.dtype)
    return output.masked_fill(rows, 0), torch.where(absent, h_0, h_n)


def _run_packed(call: Call, dropout: float) -> tuple[Tensor, Tensor]:
    """Run a padded batch on the CPU, each sequence of which has a token, in packed form."""
    assert call.seq_metadata is not None
    batch_first = call.layout == "batch_major"
    b = 0 if batch_first else 1
    lengths, order = call.seq_metadata.long().sort(descending=True)
    rows, batch_sizes = torch._pack_padded_sequence(
        call.data.index_select(b, order), lengths, batch_first
    )
    packed = call._replace(data=rows, order=order, seq_metadata=batch_sizes, layout="packed")
    rows, h_n = _run(packed, dropout)
    T = call.data.shape[1 - b]
    output, _ = torch._pad_packed_sequence(rows, batch_sizes, batch_first, 0.0, T)
    given = order.argsort()
    return output.index_select(b, given), h_n.index_select(1, given)


def _prepared(call: Call) -> tuple[Tensor, Tensor | None, Sequence[Sequence[Tensor]]]:
    """Return the input, hx in the input's order and the weights, all cast under autocast."""
    data, hx, layers = call.data, call.hx, call.weights
    if hx is not None and call.order is not None:
        hx = hx.index_select(1, call.order)
    if hx is not None and call.reset is not None:
        hx = _reset_at_first_step(hx, call)
    if torch._C._is_any_autocast_enabled():
        data = data.to(call.dtype)
        hx = None if hx is None else hx.to(call.dtype)
        layers = [[weight.to(call.dtype) for weight in layer] for layer in layers]
    return data, hx, layers


def _run_layer(
    call: Call, data: Tensor, h_0: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    settings = call.layout, call.nonlinearity, call.bidirectional
    if call.choice.plan == "aten":
        return aten.forward(data, h_0, [weights], call.seq_metadata, *settings)
    sources = data, h_0, weights, call.seq_metadata, call.reset
    if call.choice.plan == "composite":
        return elman_composite(*sources, *settings)
    if call.choice.backend == "auto" and onnx.is_exporting():
        if onnx.serves(call.dtype, call.layout, call.reset):
            return onnx.forward(data, h_0, weights, call.seq_metadata, *settings)
        if call.seq_metadata is None and call.reset is None:
            # In another dtype, as torch.nn.RNN is exported: step by step.
            return aten.forward(data, h_0, [weights], None, *settings)
    return ops.elman(*sources, *settings, call.choice.operator_backend)


def _dropout(data: Tensor, p: float, layout: str) -> Tensor:
    if layout != "batch_major" or data.device.type != "cpu" or p == 1:
        return torch.nn.functional.dropout(data, p)
    # torch draws its masks in the order of steps, whatever the input's layout. So does this, for
    # the same seed to drop the same units.
    in_steps = data.transpose(0, 1)
    noise = torch.empty_like(in_steps, memory_format=torch.contiguous_format)
    return (in_steps * noise.bernoulli_(1 - p).div_(1 - p)).transpose(0, 1)


def _reset_at_first_step(hx: Tensor, call: Call) -> Tensor:
    """Return ``hx`` with zeros where the first direction starts anew at step 0."""
    assert call.reset is not None
    dropped = call.reset[0] if call.layout == "time_major" else call.reset[:, 0]
    if call.seq_metadata is not None:
        # A sequence without a token has no step 0 that could be marked.
        dropped = dropped & (call.seq_metadata.to(dropped.device) > 0)
    dropped = dropped.to(hx.device)[:, None]
    if call.bidirectional:
        directions = torch.stack([dropped, torch.zeros_like(dropped)])
        dropped = directions.repeat(len(call.weights), 1, 1)
    return hx.masked_fill(dropped, 0)
