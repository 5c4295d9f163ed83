"""Lower an exported program to torch's own operators, to run it without tritonrnn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonrnn.layer import split_weights
from tritonrnn.paths.composite import Step, forward


def decompositions() -> Any:
    """Return a table for ``ExportedProgram.run_decompositions`` that leaves nothing of tritonrnn.

    An exported program holds one operator a layer, ``tritonrnn::elman.with_reserve``. It runs as
    fast as in eager mode wherever tritonrnn is imported, and ``run_decompositions()`` keeps it.
    This table turns it into torch's own operators::

        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},))
        program = program.run_decompositions(tritonrnn.export.decompositions())

    A static number of steps is unrolled; a dynamic one becomes ``torch.ops.higher_order.scan``.
    Both are differentiable. A packed input is padded inside. On CUDA, fp32 products then follow
    ``torch.backends.cuda.matmul`` and no longer torch's switch for RNNs.

    Returns:
        ``torch.export.default_decompositions()`` with one more each for
        ``tritonrnn::elman.with_reserve`` and ``tritonrnn::elman_backward``.

    Raises:
        NotImplementedError: from the decompositions, for a jagged input.
    """
    table = torch.export.default_decompositions()
    table[torch.ops.tritonrnn.elman.with_reserve] = _elman
    table[torch.ops.tritonrnn.elman_backward.default] = _elman_backward
    return table


def _elman(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`tritonrnn.ops.elman` in operations that change nothing in place."""
    grid = _grid(input, seq_metadata, reset, layout, None if hx is None else hx.shape[1])
    rows = grid.without_padding(input)
    output, h_n = forward(rows, hx, weights, grid.walk_drive, nonlinearity, bidirectional)
    # The decomposed backward pass needs no reserve.
    reserve, weight_buf = (input.new_empty(0, dtype=torch.uint8) for _ in range(2))
    return output, h_n, reserve, weight_buf


def _elman_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs: Sequence[bool],
    reserve: Tensor | None = None,
    weight_buf: Tensor | None = None,
) -> list[Tensor]:
    """Run :func:`tritonrnn.layer.backward` in operations that change nothing in place."""
    B = next((x.shape[1] for x in (hx, grad_h_n) if x is not None), None)
    grid = _grid(input, seq_metadata, reset, layout, B)
    groups = split_weights(weights, bidirectional)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    rows = grid.without_padding(input).flatten(0, -2)
    grad_input = torch.zeros_like(input)
    grads_hx, grads = [], []
    parts = zip(groups, output.chunk(len(groups), -1), grad_output.chunk(len(groups), -1))
    for g, (group, output_g, grad_g) in enumerate(parts):
        states = grid.spread(output_g)
        v_0 = torch.zeros_like(states[0]) if grad_h_n is None else grad_h_n[g]
        step = _backward_step(nonlinearity)
        grad_h_0, dz = grid.walk(step, v_0, group.w_hh, [grid.spread(grad_g), states], g == 0)
        grads_hx.append(grad_h_0)
        h_0 = torch.zeros_like(v_0) if hx is None else hx[g]
        previous = grid.previous(states, h_0, backwards=g == 1)
        dz_rows = grid.collect(dz)
        grad_input = grad_input + dz_rows @ group.w_ih
        dz_rows = dz_rows.flatten(0, -2)
        grads.append(dz_rows.t() @ rows)
        grads.append(grid.masked(dz).flatten(0, 1).t() @ previous.flatten(0, 1))
        if group.b_ih is not None:
            # Computed twice, because no two gradients may be one tensor.
            grads += [dz_rows.sum(0), dz_rows.sum(0)]
    found = [grad_input, torch.stack(grads_hx), *grads]
    return [grad for grad, need in zip(found, needs) if need]


def _backward_step(nonlinearity: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the step of the gradient's recurrence, ``(v, w_hh, a, state) -> (next v, dz)``."""
    aten = torch.ops.aten

    def step(v: Tensor, w_hh: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if nonlinearity == "tanh":
            dz = aten.tanh_backward(a + v, state)
        else:
            dz = aten.threshold_backward(a + v, state, 0)
        return dz @ w_hh, dz

    return step


@dataclass(frozen=True)
class _Grid:
    """All sequences side by side, ``[T, B, features]``: what a program with dynamic sizes can walk.

    Attributes:
        spread: puts the input's rows there, and zeros where there is no token.
        collect: its inverse.
        live: ``[T, B, 1]``, whether there is a token; None if there always is.
        resets: ``[T, B, 1]``, whether a sequence starts anew, False at step 0; None if none does.
        has_padding: whether some of the input's rows are padding.
    """

    spread: Callable[[Tensor], Tensor]
    collect: Callable[[Tensor], Tensor]
    live: Tensor | None = None
    resets: Tensor | None = None
    has_padding: bool = False

    def walk_drive(
        self, step: Step, drive: Tensor, h_0: Tensor | None, w_hh: Tensor, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        """Take the steps of a drive: a :class:`tritonrnn.paths.composite.Walk`."""

        def step_twice(state: Tensor, w_hh: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            state = step(state, w_hh, z)
            return state, state

        drive = self.spread(drive)
        state = torch.zeros_like(drive[0]) if h_0 is None else h_0
        final, output = self.walk(step_twice, state, w_hh, [drive], backwards)
        return self.collect(output), final

    def walk(
        self,
        step: Callable[..., tuple[Tensor, Tensor]],
        state: Tensor,
        w_hh: Tensor,
        sources: list[Tensor],
        backwards: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute ``state, result = step(state, w_hh, *sources[t])`` for every t in turn.

        Returns:
            The last state, ``[B, H]``, and all results, ``[T, B, H]``. Where there is no token, the
            state stays as it was, and the result is undefined.
        """
        masks = [mask for mask in (self.live, self.resets_in(backwards)) if mask is not None]
        sources = [*sources, *masks]

        def masked_step(
            state: Tensor, w_hh: Tensor, sources: list[Tensor]
        ) -> tuple[Tensor, Tensor]:
            before = state
            if self.resets is not None:
                *sources, resets = sources
                before = torch.where(resets, 0, state)
            if self.live is None:
                return step(before, w_hh, *sources)
            *sources, live = sources
            after, result = step(before, w_hh, *sources)
            return torch.where(live, after, state), result

        T = sources[0].shape[0]
        if not isinstance(T, int):
            return _scan(masked_step, state, w_hh, sources, backwards)
        results = []
        for t in reversed(range(T)) if backwards else range(T):
            state, result = masked_step(state, w_hh, [source[t] for source in sources])
            results.append(result)
        return state, torch.stack(results[::-1] if backwards else results)

    def previous(self, states: Tensor, h_0: Tensor, backwards: bool) -> Tensor:
        """Return the state before each step of a walk. Where there is no token, it is finite."""
        if self.live is not None:
            # A walk backwards finds h_0 where a sequence has not begun.
            states = torch.where(self.live, states, h_0)
        if backwards:
            previous = torch.cat([states[1:], h_0[None]])
        else:
            previous = torch.cat([h_0[None], states[:-1]])
        resets = self.resets_in(backwards)
        return previous if resets is None else torch.where(resets, 0, previous)

    def resets_in(self, backwards: bool) -> Tensor | None:
        """Return the steps that start from 0 in a walk of this direction, ``[T, B, 1]``."""
        if self.resets is None or not backwards:
            return self.resets
        return torch.cat([self.resets[1:], self.resets[:1]])

    def masked(self, values: Tensor) -> Tensor:
        """Return the values with 0 where there is no token."""
        return values if self.live is None else torch.where(self.live, values, 0)

    def without_padding(self, rows: Tensor) -> Tensor:
        """Return the input's rows with 0 where there is no token, which may hold NaN."""
        return self.collect(self.spread(rows)) if self.has_padding else rows


def _scan(
    masked_step: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    w_hh: Tensor,
    sources: list[Tensor],
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    """Run :meth:`_Grid.walk` as one operator, for a number of steps that is dynamic."""
    # Imported only here, because it loads torch's compiler. This is the operator itself: the
    # function around it would compile the step, with guards on sizes that are data.
    from torch._higher_order_ops.scan import scan_op

    def combine(state: Tensor, *rest: Tensor) -> list[Tensor]:
        *sources, w_hh = rest
        state, result = masked_step(state, w_hh, sources)
        # A scan can't return one tensor twice.
        return [state, result.clone()]

    if backwards:
        sources = [source.flip(0) for source in sources]
    # If the first state requires no gradient, torch 2.11 drops the gradients of all later ones. So
    # an empty sum of what may require one is added, which is 0 whatever the values.
    state = state + (sources[0][:0].sum() + w_hh[:0].sum())
    state, results = scan_op(combine, [state], sources, (w_hh,))
    return state, results.flip(0) if backwards else results


def _grid(
    input: Tensor, seq_metadata: Tensor | None, reset: Tensor | None, layout: str, B: Any
) -> _Grid:
    if layout in ("time_major", "batch_major"):
        return _padded_grid(input, seq_metadata, reset, batch_first=layout == "batch_major")
    if layout != "packed" or seq_metadata is None:
        raise NotImplementedError(f"no decomposition knows the layout {layout!r}")
    batch_sizes = seq_metadata.to(input.device)
    ends = batch_sizes.cumsum(0)
    starts = ends - batch_sizes
    if B is None:
        B = seq_metadata[0].item()
    b = torch.arange(B, device=input.device)
    live = b < batch_sizes[:, None]
    # Where there is no token any row will do, and row 0 exists.
    row_of = torch.where(live, starts[:, None] + b, 0)
    row = torch.arange(input.shape[0], device=input.device)
    t_of = torch.searchsorted(ends, row, right=True)
    b_of = row - starts[t_of]
    return _Grid(lambda rows: rows[row_of], lambda steps: steps[t_of, b_of], live[..., None])


def _padded_grid(
    input: Tensor, lengths: Tensor | None, reset: Tensor | None, batch_first: bool
) -> _Grid:
    def transpose(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if batch_first else tensor

    live = resets = None
    if lengths is not None:
        t = torch.arange(transpose(input).shape[0], device=input.device)
        live = (t[:, None] < lengths.to(input.device))[..., None]
    if reset is not None:
        resets = transpose(reset).to(input.device)[..., None]
        if live is not None:
            resets = resets & live
        # A reset at step 0 drops hx, which was done before the operator.
        resets = torch.cat([torch.zeros_like(resets[:1]), resets[1:]])
    if live is None:
        return _Grid(transpose, transpose, resets=resets)
    return _Grid(
        lambda rows: torch.where(live, transpose(rows), 0),
        lambda steps: transpose(torch.where(live, steps, 0)),
        live,
        resets,
        has_padding=True,
    )
