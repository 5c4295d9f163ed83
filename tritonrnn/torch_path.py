"""The recurrence in torch, in place and with nothing recorded: any device, any dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout

# A step of fewer numbers is cheapest with the fewest operations, a larger one with those that use
# its memory best. Forward, one of two directions of B 32, H 128: tanh 27 us as the columns lie,
# 15 us copied together and back; B 8, H 64: 4 and 7 us. Backward, B 1, H 32: 0.9 us with the
# derivative made for all steps at once, 2.2 us step by step; B 64, H 512: 7.5 and 4.3 us. (torch
# 2.13, 2 cores of an AMD EPYC with AVX-512.)
_SMALL_STEP = 1 << 11


def recurrence(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: Sequence[bool],
) -> None:
    """Walk every sequence of every group, overwriting ``a`` with the result.

        s_t = E(a_t + v_t, aux_t),    v_t = M s_{t-1},    v at a sequence's first step is v_0

    Args:
        a: ``[N, G * H]``; the drive in the forward pass, the gradient of the output in the
            backward pass. Overwritten with s.
        v_0: ``[G, B, H]``, or None for zero.
        M: ``[G, H, H]``; ``weight_hh`` in the forward pass, its transpose in the backward pass.
        aux: ``[N, G * H]``, the layer's output; read by the two gradients only.
        layout: where the N rows lie. Rows that are no token are left as they are.
        epilogue: E, one of "tanh", "relu", "tanh_grad" ``z (1 - aux²)``, "relu_grad"
            ``z [aux > 0]``.
        reverse: for each group whether it walks from a sequence's last token to its first.
    """
    H = M.shape[1]
    if layout.packed_form is not None:
        rows, order, packed = layout.packed_form
        tokens = a[rows]
        entering = None if v_0 is None else v_0[:, order]
        of_tokens = None if aux is None else aux[rows]
        recurrence(tokens, entering, M, of_tokens, packed, epilogue=epilogue, reverse=reverse)
        a[rows] = tokens
        return
    if layout.N == 0:
        return
    if v_0 is not None:
        _add_initial(a, v_0, layout, reverse)
    for g, backwards in enumerate(reverse):
        columns = slice(g * H, (g + 1) * H)
        rows = a[:, columns]
        steps = layout.steps(rows)
        in_turn = steps[::-1] if backwards else steps
        # Of one row, BLAS sums the columns of a transposed matrix in one long chain, with several
        # times the error of dot products; of more rows, it is faster on it.
        Mt = M[g].t() if layout.B == 1 else M[g].t().contiguous()
        if aux is None:
            _walk(in_turn, Mt, epilogue)
        else:
            close, factors = _derivative(epilogue, aux[:, columns], layout)
            _walk_gradient(in_turn, Mt, close, factors[::-1] if backwards else factors)


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
    activate: Callable[[Tensor], Tensor] = Tensor.relu_
    if epilogue == "tanh":
        is_fast = steps[0].is_contiguous() or steps[0].numel() < _SMALL_STEP
        activate = Tensor.tanh_ if is_fast else _strided_tanh
    activate(steps[0])
    for z, target, source in zip(steps[1:], *_continued(steps)):
        target.addmm_(source, Mt)
        activate(z)


def _strided_tanh(z: Tensor) -> Tensor:
    # torch's vectorised tanh takes contiguous tensors only.
    return z.copy_(z.contiguous().tanh_())


def _walk_gradient(
    steps: Sequence[Tensor],
    Mt: Tensor,
    close: Callable[[Tensor, Tensor], object],
    factors: Sequence[Tensor],
) -> None:
    close(steps[0], factors[0])
    for z, factor, target, source in zip(steps[1:], factors[1:], *_continued(steps)):
        target.addmm_(source, Mt)
        close(z, factor)


def _derivative(
    epilogue: str, aux: Tensor, layout: SequenceLayout
) -> tuple[Callable[[Tensor, Tensor], object], Sequence[Tensor]]:
    """What turns a step into its gradient in place, and what of each step it takes for that."""
    if epilogue == "relu_grad":
        return _close_relu, layout.steps(aux)
    if aux.numel() >= _SMALL_STEP * layout.T:
        return _close_tanh, layout.steps(aux)
    return Tensor.mul_, layout.steps(torch.addcmul(aux.new_ones(()), aux, aux, value=-1))


# The derivatives that autograd itself takes, in one operation.


def _close_tanh(z: Tensor, output: Tensor) -> None:
    torch.ops.aten.tanh_backward.grad_input(z, output, grad_input=z)


def _close_relu(z: Tensor, output: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(z, output, 0, grad_input=z)


def _continued(steps: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """For every step but the first the rows that go on from the one before, in both of them.

    Sequences leave where lengths end and, walking back, join there: the first rows of either step
    are those that the two share. What joins starts from the v_0 that it already holds.
    """
    if len(steps[0]) == len(steps[-1]):
        return steps[1:], steps[:-1]
    targets, sources = list(steps[1:]), list(steps[:-1])
    for i, (before, now) in enumerate(pairwise([len(z) for z in steps])):
        if now > before:
            targets[i] = targets[i][:before]
        elif now < before:
            sources[i] = sources[i][:now]
    return targets, sources
