"""One layer, forward and backward: the matrix products around the recurrence.

What needs each token once is a product over all tokens. Only the recurrence goes step by step:
each back end has its own, and this code runs around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tritonrnn.layout import Rows, SequenceLayout

# Of a back end; :func:`tritonrnn.paths.inplace.recurrence` says what it does.
Recurrence: TypeAlias = Callable[..., Tensor | None]


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
    directions = _directions(groups)
    v_0 = None
    if hx is not None:
        v_0 = layout.initial_states(_accurate_product(hx, M.mT), directions)
    h_n = recurrence(
        output, v_0, M, None, layout, epilogue=nonlinearity, reverse=directions, otherwise=hx
    )
    assert h_n is not None
    return output, h_n


def backward(
    grad_output: Tensor,
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
        grad_output: ``[N, G * H]``, contiguous.
        dz: as grad_output, where dz_t is stored; may be the same.
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
    directions = _directions(groups)
    back = tuple(not backwards for backwards in directions)
    v_0 = None
    if grad_h_n is not None:
        v_0 = layout.initial_states(grad_h_n, back).contiguous()
    # This walk ends where that of the forward pass began.
    dz_first = recurrence(
        grad_output,
        v_0,
        M.mT,
        output,
        layout,
        epilogue=f"{nonlinearity}_grad",
        reverse=back,
        s=dz,
        with_ends=hx is not None,
    )
    grads = [dz @ _cat([group.w_ih for group in groups]) if needs[0] else None, None]
    if needs[1]:
        assert dz_first is not None
        grads[1] = _grad_hx(dz_first @ M, grad_h_n, layout.parent)
    needs, each = needs[2:], len(weights) // len(groups)
    live = layout.live_rows(input.device)
    if live is not None and any(needs[::each]):
        # Padding of the input may hold NaN.
        input = _zero_unless(live, input)
    grad_biases = _grad_biases(dz, needs, each)
    pairs = [(dz, output)]
    if len(groups) == 2:
        pairs = list(zip(dz.chunk(2, 1), output.chunk(2, 1)))
    grads_w_ih = [
        dz_g.t() @ input if need else None for (dz_g, _), need in zip(pairs, needs[::each])
    ]
    may_overflow = nonlinearity == "relu"
    if not may_overflow and any(needs[1::each]):
        # Nobody but the gradients of w_hh reads dz from here on.
        _drop_crossing(dz, len(groups), layout)
    for g, (dz_g, output_g) in enumerate(pairs):
        grad = None
        if needs[g * each + 1]:
            initial = None if dz_first is None or hx is None else dz_first[g].t() @ hx[g]
            grad = _grad_w_hh(dz_g, output_g, initial, layout, g == 1, may_overflow)
        grads += [grads_w_ih[g], grad, *(grad_biases.get(g * each + i) for i in range(2, each))]
    return grads


def _directions(groups: Sequence[GroupWeights]) -> tuple[bool, ...]:
    """Return for each direction whether it walks from the last token to the first."""
    return (False, True)[: len(groups)]


def _accurate_product(hx: Tensor, M: Tensor) -> Tensor:
    """Return ``hx M`` in fp32 at least: v_0 is rounded once only, after it is added."""
    if hx.is_cuda and torch.version.hip is None and hx.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(hx, M, out_dtype=torch.float32)
    dtype = torch.promote_types(hx.dtype, torch.float32)
    return hx.to(dtype) @ M.to(dtype)


def _drive(input: Tensor, groups: Sequence[GroupWeights]) -> Tensor:
    """Return ``W_ih input + b_ih + b_hh`` of all directions, ``[N, G * H]``, by one product."""
    w_ih, _, b_ih, b_hh = groups[0]
    if len(groups) == 2:
        second = groups[1]
        parameters = [w_ih.flatten(), second.w_ih.flatten(), b_ih, second.b_ih, b_hh, second.b_hh]
        # One copy of them all.
        joined = torch.cat(parameters[: 2 if b_ih is None else 6])  # type: ignore[arg-type]
        H, I = w_ih.shape  # noqa: E741
        w_ih = joined.as_strided((2 * H, I), (I, 1))
        if b_ih is not None:
            b_ih, b_hh = joined[-4 * H : -2 * H], joined[-2 * H :]
    bias = None if b_ih is None or b_hh is None else b_ih + b_hh
    return torch.nn.functional.linear(input, w_ih, bias)


def _grad_hx(grad: Tensor, grad_h_n: Tensor | None, layout: SequenceLayout) -> Tensor:
    """Return the gradient of hx, from ``dz_first W_hh``, both ``[G, B, H]``."""
    empty = layout.empty(grad.device)
    if empty is None:
        return grad
    # A sequence without a token has h_n = h_0, so its gradient passes through.
    if grad_h_n is None:
        return grad.masked_fill_(empty[:, None], 0)
    return torch.where(empty[:, None], grad_h_n, grad)


def _grad_biases(dz: Tensor, needs: Sequence[bool], each: int) -> dict[int, Tensor]:
    """Return ``Σ dz`` for each bias that needs it, by its place among the weights.

    Args:
        dz: ``[N, G * H]``.
        needs: for each weight of the layer.
        each: weights of a direction.
    """
    wanted = [place for place, need in enumerate(needs) if need and place % each >= 2]
    if not wanted:
        return {}
    total = dz.sum(0)
    # Each bias has storage of its own: gradient clipping scales every .grad in place, and a shared
    # one would be scaled twice.
    if len(needs) == each:
        return {place: total.clone() if i else total for i, place in enumerate(wanted)}
    sums = total.chunk(len(needs) // each)
    grads = {place: torch.empty_like(sums[place // each]) for place in wanted}
    torch._foreach_copy_(list(grads.values()), [sums[place // each] for place in wanted])
    return grads


def _drop_crossing(dz: Tensor, G: int, layout: SequenceLayout) -> None:
    """Overwrite dz_t with 0 where the row before it in its direction is of another sequence.

    So it drops out of ``Σ dz_tᵀ output_{t-1}``. The dz of padding is 0 already.

    Args:
        dz: ``[N, G * H]``, contiguous.
        G: directions; the second one goes from the last row to the first.
        layout: where the N rows lie.
    """
    crossing = layout.crossing_pairs(dz.device)
    if crossing is None or layout.N == 0:
        return
    stride = layout.strides[0]
    after = dz[stride:]
    if G == 2:
        # One operation for both directions. Of a pair of rows, the second direction takes the last
        # half of the earlier one, and the first direction takes the first half of the later one.
        width = dz.shape[1]
        H = width // 2
        shape, strides = (len(after), 2, H), (width, stride * width - H, 1)
        after = dz.view(-1)[H:].as_strided(shape, strides)
    _drop(after, crossing)


def _grad_w_hh(
    dz: Tensor,
    output: Tensor,
    initial: Tensor | None,
    layout: SequenceLayout,
    backwards: bool,
    may_overflow: bool,
) -> Tensor:
    """Return ``Σ dz_tᵀ output_{t-1}`` of one direction.

    Args:
        dz, output: ``[N, H]``. Unless ``may_overflow``, dz went through :func:`_drop_crossing`.
        initial: the terms of first steps, ``[H, H]``, or None for zero. Overwritten.
        layout: where the N rows lie.
        backwards: whether the direction goes from the last token to the first.
        may_overflow: whether the output may be infinite while its gradient is finite.
    """
    earlier, later = layout.adjacent_rows(dz.device)
    before, after = (later, earlier) if backwards else (earlier, later)
    dz, states = dz[after], output[before]
    if may_overflow:
        live, crossing = layout.live_rows(dz.device), layout.crossing_pairs(dz.device)
        if live is not None or crossing is not None:
            # These zeros drop the same pairs. A dz of 0 would make NaN of infinity.
            states = states.clone() if live is None else _zero_unless(live[after], states)
            _drop(states, crossing)
    return dz.t() @ states if initial is None else initial.addmm_(dz.t(), states)


def _drop(matrix: Tensor, rows: Rows | None) -> None:
    """Overwrite rows of a matrix, or of a tensor of more dimensions, with 0."""
    if isinstance(rows, slice):
        matrix[rows].zero_()
    elif rows is not None:
        matrix.masked_fill_(rows.view(-1, *[1] * (matrix.dim() - 1)), 0)


def _zero_unless(live: Tensor, matrix: Tensor) -> Tensor:
    """Return a copy of ``matrix [N, F]`` with zeros in the rows that are not ``live [N]``.

    Chosen, not multiplied, by one operation; ``masked_fill`` and ``where`` take two.
    """
    return torch.ops.aten.threshold_backward(matrix, live[:, None], 0)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``torch.stack``, or a view if there is one tensor only."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``torch.cat``, or the tensor itself if there is one only."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
