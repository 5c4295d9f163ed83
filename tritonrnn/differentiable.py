"""One layer in operations that torch differentiates by itself, in every way that it knows.

For what the fast operator has no formula for: double backward, forward-mode AD, ``torch.func``
transforms, complex numbers. No tensor is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tritonrnn.layer import final_state, split_weights, without_padding
from tritonrnn.layout import SequenceLayout


def forward(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    layout: SequenceLayout,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Run one layer: :func:`tritonrnn.layer.forward`, a recorded operation a step."""
    input = without_padding(input, layout)
    outputs, finals = [], []
    for g, (w_ih, w_hh, b_ih, b_hh) in enumerate(split_weights(weights, bidirectional)):
        backwards = g == 1
        drive = torch.nn.functional.linear(input, w_ih, b_ih)
        if b_hh is not None:
            drive = drive + b_hh
        h_0 = None if hx is None else hx[g]
        output = _walk(
            drive,
            _entering(drive, h_0, w_hh, layout, backwards),
            w_hh,
            layout,
            nonlinearity,
            backwards,
        )
        outputs.append(output)
        finals.append(final_state(output, layout.whole, backwards, h_0))
    return torch.cat(outputs, -1), torch.stack(finals)


def gradients(
    run: Callable[..., tuple[Tensor, Tensor]],
    sources: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """Differentiate what is recorded, and record that in turn where gradients are enabled.

    Args:
        run: called with ``sources``.
        needs: for each of ``sources`` whether its gradient is wanted; False where it is None.
        cotangents: of each result of ``run``, not all of them None.

    Returns:
        The gradients that are wanted. No two share storage.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views are distinct even where two weights are one tensor: each gets its own gradient.
        sources = [None if source is None else source.view_as(source) for source in sources]
        wanted = [source for source, need in zip(sources, needs) if need and source is not None]
        for source in wanted:
            if not source.requires_grad:
                source.requires_grad_()
        pairs = zip(run(*sources), cotangents)
        known = [(value, grad) for value, grad in pairs if grad is not None]
        return list(
            torch.autograd.grad(
                [value for value, _ in known],
                wanted,
                [grad for _, grad in known],
                create_graph=again,
                materialize_grads=True,
            )
        )


def is_batched(cotangents: Sequence[Tensor | None]) -> bool:
    """Whether many gradients are asked for at once, as vectorised jacobians ask for them.

    They know no rule for an operator of another's, only for what it is made of.
    """
    return any(
        grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)
        for grad in cotangents
    )


def _entering(
    drive: Tensor, h_0: Tensor | None, w_hh: Tensor, layout: SequenceLayout, backwards: bool
) -> Tensor:
    """The states that the walks start from, ``[B, H]``."""
    if h_0 is None:
        return drive.new_zeros(layout.B, w_hh.shape[0])
    return layout.entering(h_0[None], [backwards])[0]


def _walk(
    drive: Tensor,
    state: Tensor,
    w_hh: Tensor,
    layout: SequenceLayout,
    nonlinearity: str,
    backwards: bool,
) -> Tensor:
    if layout.packed_form is not None:
        rows, order, packed = layout.packed_form
        tokens = _walk(drive[rows], state[order], w_hh, packed, nonlinearity, backwards)
        return drive.new_zeros(layout.N, w_hh.shape[0]).index_copy(0, rows, tokens)
    if layout.T == 0:
        # Nothing, but differentiable.
        return torch.addmm(drive, state, w_hh.t())
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu
    steps = layout.steps(drive)
    outputs = []
    for z in reversed(steps) if backwards else steps:
        live = len(z)
        output = activation(torch.addmm(z, state[:live], w_hh.t()))
        state = output if live == len(state) else torch.cat([output, state[live:]])
        outputs.append(output)
    return layout.join(outputs[::-1] if backwards else outputs)
