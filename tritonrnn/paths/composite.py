"""One layer in torch operations that change nothing in place: torch derives every derivative.

It serves what the operator has no formula for: double backward, forward-mode AD, ``torch.func``
transforms and complex numbers. Exported programs that are to run without tritonrnn are made of the
same operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from tritonrnn.layer import split_weights
from tritonrnn.layout import SequenceLayout
from tritonrnn.precision import products_as_in_rnn
from tritonrnn.ragged import rows_of

# The next state of (state ``[B, H]``, w_hh, drive of the step ``[B, H]``). It is given w_hh because
# the body of a scan can use no tensors but its arguments.
Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class Walk(Protocol):
    """A function that takes one direction's steps in turn."""

    def __call__(
        self, step: Step, drive: Tensor, h_0: Tensor | None, w_hh: Tensor, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        """Apply ``state = step(state, w_hh, z)`` to each step z of the drive.

        Args:
            step: the function to apply.
            drive: the rows of the input, with H features.
            h_0: the first state, ``[B, H]``, or None for zero.
            w_hh: ``[H, H]``.
            backwards: whether to start at the last token of each sequence.

        Returns:
            All states, in rows as the drive, and the last state of each sequence, ``[B, H]``.
        """


def forward(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    walk: Walk,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Run one layer: :func:`tritonrnn.layer.forward` without a change in place.

    Args:
        input: rows of I features, in a shape that ``walk`` takes. Zero where there is no token.
        hx: ``[G, B, H]``, or None for zero.
        weights: the layer's, in the order of ``torch.nn.RNN``.
        walk: takes the steps of such rows in turn.
        nonlinearity: "tanh" or "relu".
        bidirectional: whether ``weights`` holds two directions.

    Returns:
        ``output``, rows as the input with G * H features, and ``h_n [G, B, H]``.
    """
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu

    def step(state: Tensor, w_hh: Tensor, z: Tensor) -> Tensor:
        return activation(torch.addmm(z, state, w_hh.t()))

    outputs, finals = [], []
    for g, (w_ih, w_hh, b_ih, b_hh) in enumerate(split_weights(weights, bidirectional)):
        drive = torch.nn.functional.linear(input, w_ih, b_ih)
        if b_hh is not None:
            drive = drive + b_hh
        output, final = walk(step, drive, None if hx is None else hx[g], w_hh, g == 1)
        outputs.append(output)
        finals.append(final)
    return torch.cat(outputs, -1), torch.stack(finals)


def elman_composite(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Run one layer as :func:`tritonrnn.ops.elman` does, on this path. Takes its arguments."""
    rows, where = rows_of(input, layout, seq_metadata, reset)
    walk = functools.partial(_walk, where)
    with products_as_in_rnn(input.device, input.dtype):
        live = where.live_rows(rows.device)
        if live is not None:
            # Padding may hold NaN.
            rows = rows.masked_fill(~live[:, None], 0)
        output, h_n = forward(rows, hx, weights, walk, nonlinearity, bidirectional)
    return output.unflatten(0, input.shape[:-1]), h_n


def why_composite(dtype: torch.dtype) -> str | None:
    """Return why a call needs this path, or None if it does not."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, which needs the composite path."
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is active, which needs the composite path."
    if dtype.is_complex:
        return f"{dtype} is differentiated by torch, step by step."
    return None


def gradients(
    run: Callable[..., tuple[Tensor, Tensor]],
    sources: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """Run a function on this path and return its gradients, differentiable where grad mode is on.

    Args:
        run: is called with ``sources``.
        needs: for each of ``sources`` whether its gradient is wanted; False where it is None.
        cotangents: of each result of ``run``, not all of them None.

    Returns:
        The gradients that are wanted. No two share storage.
    """
    create_graph = torch.is_grad_enabled()
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
                create_graph=create_graph,
                materialize_grads=True,
            )
        )


def is_batched(cotangents: Sequence[Tensor | None]) -> bool:
    """Return whether the cotangents are those of a vectorised jacobian, many in one tensor.

    Such tensors have rules for torch's own operators only, so they need this path.
    """
    return any(
        grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)
        for grad in cotangents
    )


def _walk(
    layout: SequenceLayout,
    step: Step,
    drive: Tensor,
    h_0: Tensor | None,
    w_hh: Tensor,
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    """Take the steps of a layout whose sizes are known: a :class:`Walk`."""
    if h_0 is None:
        state = drive.new_zeros(layout.B, w_hh.shape[0])
    else:
        state = layout.initial_states(h_0[None], [backwards])[0]
    output = _walk_rows(layout, step, drive, state, w_hh, backwards)
    return output, layout.parent.final_state(output, backwards, h_0)


def _walk_rows(
    layout: SequenceLayout,
    step: Step,
    drive: Tensor,
    state: Tensor,
    w_hh: Tensor,
    backwards: bool,
) -> Tensor:
    if layout.packed_form is not None:
        rows, order, packed = layout.packed_form
        tokens = _walk_rows(packed, step, drive[rows], state[order], w_hh, backwards)
        return drive.new_zeros(layout.N, w_hh.shape[0]).index_copy(0, rows, tokens)
    if layout.T == 0:
        # No rows, but differentiable.
        return step(state, w_hh, drive)
    steps = layout.steps(drive)
    outputs = []
    for z in reversed(steps) if backwards else steps:
        live = len(z)
        output = step(state[:live], w_hh, z)
        state = output if live == len(state) else torch.cat([output, state[live:]])
        outputs.append(output)
    return layout.join(outputs[::-1] if backwards else outputs)
