"""The row map: where every token of an input lies, by one formula for every kind of input.

The dimension key, used everywhere in tritonrnn:

    T   time steps            I   input size
    B   sequences             H   hidden units
    N   tokens, i.e. rows     G   groups, i.e. directions
    L   layers                D   directions, where torch's names are used: G of a layer

A token (t, b) lives in row ``time_base[t] + batch_base[b]`` of a ``[N, features]`` matrix, and
sequence b has ``lengths[b]`` tokens:

    input                       time_base[t]          batch_base[b]
    (T, B, F)                   t * B                 b
    (B, T, F), batch_first      t                     b * T
    PackedSequence              sum(batch_sizes[:t])  b
    jagged, ``offsets``         t                     offsets[b]

So the recurrence needs no padding, unpacking or transposition, and lengths need not be sorted. This
file has the first three, in which every row is a token and every sequence has at least one.
``ragged.py`` has the fourth, padded batches whose sequences end early, and sequences that resets
split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tritonrnn.memo import derive_once

# An index of rows of a matrix: a slice where possible, because a slice makes a view.
Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """The rows of a batch of T steps and B sequences in N rows.

    Build it with :meth:`time_major`, :meth:`batch_major` or :meth:`packed`. Each tensor is derived
    when first asked for: torch never derives what only a kernel reads, nor the other way round. It
    is derived on the CPU, whatever torch's default device is.
    """

    T: int
    B: int
    N: int
    batch_first: bool = False
    batch_sizes: tuple[int, ...] | None = None

    @classmethod
    def time_major(cls, T: int, B: int) -> SequenceLayout:
        """Return the layout of a padded batch ``(T, B, F)``."""
        return cls(T, B, T * B)

    @classmethod
    def batch_major(cls, B: int, T: int) -> SequenceLayout:
        """Return the layout of a padded batch ``(B, T, F)``."""
        return cls(T, B, T * B, batch_first=True)

    @classmethod
    def packed(cls, batch_sizes: Sequence[int], num_rows: int) -> SequenceLayout:
        """Return the layout of a ``PackedSequence``'s data: ``batch_sizes[t]`` rows for step t.

        Raises:
            IndexError, RuntimeError: what :func:`check_batch_sizes` raises.
        """
        sizes = list(batch_sizes)
        check_batch_sizes(sizes, num_rows)
        return cls(len(sizes), sizes[0], num_rows, batch_sizes=tuple(sizes))

    @classmethod
    def of_packed(cls, batch_sizes: Tensor, num_rows: int) -> SequenceLayout:
        """Return :meth:`packed` of a tensor, the same one for one copy of :func:`memo.take`.

        So all layers and both passes of a call share what is derived from it.
        """
        return derive_once(
            [batch_sizes], num_rows, lambda sizes: cls.packed(sizes.tolist(), num_rows)
        )

    @cached_property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each sequence, ``[B]`` int64."""
        if self.batch_sizes is not None:
            # batch_sizes never grows, so sequence b has as many tokens as there are steps of more
            # than b rows. The search needs ascending order.
            ascending = torch.tensor(self.batch_sizes[::-1], dtype=torch.int64, device="cpu")
            b = torch.arange(self.B, device="cpu")
            return self.T - torch.searchsorted(ascending, b, right=True)
        return torch.full((self.B,), self.T, device="cpu")

    @cached_property
    def time_base(self) -> Tensor:
        """Return the row map's term of each step, ``[T]`` int64, on the device of lengths."""
        if self.batch_sizes is not None:
            before = list(accumulate(self.batch_sizes, initial=0))[:-1]
            return torch.tensor(before, dtype=torch.int64, device="cpu")
        return torch.arange(self.T, device="cpu") * (1 if self.batch_first else self.B)

    @cached_property
    def batch_base(self) -> Tensor:
        """Return the row map's term of each sequence, ``[B]`` int64, on the device of lengths."""
        return torch.arange(self.B, device="cpu") * (self.T if self.batch_first else 1)

    @property
    def padded_T(self) -> int:
        """Return the steps that a sequence has rows for."""
        return self.T

    @property
    def strides(self) -> tuple[int, int]:
        """Return the rows from a step to the next, and from a sequence to the next.

        Each where :meth:`terms` has no tensor instead.
        """
        return (1, self.T) if self.batch_first else (self.B, 1)

    def terms(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return ``time_base``, ``batch_base`` and ``lengths``, int64, on a device.

        None for a base that follows from :attr:`strides`, and for lengths that are all T.
        """
        if self.is_padded:
            return None, None, None
        row_map = self._on(device, "_row_map")
        lengths, batch_base = row_map[: self.B], row_map[self._even_B : self._even_B + self.B]
        return row_map[2 * self._even_B :], batch_base, lengths

    @cached_property
    def _row_map(self) -> Tensor:
        # One copy to the GPU of all three. Each begins on 16 bytes: Triton compiles anew for other
        # pointers.
        gap = self.lengths[: self._even_B - self.B]
        return torch.cat([self.lengths, gap, self.batch_base, gap, self.time_base])

    @property
    def _even_B(self) -> int:
        return self.B + self.B % 2

    def _on(self, device: torch.device, name: str) -> Tensor:
        """Return a tensor attribute on a device: all layers and passes share one async copy.

        A copy belongs to the stream on which it was queued. While a CUDA graph is captured, the
        copy is a new one, in the graph's own memory.
        """
        rows = getattr(self, name)
        if rows.device == device or device.type != "cuda" or rows.is_cuda:
            return rows.to(device)
        if torch.cuda.is_current_stream_capturing():
            return rows.pin_memory().to(device, non_blocking=True)
        key = name, torch.cuda.current_stream(device)
        if key not in self._copies:
            self._copies[key] = rows.pin_memory().to(device, non_blocking=True)
        return self._copies[key]

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.cuda.Stream], Tensor]:
        return {}

    @property
    def is_padded(self) -> bool:
        """Return whether every sequence has T tokens."""
        return self.batch_sizes is None

    @property
    def is_ragged(self) -> bool:
        """Return whether it is a layout of ``ragged.py``."""
        return False

    @property
    def parent(self) -> SequenceLayout:
        """Return the layout of the caller's sequences, which have the initial and final states.

        It is another one where resets split sequences, see ``ragged.py``.
        """
        return self

    def initial_states(self, v_0: Tensor, reverse: Sequence[bool]) -> Tensor:
        """Return the initial states of this layout's sequences, ``[G, B, H]``.

        Args:
            v_0: those of the parent's sequences, ``[G, parent.B, H]``.
            reverse: for each group whether it starts at the last token of a sequence.
        """
        return v_0

    def first_rows(self, device: torch.device) -> Rows:
        """Return the row of every sequence's first token, or any row where it has none."""
        return slice(0, self.N, self.T) if self.batch_first else slice(0, self.B)

    def last_rows(self, device: torch.device) -> Rows:
        """Return the row of every sequence's last token, or any row where it has none."""
        if self.batch_first:
            return slice(self.T - 1, self.N, self.T)
        if self.is_padded:
            return slice(self.N - self.B, self.N)
        return self._on(device, "_last_rows")

    @cached_property
    def _last_rows(self) -> Tensor:
        assert self.batch_sizes is not None
        # In Python: a batch of tens of sequences has them before torch has begun three operations.
        rows: list[int] = []
        end = self.N
        for size in reversed(self.batch_sizes):
            start = end - size
            rows += range(start + len(rows), end)
            end = start
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def empty(self, device: torch.device) -> Tensor | None:
        """Return which sequences have no token, ``[B]`` bool, or None if all have one."""
        return None

    def live_rows(self, device: torch.device) -> Tensor | None:
        """Return which rows hold a token, ``[N]`` bool, or None if all do."""
        return None

    def final_state(self, matrix: Tensor, backwards: bool, otherwise: Tensor | None) -> Tensor:
        """Return the last row of each sequence in one direction, ``[B, F]``.

        Args:
            matrix: ``[N, F]``.
            backwards: whether the last row is that of the first token.
            otherwise: ``[B, F]``, for the sequences without a token; None for zero.
        """
        device = matrix.device
        if self.N == 0:
            states = matrix.new_zeros(self.B, matrix.shape[1])
        else:
            states = matrix[self.first_rows(device) if backwards else self.last_rows(device)]
        empty = self.empty(device)
        if empty is None:
            return states
        if otherwise is None:
            return states.masked_fill(empty[:, None], 0)
        return torch.where(empty[:, None], otherwise, states)

    def final_states(
        self, matrix: Tensor, reverse: Sequence[bool], otherwise: Tensor | None
    ) -> Tensor:
        """Return the last row of each of the parent's sequences and groups, ``[G, B, H]``.

        Args:
            matrix: ``[N, G * H]``.
            reverse: for each group whether the last row is that of the first token.
            otherwise: ``[G, B, H]``, for the sequences without a token; None for zero.
        """
        parent = self.parent
        states = [
            parent.final_state(columns, backwards, None if otherwise is None else otherwise[g])
            for g, (columns, backwards) in enumerate(zip(matrix.chunk(len(reverse), 1), reverse))
        ]
        # A copy: results may not be views of one another.
        return torch.stack(states)

    def adjacent_rows(self, device: torch.device) -> tuple[Rows, Rows]:
        """Return rows ``(earlier, later)``: pairs of consecutive tokens of one sequence.

        They include pairs with a padding row, and those at :meth:`crossing_pairs`, because slices
        can't leave them out.
        """
        if self.batch_first:
            return slice(0, max(self.N - 1, 0)), slice(1, self.N)
        if self.batch_sizes is None:
            return slice(0, self.N - self.B), slice(self.B, self.N)
        return self._on(device, "_earlier_rows"), slice(self.B, self.N)

    def crossing_pairs(self, device: torch.device) -> Rows | None:
        """Return which of the :meth:`adjacent_rows` are of two sequences, or None if none are."""
        return slice(self.T - 1, None, self.T) if self.batch_first else None

    @cached_property
    def _earlier_rows(self) -> Tensor:
        sizes = torch.tensor(self.batch_sizes, device="cpu")
        # Between row (t, b) and row (t - 1, b) lie the batch_sizes[t - 1] rows of step t - 1.
        distance = sizes[:-1].repeat_interleave(sizes[1:])
        return torch.arange(self.B, self.N, device="cpu") - distance

    @property
    def packed_form(self) -> PackedForm | None:
        """Return the layout for the paths in torch if :meth:`steps` can't serve them, else None."""
        return None

    def steps(self, matrix: Tensor) -> Sequence[Tensor]:
        """Return views of the rows of ``matrix [N, F]`` by step, the longest sequence first."""
        if self.batch_sizes is not None:
            return matrix.split(self.batch_sizes)
        if self.batch_first:
            return matrix.unflatten(0, (self.B, self.T)).unbind(1)
        return matrix.unflatten(0, (self.T, self.B)).unbind(0)

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        """Return the matrix ``[N, F]`` that has these :meth:`steps`."""
        if self.batch_first:
            return torch.stack(list(steps), 1).flatten(0, 1)
        return torch.cat(list(steps))


class PackedForm(NamedTuple):
    """The tokens of a layout in the order of a ``PackedSequence``.

    Attributes:
        rows: the row of each token, step by step.
        order: the sequences that have a token, the longest first.
        layout: of the tokens in this order.
    """

    rows: Tensor
    order: Tensor
    layout: SequenceLayout


def is_in_memory(x: Tensor) -> bool:
    """Return whether the values of a tensor are in its memory, which is all that a kernel sees."""
    return not x.is_neg() and not x._is_zerotensor()


def check_has_steps(shape: Sequence[int], layout: str) -> None:
    """Check that a padded input has a step.

    Raises:
        RuntimeError: it has none.
    """
    if layout in ("time_major", "batch_major") and shape[1 if layout == "batch_major" else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def check_batch_sizes(batch_sizes: list[int], num_rows: int) -> None:
    """Check that batch_sizes describe the rows of a ``PackedSequence``.

    Raises:
        IndexError: ``batch_sizes`` is empty.
        RuntimeError: it grows, has a value below 1, or does not add up to ``num_rows``.
            (``torch.nn.RNN`` raises the same two, or silently drops rows or steps.)
    """
    if not batch_sizes:
        raise IndexError("Expected batch_sizes of a PackedSequence to be non-empty")
    # Sorting what is sorted takes less than a comparison of each pair in Python.
    if batch_sizes[-1] < 1 or batch_sizes != sorted(batch_sizes, reverse=True):
        raise RuntimeError(
            "Expected batch_sizes of a PackedSequence to be positive and never to grow, "
            f"got {abridged(batch_sizes)}"
        )
    if sum(batch_sizes) != num_rows:
        raise RuntimeError(
            f"Expected batch_sizes of a PackedSequence to add up to its {num_rows} rows, "
            f"got {sum(batch_sizes)}"
        )


def abridged(values: Sequence[int]) -> str:
    """Return values for a message, the first few if there are many."""
    shown = ", ".join(map(str, values[:8]))
    return f"({shown}, ... {len(values)} in all)" if len(values) > 8 else f"({shown})"
