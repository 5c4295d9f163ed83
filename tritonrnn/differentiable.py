"""One layer in operations that torch differentiates by itself, in every way that it knows.

For what the fast operator has no formula for: double backward, forward-mode AD, ``torch.func``
transforms, complex numbers. No tensor is changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonrnn.layer import final_state, split_weights
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
    outputs, finals = [], []
    for g, (w_ih, w_hh, b_ih, b_hh) in enumerate(split_weights(weights, bidirectional)):
        backwards = g == 1
        drive = torch.nn.functional.linear(input, w_ih, b_ih)
        if b_hh is not None:
            drive = drive + b_hh
        h_0 = None if hx is None else hx[g]
        output = _walk(drive, h_0, w_hh, layout, nonlinearity, backwards)
        outputs.append(output)
        finals.append(final_state(output, layout, backwards))
    return torch.cat(outputs, -1), torch.stack(finals)


def _walk(
    drive: Tensor,
    h_0: Tensor | None,
    w_hh: Tensor,
    layout: SequenceLayout,
    nonlinearity: str,
    backwards: bool,
) -> Tensor:
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu
    state = drive.new_zeros(layout.B, w_hh.shape[0]) if h_0 is None else h_0
    if layout.offsets is not None:
        state = state[torch.argsort(layout.lengths, descending=True, stable=True)]
    steps = layout.steps(drive)
    outputs = []
    for z in reversed(steps) if backwards else steps:
        live = len(z)
        output = activation(torch.addmm(z, state[:live], w_hh.t()))
        state = output if live == len(state) else torch.cat([output, state[live:]])
        outputs.append(output)
    return layout.join(outputs[::-1] if backwards else outputs)
