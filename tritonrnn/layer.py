"""One layer, forward and backward: the matrix products around the recurrence.

What needs each token once is a product over all tokens. Only the recurrence goes step by step:
each back end has its own, and this code runs around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout

# Of a back end; :func:`tritonrnn.paths.inplace.recurrence` says what it does.
Recurrence: TypeAlias = Callable[..., None]


class GroupWeights(NamedTuple):
    """The parameters of one direction. The biases are None if the layer has none."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None


def split_weights(weights: Sequence[Tensor], bidirectional: bool) -> list[GroupWeights]:
    """Return the weights of each direction from a layer's flat list in ``torch.nn.RNN``'s order."""
    each = len(weights) // 2 if bidirectional else len(weights)
    return [GroupWeights(*weights[i : i + each]) for i in range(0, len(weights), each)]


def forward(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    layout: SequenceLayout,
    nonlinearity: str,
    bidirectional: bool,
    recurrence: Recurrence,
) -> tuple[Tensor, Tensor]:
    """Run one layer, all its directions.

        output_t = φ(W_ih input_t + b_ih + W_hh output_{t-1} + b_hh)    (Elman 1990; torch.nn.RNN)

    Args:
        input: ``[N, I]``.
        hx: ``[G, B, H]``, or None for zero; B counts the sequences of ``layout.parent``.
        weights: ``w_ih [H, I], w_hh [H, H]`` and optionally ``b_ih [H], b_hh [H]``; then the same
            for the second direction, which walks from the last token to the first.
        layout: where the N rows lie. Padding rows are not read, and their output is 0.
        nonlinearity: φ, "tanh" or "relu".
        bidirectional: whether there is a second direction, G = 2.
        recurrence: the back end's.

    Returns:
        ``output [N, G * H]``, and ``h_n [G, B, H]``, the last state of each sequence, which is hx
        where a sequence has no token.
    """
    groups = split_weights(weights, bidirectional)
    M = _stack([group.w_hh for group in groups])
    # The drive. The walk overwrites it with the output.
    output = _drive(input, groups)
    _clear_padding(output, layout)
    directions = _directions(groups)
    v_0 = None
    if hx is not None:
        v_0 = layout.initial_states(_accurate(hx) @ _accurate(M).mT, directions)
    recurrence(output, v_0, M, None, layout, epilogue=nonlinearity, reverse=directions)
    # torch.stack copies: h_n may not be a view of the output.
    h_n = torch.stack(
        [
            final_state(columns, layout.parent, backwards, None if hx is None else hx[g])
            for g, (columns, backwards) in enumerate(zip(output.chunk(len(groups), 1), directions))
        ]
    )
    return output, h_n


def backward(
    dz: Tensor,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    layout: SequenceLayout,
    nonlinearity: str,
    bidirectional: bool,
    recurrence: Recurrence,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate :func:`forward`.

    The gradient ``dz_t`` of the pre-activation is the same recurrence over ``weight_hh``
    transposed, from the other end. With it,

        d_input = dz W_ih,  d_hx = dz_first W_hh,  d_w_ih = Σ dzᵀ input,  d_b = Σ dz,
        d_w_hh = Σ dz_tᵀ output_{t-1}.

    Args:
        dz: the gradient of the output, ``[N, G * H]``. Overwritten.
        grad_h_n: ``[G, B, H]``, or None for zero.
        input, hx, weights, layout, nonlinearity, bidirectional: as given to :func:`forward`.
        output: what :func:`forward` returned.
        recurrence: the back end's.
        needs: for ``input``, ``hx`` (False if it is None) and each of ``weights`` whether its
            gradient is wanted.

    Returns:
        The gradients of ``input``, ``hx`` and each of ``weights``, None where not wanted. No two
        share storage.
    """
    groups = split_weights(weights, bidirectional)
    M = _stack([group.w_hh for group in groups])
    _clear_padding(dz, layout)
    directions = _directions(groups)
    back = tuple(not backwards for backwards in directions)
    v_0 = None
    if grad_h_n is not None:
        v_0 = layout.initial_states(_accurate(grad_h_n), back).contiguous()
    recurrence(dz, v_0, M.mT, output, layout, epilogue=f"{nonlinearity}_grad", reverse=back)
    dz_groups, output_groups = dz.chunk(len(groups), 1), output.chunk(len(groups), 1)
    grads = [
        dz @ _cat([group.w_ih for group in groups]) if needs[0] else None,
        _grad_hx(dz_groups, grad_h_n, M, layout) if needs[1] else None,
    ]
    each = len(weights) // len(groups)
    if any(needs[2::each]):
        input = without_padding(input, layout)
    for g, (dz_g, output_g) in enumerate(zip(dz_groups, output_groups)):
        needs_w_ih, needs_w_hh, *needs_biases = needs[2 + g * each : 2 + (g + 1) * each]
        grads.append(dz_g.t() @ input if needs_w_ih else None)
        bias = dz_g.sum(0) if any(needs_biases) else None
        h_0 = None if hx is None else hx[g]
        # Last, because it may overwrite rows of dz_g.
        grads.append(_grad_w_hh(dz_g, output_g, h_0, layout, g == 1) if needs_w_hh else None)
        # Each bias has storage of its own: gradient clipping scales every .grad in place, and a
        # shared one would be scaled twice.
        grads += [bias.clone() if bias is not None and need else None for need in needs_biases]
    return grads


def final_state(
    output: Tensor, layout: SequenceLayout, backwards: bool, h_0: Tensor | None
) -> Tensor:
    """Return the last state of each sequence, ``[B, H]``, from one direction's output.

    Args:
        output: ``[N, H]``.
        layout: of the caller's sequences, before they are split at resets.
        backwards: whether the last state is that of the first token.
        h_0: ``[B, H]``, the last state of sequences without a token; None for zero.
    """
    return _unless_empty(_at_start(output, layout, not backwards), layout, h_0)


def without_padding(input: Tensor, layout: SequenceLayout) -> Tensor:
    """Return the input with zeros in its padding rows, which may hold NaN."""
    dead = layout.padding_rows(input.device)
    return input if dead is None else input.masked_fill(dead[:, None], 0)


def _clear_padding(matrix: Tensor, layout: SequenceLayout) -> None:
    dead = layout.padding_rows(matrix.device)
    if dead is not None:
        matrix.masked_fill_(dead[:, None], 0)


def _at_start(matrix: Tensor, layout: SequenceLayout, backwards: bool) -> Tensor:
    """Return the rows of ``matrix [N, H]`` at which one direction starts, ``[B, H]``."""
    if layout.N == 0:
        return matrix.new_zeros(layout.B, matrix.shape[1])
    rows = layout.last_rows if backwards else layout.first_rows
    return matrix[rows(matrix.device)]


def _unless_empty(states: Tensor, layout: SequenceLayout, otherwise: Tensor | None) -> Tensor:
    """Return ``states [B, H]``, with ``otherwise``, or 0, where a sequence has no token."""
    empty = layout.empty(states.device)
    if empty is None:
        return states
    if otherwise is None:
        return states.masked_fill(empty[:, None], 0)
    return torch.where(empty[:, None], otherwise, states)


def _directions(groups: Sequence[GroupWeights]) -> tuple[bool, ...]:
    """Return for each direction whether it walks from the last token to the first."""
    return (False, True)[: len(groups)]


def _accurate(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 at least: v_0 is rounded once only, after it is added."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _drive(input: Tensor, groups: Sequence[GroupWeights]) -> Tensor:
    """Return ``W_ih input + b_ih + b_hh`` of all directions, ``[N, G * H]``, by one product."""
    biases = [g.b_ih + g.b_hh for g in groups if g.b_ih is not None and g.b_hh is not None]
    return torch.nn.functional.linear(
        input,
        _cat([group.w_ih for group in groups]),
        _cat(biases) if biases else None,
    )


def _grad_hx(
    dz_groups: Sequence[Tensor], grad_h_n: Tensor | None, M: Tensor, layout: SequenceLayout
) -> Tensor:
    """Return the gradient of hx, ``[G, B, H]``."""
    grads = []
    for g, dz in enumerate(dz_groups):
        grad = _at_start(dz, layout.parent, backwards=g == 1) @ M[g]
        # A sequence without a token has h_n = h_0, so its gradient passes through.
        through = None if grad_h_n is None else grad_h_n[g]
        grads.append(_unless_empty(grad, layout.parent, through))
    return torch.stack(grads)


def _grad_w_hh(
    dz: Tensor, output: Tensor, h_0: Tensor | None, layout: SequenceLayout, backwards: bool
) -> Tensor:
    """Return ``Σ dz_tᵀ output_{t-1}`` of one direction. May overwrite rows of ``dz``."""
    initial = None
    if h_0 is not None:
        dz_start = _unless_empty(_at_start(dz, layout.parent, backwards), layout.parent, None)
        initial = dz_start.t() @ h_0
    boundary_rows = layout.boundary_rows(dz.device)
    if boundary_rows is not None:
        # Some adjacent rows belong to two sequences, not to two steps of one. Zeros on both sides
        # drop such a pair, whatever values it holds.
        last, first = boundary_rows
        start, end = (last, first) if backwards else (first, last)
        dz[start] = 0
        output = output.clone()
        output[end] = 0
    earlier, later = layout.adjacent_rows(dz.device)
    before, after = (later, earlier) if backwards else (earlier, later)
    grad = dz[after].t() @ output[before]
    return grad if initial is None else grad.add_(initial)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``torch.stack``, or a view if there is one tensor only."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``torch.cat``, or the tensor itself if there is one only."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
