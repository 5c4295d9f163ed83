"""The recurrence in torch, in place and with nothing recorded: any device, any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout

# From here on a step's derivative is made when it is needed, while it fits the cache, and not for
# all steps at once, which saves an operation a step.
_LARGE_STEP_BYTES = 1 << 13


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
            _walk_gradient(
                in_turn, Mt, epilogue, _factors(epilogue, aux[:, columns], layout, backwards)
            )
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


def _factors(
    epilogue: str, aux: Tensor, layout: SequenceLayout, backwards: bool
) -> Iterable[Tensor]:
    """What a gradient's epilogue needs at each step: the derivative, or where it is zero."""
    one = aux.new_ones(())

    def derive(output: Tensor) -> Tensor:
        if epilogue == "relu_grad":
            return output <= 0
        return torch.addcmul(one, output, output, value=-1)

    if aux.nbytes < _LARGE_STEP_BYTES * layout.T:
        factors = layout.steps(derive(aux))
        return factors[::-1] if backwards else factors
    outputs = layout.steps(aux)
    return map(derive, outputs[::-1] if backwards else outputs)


def _walk(steps: Sequence[Tensor], Mt: Tensor, epilogue: str) -> None:
    activate: Callable[[Tensor], Tensor] = Tensor.relu_
    if epilogue == "tanh":
        is_fast = steps[0].is_contiguous() or steps[0].nbytes < _LARGE_STEP_BYTES
        activate = Tensor.tanh_ if is_fast else _strided_tanh
    activate(steps[0])
    for z, target, source in zip(steps[1:], *_continued(steps)):
        target.addmm_(source, Mt)
        activate(z)


def _strided_tanh(z: Tensor) -> Tensor:
    # torch's vectorised tanh takes contiguous tensors only: two small copies are cheaper than the
    # other one (B 32, H 128, one of two directions: 15 us for 27, torch 2.13 on 2 cores).
    return z.copy_(z.contiguous().tanh_())


def _walk_gradient(
    steps: Sequence[Tensor], Mt: Tensor, epilogue: str, factors: Iterable[Tensor]
) -> None:
    gate = Tensor.mul_ if epilogue == "tanh_grad" else _close
    factors = iter(factors)
    gate(steps[0], next(factors))
    for z, factor, target, source in zip(steps[1:], factors, *_continued(steps)):
        target.addmm_(source, Mt)
        gate(z, factor)


def _close(z: Tensor, off: Tensor) -> Tensor:
    # Filled, not multiplied: an infinite gradient where the unit is off is still none.
    return z.masked_fill_(off, 0)


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
