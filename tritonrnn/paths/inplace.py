"""The recurrence in torch, in place and without a graph, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout

# Elements of a step. A smaller one is fastest with the fewest operations, a larger one with those
# that use its memory best. Measured with torch 2.13 on 2 cores of an AMD EPYC with AVX-512:
# tanh of one of two directions takes 27 us on strided columns and 15 us through a contiguous copy
# at B 32, H 128, but 4 and 7 us at B 8, H 64. A step of the backward pass takes 0.9 us with the
# derivative of all steps computed at once and 2.2 us step by step at B 1, H 32, but 7.5 and 4.3 us
# at B 64, H 512.
_SMALL_STEP = 1 << 11
# Elements of a step of one of two directions with which a forward pass on several threads walks a
# copy of the direction's columns. A step takes, on strided columns, with a contiguous copy of its
# own for tanh, and in a copy of all columns, 15, 13 and 10 us at B 8, H 128, 24, 15 and 12 us at
# B 16, H 128, and 30, 23 and 22 us at B 32, H 128. Of a larger step it is even, of a smaller one
# slower. On one thread strided columns are the fastest, by 8 to 12 %.
_COPIED_STEPS = range(1 << 9, (1 << 12) + 1)


def recurrence(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: Sequence[bool],
    s: Tensor | None = None,
    with_ends: bool = True,
    otherwise: Tensor | None = None,
) -> Tensor | None:
    """Run every step of every sequence and group.

        s_t = E(a_t + v_t, aux_t),    v_t = M s_{t-1},    v at a sequence's first step is v_0

    Args:
        a: ``[N, G * H]``; the drive in the forward pass, the gradient of the output in the
            backward pass.
        v_0: ``[G, B, H]``, or None for zero.
        M: ``[G, H, H]``; ``weight_hh`` in the forward pass, its transpose in the backward pass.
        aux: ``[N, G * H]``, the layer's output; read by the two gradients only.
        layout: where the N rows lie.
        epilogue: E, one of "tanh", "relu", "tanh_grad" ``z (1 - aux²)``, "relu_grad"
            ``z [aux > 0]``.
        reverse: for each group whether it walks from a sequence's last token to its first.
        s: as a, where s is stored, and 0 in padding rows; None to store over a.
        with_ends: whether to return the s that each sequence's walk ends with.
        otherwise: ``[G, B, H]``, what to return for sequences without a token; None for zero.

    Returns:
        ``[G, B, H]``, or None; B counts the sequences of ``layout.parent``.
    """
    s = a if s is None else s
    if layout.packed_form is None:
        if s is not a:
            s.copy_(a)
        _walk_all(s, v_0, M, aux, layout, epilogue, reverse)
    else:
        rows, order, packed = layout.packed_form
        tokens = a[rows]
        packed_v_0 = None if v_0 is None else v_0[:, order]
        packed_aux = None if aux is None else aux[rows]
        _walk_all(tokens, packed_v_0, M, packed_aux, packed, epilogue, reverse)
        if len(rows) < len(s):
            s.zero_()
        s[rows] = tokens
    return layout.final_states(s, reverse, otherwise) if with_ends else None


def _walk_all(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    epilogue: str,
    reverse: Sequence[bool],
) -> None:
    if layout.N == 0:
        return
    if v_0 is not None:
        _add_initial(a, v_0, layout, reverse)
    H = M.shape[1]
    copies = len(reverse) > 1 and aux is None and _copies_columns(layout, H)
    copied = a.new_empty(layout.N, H) if copies else a
    for g, backwards in enumerate(reverse):
        columns = slice(g * H, (g + 1) * H)
        rows = copied.copy_(a[:, columns]) if copies else a[:, columns]
        steps = layout.steps(rows)
        in_order = steps[::-1] if backwards else steps
        # A contiguous transpose is faster for several rows. For one row, BLAS would sum its columns
        # in one long chain, with several times the error of dot products.
        Mt = M[g].t() if layout.B == 1 else M[g].t().contiguous()
        if aux is None:
            _walk(in_order, Mt, epilogue)
            if copies:
                a[:, columns] = rows
        else:
            derive, factors = _derivative(epilogue, aux[:, columns], layout)
            _walk_gradient(in_order, Mt, derive, factors[::-1] if backwards else factors)


def _copies_columns(layout: SequenceLayout, H: int) -> bool:
    is_of_size = layout.B * H in _COPIED_STEPS
    return is_of_size and not layout.batch_first and torch.get_num_threads() > 1


def _add_initial(a: Tensor, v_0: Tensor, layout: SequenceLayout, reverse: Sequence[bool]) -> None:
    G, _, H = v_0.shape
    for g in range(G):
        rows = (layout.last_rows if reverse[g] else layout.first_rows)(a.device)
        columns = slice(g * H, (g + 1) * H)
        if isinstance(rows, slice):
            a[rows, columns].add_(v_0[g])
        else:
            a[rows, columns] += v_0[g]


def _walk(steps: Sequence[Tensor], Mt: Tensor, epilogue: str) -> None:
    z = steps[0]
    is_in_place = z.is_contiguous() or z.numel() < _SMALL_STEP or torch.get_num_threads() == 1
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": Tensor.tanh_ if is_in_place else _copied_tanh,
        "relu": Tensor.relu_,
    }
    activate = activations[epilogue]
    activate(steps[0])
    for z, target, source in zip(steps[1:], *_common_rows(steps)):
        target.addmm_(source, Mt)
        activate(z)


def _copied_tanh(z: Tensor) -> Tensor:
    return z.copy_(z.contiguous().tanh_())


def _walk_gradient(
    steps: Sequence[Tensor],
    Mt: Tensor,
    derive: Callable[[Tensor, Tensor], object],
    factors: Sequence[Tensor],
) -> None:
    derive(steps[0], factors[0])
    for z, factor, target, source in zip(steps[1:], factors[1:], *_common_rows(steps)):
        target.addmm_(source, Mt)
        derive(z, factor)


def _derivative(
    epilogue: str, aux: Tensor, layout: SequenceLayout
) -> tuple[Callable[[Tensor, Tensor], object], Sequence[Tensor]]:
    """Return E of a gradient as a function in place, and its second argument for each step."""
    if epilogue == "relu_grad":
        return _relu_grad_, layout.steps(aux)
    assert epilogue == "tanh_grad"
    if aux.numel() >= _SMALL_STEP * layout.T:
        return _tanh_grad_, layout.steps(aux)
    return Tensor.mul_, layout.steps(torch.addcmul(aux.new_ones(()), aux, aux, value=-1))


# torch's own derivatives: each one operation.


def _tanh_grad_(z: Tensor, output: Tensor) -> None:
    torch.ops.aten.tanh_backward.grad_input(z, output, grad_input=z)


def _relu_grad_(z: Tensor, output: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(z, output, 0, grad_input=z)


def _common_rows(steps: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return for each step but the first its rows, and the rows of the step before, in common.

    Steps are sorted by length, so that the sequences which two steps have in common are the first
    rows of both. A sequence whose first step this is already holds its v_0.
    """
    # Not len(), which takes a microsecond.
    sizes = [z.shape[0] for z in steps]
    if sizes[0] == sizes[-1]:
        return steps[1:], steps[:-1]
    targets, sources = list(steps[1:]), list(steps[:-1])
    for i, (before, now) in enumerate(pairwise(sizes)):
        if now > before:
            targets[i] = targets[i][:before]
        elif now < before:
            sources[i] = sources[i][:now]
    return targets, sources
