"""The right result: the Elman recurrence written out, and how far from it a result may be.

The recurrence is run in float64. It shares no code with tritonrnn; a test holds it against
``torch.nn.RNN`` and against finite differences. ``recurrence`` runs it over the rows of a layout's
sequences, as a kernel does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

# E(z, y) of the forward pass, which ignores y, and of the backward pass, where y is a state.
EPILOGUES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "tanh": lambda z, y: torch.tanh(z),
    "relu": lambda z, y: torch.relu(z),
    "tanh_grad": lambda z, y: z * (1 - y * y),
    "relu_grad": lambda z, y: torch.where(y > 0, z, 0),
}

# A result may be off by twice the error of torch.nn.RNN at the same precision.
ALLOWED_ERRORS = 2.0
# Roundings that are allowed where torch.nn.RNN is exact by chance, or can't run the problem.
ALLOWED_ROUNDINGS = 8
# In float64 the oracle is no more exact than the result that it judges.
FLOAT64_ROUNDINGS = 32


class InaccurateError(AssertionError):
    """A result is further from the oracle than it may be."""


def scan(
    a: Iterable[Tensor],
    M: Tensor,
    state: Tensor | None,
    epilogue: str,
    aux: Iterable[Tensor] | None = None,
    *,
    operand: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[list[Tensor], Tensor]:
    """Run s_t = E(a_t + M s_{t-1}, aux_t), one step after the other.

    Args:
        a: For each step ``[H]``, or ``[n, H]`` for the first n sequences of a batch.
        M: ``[H, H]``.
        state: s_{-1}, ``[H]`` or ``[B, H]``; if None, the first step has no product.
        epilogue: E, a key of ``EPILOGUES``.
        aux: As ``a``; the states of the forward pass for an epilogue that differentiates.
        operand: Applied to both operands of every product; a rounding, for instance.

    Returns:
        The states of every step, and the last state of every sequence.
    """
    M = operand(M)
    states = []
    for a_t, aux_t in zip(a, itertools.repeat(None) if aux is None else aux):
        z = a_t if state is None else a_t + operand(state[: len(a_t)]) @ M.T
        s_t = EPILOGUES[epilogue](z, aux_t)
        states.append(s_t)
        if state is None or len(s_t) == len(state):
            state = s_t
        else:
            # Sequences that have ended, or not begun, keep their state.
            state = torch.cat([s_t, state[len(s_t) :]])
    assert state is not None, "no step"
    return states, state


def elman(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_sizes: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)       (Elman 1990; torch.nn.RNN).

    Args:
        input: ``[T, I]``, ``[T, B, I]``, or the rows ``[N, I]`` of a packed batch.
        hx: ``[L * D, H]`` for one sequence, else ``[L * D, B, H]``.
        weights: In the order of torch.nn.RNN's parameters, with biases or without.
        nonlinearity: φ, "tanh" or "relu".
        num_layers: L.
        bidirectional: Whether D is 2.
        batch_sizes: The number of rows of each step of a packed batch.
        dropout: Probability of dropping an output between two layers.

    Returns:
        The output, with D * H features, and ``h_n`` in the shape of ``hx``.
    """
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (num_layers * directions)
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, *biases = weights[index * per_direction : (index + 1) * per_direction]
            drive = input @ w_ih.T + sum(biases)
            a = drive.unbind() if batch_sizes is None else drive.split(list(batch_sizes))
            order = -1 if direction else 1
            states, state = scan(a[::order], w_hh, hx[index], nonlinearity)
            join = torch.stack if batch_sizes is None else torch.cat
            outputs.append(join(states[::order]))
            last.append(state)
        input = torch.cat(outputs, -1)
        if dropout and layer + 1 < num_layers:
            input = functional.dropout(input, dropout)
    return input, torch.stack(last)


class RNN(nn.RNN):
    """Run :func:`elman` behind torch.nn.RNN's interface: a module with the same weights."""

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None):  # type: ignore[override]
        """Return output and ``h_n`` for an input of any layout of torch.nn.RNN."""
        if isinstance(input, PackedSequence):
            rows, sizes, sorted_indices, unsorted_indices = input
            if hx is not None and sorted_indices is not None:
                hx = hx[:, sorted_indices]
            output, h_n = self._run(rows, hx, sizes.tolist())
            if unsorted_indices is not None:
                h_n = h_n[:, unsorted_indices]
            return input._replace(data=output), h_n
        if self.batch_first and input.dim() == 3:
            output, h_n = self._run(input.transpose(0, 1), hx)
            return output.transpose(0, 1), h_n
        return self._run(input, hx)

    def _run(
        self, rows: Tensor, hx: Tensor | None, batch_sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = rows.shape[1:-1] if batch_sizes is None else (batch_sizes[0],)
        directions = 2 if self.bidirectional else 1
        if hx is None:
            hx = rows.new_zeros(directions * self.num_layers, *batch, self.hidden_size)
        return elman(
            rows,
            hx,
            # By name, as a parametrised weight is no parameter.
            [getattr(self, name) for name in self._flat_weights_names],
            nonlinearity=self.nonlinearity,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_sizes=batch_sizes,
            dropout=self.dropout if self.training else 0.0,
        )


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the distance in the 2-norm, relative to ``exact``.

    It is steady where the largest error of an element is luck, for a few elements most of all.
    """
    exact = exact.to(torch.complex128 if exact.is_complex() else torch.float64)
    norm = exact.norm()
    return ((got.to(exact) - exact).norm() / norm).item() if norm else 0.0


def assert_as_accurate(
    got: Sequence[Tensor],
    torchs: Sequence[Tensor] | None,
    exact: Sequence[Tensor],
    name: str = "result",
    dtype: torch.dtype | None = None,
) -> None:
    """Check that results are about as close to the oracle as torch.nn.RNN's.

    The median error of several draws may be twice that of torch's, plus one rounding. relu in low
    precision needs several draws: a unit that rounding moves across 0 changes a gradient by far
    more than rounding does, on either side.

    Args:
        got: One result, of each draw of a problem.
        torchs: The same of torch.nn.RNN, or None if it can't run the problem.
        exact: The same of the oracle, in float64.
        name: Names the result in the message.
        dtype: Its eps is the rounding; if None, the dtype of the results.

    Raises:
        InaccurateError: the results are further off, not finite, or of another shape or dtype.
    """
    for one, other in zip(got, exact if torchs is None else torchs):
        if one.shape != other.shape or (torchs is not None and one.dtype != other.dtype):
            raise InaccurateError(
                f"{name}: expected {tuple(other.shape)} {other.dtype}, "
                f"got {tuple(one.shape)} {one.dtype}"
            )
        if not one.isfinite().all():
            raise InaccurateError(f"{name}: not finite")
    dtype = dtype or got[0].dtype
    error = median(map(relative_error, got, exact))
    eps = torch.finfo(dtype).eps
    if torch.finfo(dtype).bits == 64:
        allowed = FLOAT64_ROUNDINGS * eps
    else:
        allowed = eps if torchs is not None else ALLOWED_ROUNDINGS * eps
    if torchs is not None:
        allowed += ALLOWED_ERRORS * median(map(relative_error, torchs, exact))
    if not error <= allowed:
        raise InaccurateError(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")


def sequences(layout: SequenceLayout) -> list[list[int]]:
    """Return the rows of each sequence, from its first token to its last."""
    if isinstance(layout, RaggedLayout):
        bounds = zip(layout.batch_base.tolist(), layout.lengths.tolist())
        return [
            list(range(first, first + count * layout.stride, layout.stride))
            for first, count in bounds
        ]
    rows: list[list[int]] = [[] for _ in range(layout.B)]
    if layout.batch_sizes is not None:
        order = [b for size in layout.batch_sizes for b in range(size)]
    elif layout.batch_first:
        order = [b for b in range(layout.B) for _ in range(layout.T)]
    else:
        order = [b for _ in range(layout.T) for b in range(layout.B)]
    for row, b in enumerate(order):
        rows[b].append(row)
    return rows


def recurrence(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: tuple[bool, ...],
    dtype: torch.dtype = torch.float64,
    operand: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return what ``tritonrnn.kernels.launch.recurrence`` stores in ``s``, in ``dtype``.

    v_0 takes the place of M s_{t-1} at the first step of a sequence. In a narrow dtype it rounds
    wherever a loop of torch operators would; its distance from float64 is then the yardstick for
    the kernels. Rows of no sequence are 0.
    """
    H = M.shape[-1]
    s = torch.zeros(a.shape, dtype=dtype, device=a.device)
    for b, rows in enumerate(sequences(layout)):
        for g, backwards in enumerate(reverse if rows else ()):
            columns = slice(g * H, (g + 1) * H)
            order = rows[::-1] if backwards else rows
            steps = list(a[order, columns].to(dtype))
            if v_0 is not None:
                # Added in the dtype of v_0, which only float64 exceeds.
                wide = torch.promote_types(dtype, v_0.dtype)
                steps[0] = (steps[0].to(wide) + v_0[g, b]).to(dtype)
            y = None if aux is None else aux[order, columns].to(dtype)
            states, _ = scan(steps, M[g].to(dtype), None, epilogue, y, operand=operand)
            s[order, columns] = torch.stack(states)
    return s


def round_to_tf32(x: Tensor) -> Tensor:
    """Round to 10 fraction bits, ties away from zero."""
    fraction, exponent = torch.frexp(x.double())
    magnitude = torch.floor(fraction.abs() * 2**11 + 0.5) / 2**11
    return torch.copysign(torch.ldexp(magnitude, exponent), x.double()).to(x.dtype)
