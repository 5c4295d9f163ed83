"""One layer in operations that torch differentiates by itself, in every way that it knows.

For what the fast operator has no formula for: double backward, forward-mode AD, ``torch.func``
transforms, complex numbers. No tensor is changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

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
