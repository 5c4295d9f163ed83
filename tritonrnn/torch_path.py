"""The recurrence in torch, in place and with nothing recorded: any device, any dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout


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
        layout: where the N rows lie. Every sequence has a token.
        epilogue: E, one of "tanh", "relu", "tanh_grad" ``z (1 - aux²)``, "relu_grad"
            ``z [aux > 0]``.
        reverse: for each group whether it walks from a sequence's last token to its first.
    """
    H = M.shape[1]
    if v_0 is not None:
        _add_initial(a, v_0, layout, reverse)
    for g, backwards in enumerate(reverse):
        columns = slice(g * H, (g + 1) * H)
        rows = a[:, columns]
        steps = layout.steps(rows)
        in_turn = steps[::-1] if backwards else steps
        Mt = M[g].t().contiguous()
        if aux is None:
            _walk(in_turn, Mt, epilogue)
        else:
            outputs = layout.steps(aux[:, columns])
            _walk_gradient(in_turn, Mt, epilogue, outputs[::-1] if backwards else outputs)
        if layout.offsets is not None:
            rows.copy_(layout.join(steps))


def _add_initial(a: Tensor, v_0: Tensor, layout: SequenceLayout, reverse: Sequence[bool]) -> None:
    G, _, H = v_0.shape
    for g in range(G):
        rows = layout.last_rows if reverse[g] else layout.first_rows
        columns = slice(g * H, (g + 1) * H)
        if isinstance(rows, slice):
            a[rows, columns].add_(v_0[g])
        else:
            a[rows, columns] += v_0[g]


def _walk(steps: Sequence[Tensor], Mt: Tensor, epilogue: str) -> None:
    activate: Callable[[Tensor], Tensor] = Tensor.relu_
    if epilogue == "tanh":
        is_fast = steps[0].is_contiguous() or steps[0].numel() < _VECTOR_TANH_SIZE
        activate = Tensor.tanh_ if is_fast else _strided_tanh
    activate(steps[0])
    for z, target, source in zip(steps[1:], *_continued(steps)):
        target.addmm_(source, Mt)
        activate(z)


# torch's vectorised tanh takes contiguous tensors only: from this size on, two small copies are
# cheaper than the other one (B 32, H 128, one of two directions: 15 us for 27; B 8, H 64: 7 us for
# 4; torch 2.13 on 2 cores).
_VECTOR_TANH_SIZE = 1 << 11


def _strided_tanh(z: Tensor) -> Tensor:
    return z.copy_(z.contiguous().tanh_())


def _walk_gradient(
    steps: Sequence[Tensor], Mt: Tensor, epilogue: str, outputs: Sequence[Tensor]
) -> None:
    derive = _tanh_backward if epilogue == "tanh_grad" else _relu_backward
    derive(steps[0], outputs[0], grad_input=steps[0])
    for z, output, target, source in zip(steps[1:], outputs[1:], *_continued(steps)):
        target.addmm_(source, Mt)
        derive(z, output, grad_input=z)


# The derivatives that autograd itself takes, in one operation and in place.
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_relu_backward = functools.partial(torch.ops.aten.threshold_backward.grad_input, threshold=0)


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
