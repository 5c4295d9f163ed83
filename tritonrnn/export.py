"""Lower an exported program to torch's own operators, where it is to run without tritonrnn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonrnn.layer import split_weights


def decompositions() -> Any:
    """What ``ExportedProgram.run_decompositions`` takes, to leave nothing of tritonrnn.

    An exported program holds one operator a layer, ``tritonrnn::elman``, which runs as fast as in
    eager mode wherever tritonrnn is imported, and ``run_decompositions()`` keeps it. With this
    table it becomes plain operators instead::

        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},))
        program = program.run_decompositions(tritonrnn.export.decompositions())

    A static number of steps is unrolled; a dynamic one becomes ``torch.ops.higher_order.scan``
    over plain operators. Either is differentiable. A packed input is padded inside. On CUDA, fp32
    products follow ``torch.backends.cuda.matmul`` then, and no longer torch's switch for RNNs.

    Returns:
        ``torch.export.default_decompositions()``, and one each for ``tritonrnn::elman`` and
        ``tritonrnn::elman_backward``. They raise NotImplementedError for a layout that a model
        does not reach through :func:`tritonrnn.functional.rnn`.
    """
    table = torch.export.default_decompositions()
    table[torch.ops.tritonrnn.elman.default] = _elman
    table[torch.ops.tritonrnn.elman_backward.default] = _elman_backward
    return table


def _elman(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`tritonrnn.ops.elman`, in operations that change nothing in place."""
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu
    grid = _grid(input, extents, reset, layout, None if hx is None else hx.shape[1])
    input = grid.without_padding(input)
    outputs, finals = [], []
    for g, group in enumerate(split_weights(weights, bidirectional)):
        drive = torch.nn.functional.linear(input, group.w_ih, group.b_ih)
        if group.b_hh is not None:
            drive = drive + group.b_hh
        drive = grid.spread(drive)

        def step(state: Tensor, w_hh: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            state = activation(torch.addmm(z, state, w_hh.t()))
            return state, state

        h_0 = torch.zeros_like(drive[0]) if hx is None else hx[g]
        final, output = grid.walk(step, h_0, group.w_hh, [drive], backwards=g == 1)
        finals.append(final)
        outputs.append(grid.collect(output))
    return torch.cat(outputs, -1), torch.stack(finals)


def _elman_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    extents: Tensor | None,
    reset: Tensor | None,
    layout: str,
    nonlinearity: str,
    bidirectional: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """:func:`tritonrnn.layer.backward`, in operations that change nothing in place."""
    aten = torch.ops.aten
    B = next((x.shape[1] for x in (hx, grad_h_n) if x is not None), None)
    grid = _grid(input, extents, reset, layout, B)
    groups = split_weights(weights, bidirectional)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    rows = grid.without_padding(input).flatten(0, -2)
    grad_input = torch.zeros_like(input)
    grads_hx, grads = [], []
    parts = zip(groups, output.chunk(len(groups), -1), grad_output.chunk(len(groups), -1))
    for g, (group, output_g, grad_g) in enumerate(parts):
        states = grid.spread(output_g)

        def step(v: Tensor, w_hh: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            if nonlinearity == "tanh":
                dz = aten.tanh_backward(a + v, state)
            else:
                dz = aten.threshold_backward(a + v, state, 0)
            return dz @ w_hh, dz

        v_0 = torch.zeros_like(states[0]) if grad_h_n is None else grad_h_n[g]
        sources = [grid.spread(grad_g), states]
        grad_h_0, dz = grid.walk(step, v_0, group.w_hh, sources, backwards=g == 0)
        grads_hx.append(grad_h_0)
        h_0 = torch.zeros_like(v_0) if hx is None else hx[g]
        before = grid.before(states, h_0, backwards=g == 1)
        dz_rows = grid.collect(dz)
        grad_input = grad_input + dz_rows @ group.w_ih
        dz_rows = dz_rows.flatten(0, -2)
        grads += [dz_rows.t() @ rows, grid.blank(dz).flatten(0, 1).t() @ before.flatten(0, 1)]
        if group.b_ih is not None:
            # Two tensors, as no two gradients may be one.
            grads += [dz_rows.sum(0), dz_rows.sum(0)]
    found = [grad_input, torch.stack(grads_hx), *grads]
    return [grad for grad, need in zip(found, needs) if need]


@dataclass(frozen=True)
class _Grid:
    """Sequences side by side, step by step, ``[T, B, features]``.

    Attributes:
        spread: puts the input's rows there, zeros for those that are padding.
        collect: its inverse.
        live: ``[T, B, 1]``, whether there is a token; None where there always is.
        cut: ``[T, B, 1]``, whether no state crosses between a step and the one before, at step 0
            False; None where all do.
        padded: whether some of the input's rows are no token.
    """

    spread: Callable[[Tensor], Tensor]
    collect: Callable[[Tensor], Tensor]
    live: Tensor | None = None
    cut: Tensor | None = None
    padded: bool = False

    def walk(
        self,
        step: Callable[..., tuple[Tensor, Tensor]],
        state: Tensor,
        w_hh: Tensor,
        sources: list[Tensor],
        backwards: bool,
    ) -> tuple[Tensor, Tensor]:
        """Take ``state, result = step(state, w_hh, *sources[t])`` for every t in turn.

        Returns:
            The last state, ``[B, H]``, and all results, ``[T, B, H]``. Where there is no token the
            state stays as it was, and the result means nothing.
        """
        masks = [mask for mask in (self.live, self.cut_from(backwards)) if mask is not None]
        sources = [*sources, *masks]

        def advance(state: Tensor, w_hh: Tensor, sources: list[Tensor]) -> tuple[Tensor, Tensor]:
            before = state
            if self.cut is not None:
                *sources, cut = sources
                before = torch.where(cut, 0, state)
            if self.live is None:
                return step(before, w_hh, *sources)
            *sources, live = sources
            after, result = step(before, w_hh, *sources)
            return torch.where(live, after, state), result

        T = sources[0].shape[0]
        if not isinstance(T, int):
            return _scan(advance, state, w_hh, sources, backwards)
        results = []
        for t in reversed(range(T)) if backwards else range(T):
            state, result = advance(state, w_hh, [source[t] for source in sources])
            results.append(result)
        return state, torch.stack(results[::-1] if backwards else results)

    def before(self, states: Tensor, h_0: Tensor, backwards: bool) -> Tensor:
        """The state that each step of a walk started from, 0 or finite where there is no token."""
        if self.live is not None:
            # What a walk backwards finds where a sequence has yet to begin.
            states = torch.where(self.live, states, h_0)
        if backwards:
            before = torch.cat([states[1:], h_0[None]])
        else:
            before = torch.cat([h_0[None], states[:-1]])
        cut = self.cut_from(backwards)
        return before if cut is None else torch.where(cut, 0, before)

    def cut_from(self, backwards: bool) -> Tensor | None:
        """Whether no state reaches a step from the one that a walk takes before it."""
        if self.cut is None or not backwards:
            return self.cut
        return torch.cat([self.cut[1:], self.cut[:1]])

    def blank(self, values: Tensor) -> Tensor:
        """Zeros where there is no token."""
        return values if self.live is None else torch.where(self.live, values, 0)

    def without_padding(self, rows: Tensor) -> Tensor:
        """The input's rows with zeros where there is no token: what lies there may be NaN."""
        return self.collect(self.spread(rows)) if self.padded else rows


def _scan(
    advance: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    w_hh: Tensor,
    sources: list[Tensor],
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    """:meth:`_Grid.walk` as one operator, for a number of steps that only a run will know."""
    # Only here, as it loads torch's compiler. The operator itself: the function around it would
    # compile the step, which guards on sizes that are data.
    from torch._higher_order_ops.scan import scan_op

    def combine(state: Tensor, *rest: Tensor) -> list[Tensor]:
        *sources, w_hh = rest
        state, result = advance(state, w_hh, sources)
        # A scan may not yield one tensor as both.
        return [state, result.clone()]

    if backwards:
        sources = [source.flip(0) for source in sources]
    # torch 2.11 takes a first state without a gradient to mean that no later one has any, and drops
    # theirs. An empty sum is zero, whatever the numbers.
    state = state + (sources[0][:0].sum() + w_hh[:0].sum())
    state, results = scan_op(combine, [state], sources, (w_hh,))
    return state, results.flip(0) if backwards else results


def _grid(
    input: Tensor, extents: Tensor | None, reset: Tensor | None, layout: str, B: Any
) -> _Grid:
    if layout in ("time_major", "batch_major"):
        return _padded_grid(input, extents, reset, batch_first=layout == "batch_major")
    if layout != "packed" or extents is None:
        raise NotImplementedError(f"no decomposition knows the layout {layout!r}")
    batch_sizes = extents.to(input.device)
    ends = batch_sizes.cumsum(0)
    starts = ends - batch_sizes
    if B is None:
        B = extents[0].item()
    b = torch.arange(B, device=input.device)
    live = b < batch_sizes[:, None]
    # Where there is no token any row will do, and the first one exists.
    row_of = torch.where(live, starts[:, None] + b, 0)
    row = torch.arange(input.shape[0], device=input.device)
    t_of = torch.searchsorted(ends, row, right=True)
    b_of = row - starts[t_of]
    return _Grid(lambda rows: rows[row_of], lambda steps: steps[t_of, b_of], live[..., None])


def _padded_grid(
    input: Tensor, lengths: Tensor | None, reset: Tensor | None, batch_first: bool
) -> _Grid:
    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if batch_first else tensor

    live = cut = None
    if lengths is not None:
        t = torch.arange(turned(input).shape[0], device=input.device)
        live = (t[:, None] < lengths.to(input.device))[..., None]
    if reset is not None:
        cut = turned(reset).to(input.device)[..., None]
        # At step 0 it is hx that is dropped, before the operator; where there is no token, nothing.
        cut = torch.cat([torch.zeros_like(cut[:1]), cut[1:] if live is None else (cut & live)[1:]])
    if live is None:
        return _Grid(turned, turned, cut=cut)
    return _Grid(
        lambda rows: torch.where(live, turned(rows), 0),
        lambda steps: turned(torch.where(live, steps, 0)),
        live,
        cut,
        padded=True,
    )
