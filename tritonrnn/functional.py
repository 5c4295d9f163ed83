"""The stateless form: run the layers, drop out between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tritonrnn import ops, twice
from tritonrnn.call import Call, check, compute_dtype
from tritonrnn.dispatch import choose
from tritonrnn.nested import like_jagged


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
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
        bidirectional: whether a second direction walks from the last step to the first.
        batch_first: whether B comes first in ``input`` and ``output``. Never in ``hx`` and
            ``h_n``, and not in an unbatched or packed input.
        dropout: the probability with which an output of a layer, but the last, is zeroed.
        training: whether ``dropout`` is applied.
        lengths: of a padded batch, how many tokens each sequence has, ``(B,)``, integers from 0
            to T, in any order and on any device. What lies behind them is not read, not even
            NaN, and the output is 0 there; ``h_n`` is the state after each sequence's own last
            token, or ``hx`` where it has none. None means T for all. On a GPU, lengths that lie
            there are not waited for: the next call that waits for the device raises if one is
            out of range.
        reset: of a padded batch, where a sequence starts anew, bool, ``(T, B)``, or ``(B, T)`` if
            ``batch_first``, or ``(T,)`` if unbatched. No state crosses from the step before into
            a step that is marked: its walk starts from 0 there, and at step 0 drops ``hx``. A
            second direction, which comes from the other side, starts from 0 at the step before.
            Read on the host, so that on a GPU the call waits for it.

    Returns:
        ``output``, the last layer's state at every step, shaped as the input with D * H features
        (a ``PackedSequence`` or nested if the input is), and ``h_n``, every layer's and
        direction's state after its walk, shaped as ``hx``.

    Raises:
        ValueError: the input is neither 2-D nor 3-D, or of another dtype than the weights;
            ``nonlinearity`` or ``dropout`` is out of range; a weight, ``lengths`` or ``reset``
            has the wrong shape, or ``lengths`` numbers outside 0 to T; either is given with an
            input that is not padded; or a nested input is not jagged in its second dimension, or
            has holes.
        TypeError: ``lengths`` or ``reset`` is no tensor of integers, or of bool.
        IndexError: a ``PackedSequence`` holds no step.
        RuntimeError: the input has no step, or not I features; ``batch_sizes`` don't describe the
            packed rows; ``hx`` has the wrong shape or dtype; tensors lie on different devices;
            ``torch.func.vmap`` maps over ``lengths`` or ``reset``; or the back end that was asked
            for (see :func:`tritonrnn.backend`) can't serve the call.
    """
    call = check(
        input,
        hx,
        weights,
        nonlinearity,
        num_layers,
        bidirectional,
        batch_first,
        dropout,
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
    return data, h_n


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


def _step(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    dtype = compute_dtype(input)
    B, H = len(input), len(w_hh)
    choice = choose(input.device, dtype, T=1, B=B, G=1, H=H, nonlinearity=nonlinearity)
    if choice.backend == "torch" and choice.plan != "recorded":
        # One step has no walk to save: torch's own kernel is the torch path.
        step = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
        return step(input, input.new_zeros(B, H) if hx is None else hx, w_ih, w_hh, b_ih, b_hh)
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    hx = None if hx is None else hx.unsqueeze(0)
    output, _ = rnn(input.unsqueeze(0), hx, weights, nonlinearity=nonlinearity)
    assert isinstance(output, Tensor)
    return output.squeeze(0)


def _run(call: Call, dropout: float) -> tuple[Tensor, Tensor]:
    data, hx, layers = call.data, call.hx, call.weights
    if hx is not None and call.order is not None:
        hx = hx.index_select(1, call.order)
    if hx is not None and call.reset is not None:
        hx = _reset_at_first_step(hx, call)
    if torch._C._is_any_autocast_enabled():
        data = data.to(call.dtype)
        hx = None if hx is None else hx.to(call.dtype)
        layers = [[weight.to(call.dtype) for weight in layer] for layer in layers]
    plan = call.choice.plan
    settings = call.layout, call.nonlinearity, call.bidirectional
    # Masks that only torch's kernels know can't be applied again for a second derivative. Where
    # one takes that, each layer runs alone, in training or not, for a checkpoint to repeat them.
    alone = dropout > 0 and twice.is_differentiated_once(data)
    if plan == "native" and not alone:
        return twice.forward(data, hx, layers, call.extents, *settings, dropout)
    D = 2 if call.bidirectional else 1
    finals = []
    for index, weights in enumerate(layers):
        h_0 = None if hx is None else hx[index * D : (index + 1) * D]
        if plan == "native":
            data, h_n = twice.forward(data, h_0, [weights], call.extents, *settings)
        else:
            data, h_n = (ops.elman_recorded if plan == "recorded" else ops.elman)(
                data, h_0, weights, call.extents, call.reset, *settings, call.choice.backend
            )
        if dropout > 0 and index + 1 < len(layers):
            data = _dropout(data, dropout, call.layout)
        finals.append(h_n)
    return data, finals[0] if len(finals) == 1 else torch.cat(finals)


def _dropout(data: Tensor, p: float, layout: str) -> Tensor:
    if layout != "batch_major" or data.device.type != "cpu" or p == 1:
        return torch.nn.functional.dropout(data, p)
    # torch draws its mask step by step, whatever the input's layout: so does this, for the same
    # seed to drop the same units.
    in_steps = data.transpose(0, 1)
    noise = torch.empty_like(in_steps, memory_format=torch.contiguous_format)
    return (in_steps * noise.bernoulli_(1 - p).div_(1 - p)).transpose(0, 1)


def _reset_at_first_step(hx: Tensor, call: Call) -> Tensor:
    """``hx`` with zeros where the first direction starts anew at step 0."""
    assert call.reset is not None
    dropped = call.reset[0] if call.layout == "time_major" else call.reset[:, 0]
    if call.extents is not None:
        # Where there is no step, none is marked.
        dropped = dropped & (call.extents.to(dropped.device) > 0)
    dropped = dropped.to(hx.device)[:, None]
    if not call.bidirectional:
        return hx.masked_fill(dropped, 0)
    forward, backward = hx[::2].masked_fill(dropped, 0), hx[1::2]
    return torch.stack([forward, backward], 1).flatten(0, 1)
