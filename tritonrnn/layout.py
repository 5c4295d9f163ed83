"""One row map for every kind of input.

The dimension key, used everywhere in tritonrnn:

    T   time steps            I   input size
    B   sequences             H   hidden units
    N   tokens, i.e. rows     G   groups, i.e. directions

A token (t, b) lives in row ``time_base[t] + batch_base[b]`` of a ``[N, features]`` matrix, and
sequence b has ``lengths[b]`` tokens:

    input                       time_base[t]          batch_base[b]
    (T, B, F)                   t * B                 b
    (B, T, F), batch_first      t                     b * T
    PackedSequence              sum(batch_sizes[:t])  b
    jagged, ``offsets``         t                     offsets[b]

So no input is padded, unpacked or transposed to be walked, and lengths need not be sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# What selects rows of a matrix: a slice where one does, which makes views of what it selects.
Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Where every token of a batch lives: T steps, B sequences, N rows.

    Build it with :meth:`time_major`, :meth:`batch_major`, :meth:`packed` or :meth:`jagged`. What
    is costly to derive is derived when first asked for, so that a walk in torch never builds the
    tensors that only a kernel reads, nor the other way round.
    """

    T: int
    B: int
    N: int
    batch_first: bool = False
    batch_sizes: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None

    @classmethod
    def time_major(cls, T: int, B: int) -> SequenceLayout:
        """A padded batch ``(T, B, F)``."""
        return cls(T, B, T * B)

    @classmethod
    def batch_major(cls, B: int, T: int) -> SequenceLayout:
        """A padded batch ``(B, T, F)``."""
        return cls(T, B, T * B, batch_first=True)

    @classmethod
    def packed(cls, batch_sizes: Sequence[int], num_rows: int) -> SequenceLayout:
        """The data of a ``PackedSequence``: ``batch_sizes[t]`` rows for step t.

        Raises:
            IndexError: ``batch_sizes`` is empty.
            RuntimeError: it grows, holds a number below 1, or does not add up to ``num_rows``.
                (``torch.nn.RNN`` raises the same two, or silently drops rows or steps.)
        """
        sizes = tuple(batch_sizes)
        if not sizes:
            raise IndexError("Expected batch_sizes of a PackedSequence to be non-empty")
        if sizes[-1] < 1 or any(later > earlier for earlier, later in pairwise(sizes)):
            raise RuntimeError(
                "Expected batch_sizes of a PackedSequence to be positive and never to grow, "
                f"got {_abridged(sizes)}"
            )
        if sum(sizes) != num_rows:
            raise RuntimeError(
                f"Expected batch_sizes of a PackedSequence to add up to its {num_rows} rows, "
                f"got {sum(sizes)}"
            )
        return cls(len(sizes), sizes[0], num_rows, batch_sizes=sizes)

    @classmethod
    def of_packed(cls, batch_sizes: Tensor, num_rows: int) -> SequenceLayout:
        """:meth:`packed` of a tensor, remembered for as long as the tensor lives unchanged.

        So all layers of a call share what is derived from it, and the backward pass as well.
        """
        sizes = tuple(batch_sizes.tolist())
        layout = _packed.get(batch_sizes)
        if layout is None or layout.batch_sizes != sizes or layout.N != num_rows:
            layout = _packed[batch_sizes] = cls.packed(sizes, num_rows)
        return layout

    @classmethod
    def jagged(cls, offsets: Sequence[int], num_rows: int) -> SequenceLayout:
        """Sequences one after the other: sequence b is rows ``offsets[b]:offsets[b + 1]``.

        Raises:
            ValueError: ``offsets`` does not start at 0, falls, or does not end at ``num_rows``.
        """
        bounds = tuple(offsets)
        if not bounds or bounds[0] != 0 or bounds[-1] != num_rows:
            raise ValueError(
                f"Expected offsets to run from 0 to the {num_rows} rows, got {_abridged(bounds)}"
            )
        if any(later < earlier for earlier, later in pairwise(bounds)):
            raise ValueError(f"Expected offsets never to fall, got {_abridged(bounds)}")
        lengths = [later - earlier for earlier, later in pairwise(bounds)]
        return cls(max(lengths, default=0), len(lengths), num_rows, offsets=bounds)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, ``[B]`` int64 on the CPU."""
        if self.offsets is not None:
            return torch.tensor(self.offsets, dtype=torch.int64).diff()
        if self.batch_sizes is not None:
            # batch_sizes never grows, so sequence b is alive in as many steps as have more than
            # b rows: a search in the ascending order.
            ascending = torch.tensor(self.batch_sizes[::-1], dtype=torch.int64)
            return self.T - torch.searchsorted(ascending, torch.arange(self.B), right=True)
        return torch.full((self.B,), self.T, dtype=torch.int64)

    @cached_property
    def time_base(self) -> Tensor:
        """``[T]`` int64 on the CPU."""
        if self.batch_sizes is not None:
            return torch.tensor(list(accumulate(self.batch_sizes, initial=0))[:-1])
        return torch.arange(self.T) * (1 if self.sequence_major else self.B)

    @cached_property
    def batch_base(self) -> Tensor:
        """``[B]`` int64 on the CPU."""
        if self.offsets is not None:
            return torch.tensor(self.offsets[:-1], dtype=torch.int64)
        return torch.arange(self.B) * (self.T if self.batch_first else 1)

    def row_map(self, device: torch.device) -> Tensor:
        """``time_base[T], batch_base[B], lengths[B]`` as one int64 tensor on a device."""
        return self._on(device, "row_map", self._host_map)

    def _on(self, device: torch.device, name: str, rows: Tensor) -> Tensor:
        """Row numbers on a device: one pinned, asynchronous copy for all layers and passes.

        A copy belongs to the stream that it was queued on. A CUDA graph that is being captured
        gets one of its own, in its own memory.
        """
        if device.type != "cuda":
            return rows.to(device)
        if torch.cuda.is_current_stream_capturing():
            return rows.pin_memory().to(device, non_blocking=True)
        key = name, torch.cuda.current_stream(device)
        if key not in self._copies:
            self._copies[key] = rows.pin_memory().to(device, non_blocking=True)
        return self._copies[key]

    @cached_property
    def _host_map(self) -> Tensor:
        return torch.cat([self.time_base, self.batch_base, self.lengths])

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.cuda.Stream], Tensor]:
        return {}

    @property
    def is_padded(self) -> bool:
        """Whether every sequence has all T tokens."""
        return self.batch_sizes is None and self.offsets is None

    @property
    def sequence_major(self) -> bool:
        """Whether consecutive tokens of a sequence are consecutive rows."""
        return self.batch_first or self.offsets is not None

    def first_rows(self, device: torch.device) -> Rows:
        """The row of every sequence's first token (meaningless where it has none)."""
        if self.offsets is not None:
            return self._on(device, "first_rows", self.batch_base)
        return slice(0, self.N, self.T) if self.batch_first else slice(0, self.B)

    def last_rows(self, device: torch.device) -> Rows:
        """The row of every sequence's last token (meaningless where it has none)."""
        if self.batch_first:
            return slice(self.T - 1, self.N, self.T)
        if self.is_padded:
            return slice(self.N - self.B, self.N)
        return self._on(device, "last_rows", self._last_rows)

    @cached_property
    def _last_rows(self) -> Tensor:
        return self.batch_base + self.time_base[self.lengths - 1]

    def neighbours(self, device: torch.device) -> tuple[Rows, Rows]:
        """Rows ``(earlier, later)``, pair by pair two consecutive tokens of one sequence.

        Where :attr:`sequence_major`, the last token of a sequence is paired with the first of the
        next one as well, so that both are plain slices: who uses them takes those pairs out.
        """
        if self.sequence_major:
            return slice(0, max(self.N - 1, 0)), slice(1, self.N)
        if self.batch_sizes is None:
            return slice(0, self.N - self.B), slice(self.B, self.N)
        return self._on(device, "earlier_rows", self._earlier_rows), slice(self.B, self.N)

    @cached_property
    def _earlier_rows(self) -> Tensor:
        sizes = torch.tensor(self.batch_sizes)
        # Between row (t, b) and row (t - 1, b) lie the batch_sizes[t - 1] rows of step t - 1.
        distance = sizes[:-1].repeat_interleave(sizes[1:])
        return torch.arange(self.B, self.N) - distance

    @cached_property
    def jagged_steps(self) -> list[Tensor]:
        """For every step the rows that are live in it, the longest sequence first."""
        order = torch.argsort(self.lengths, descending=True, stable=True)
        longest_first = self.batch_base[order]
        alive = (self.lengths > torch.arange(self.T)[:, None]).sum(1)
        return [longest_first[:count] + t for t, count in enumerate(alive.tolist())]

    def steps(self, matrix: Tensor) -> Sequence[Tensor]:
        """The live rows of ``matrix [N, F]`` step by step, the longest sequence first.

        Views, except of a jagged matrix, whose steps are gathered.
        """
        if self.offsets is not None:
            return [matrix[rows] for rows in self.jagged_steps]
        if self.batch_sizes is not None:
            return matrix.split(self.batch_sizes)
        if self.batch_first:
            return matrix.unflatten(0, (self.B, self.T)).unbind(1)
        return matrix.unflatten(0, (self.T, self.B)).unbind(0)

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`steps`: a new ``[N, F]`` matrix."""
        if self.batch_first:
            return torch.stack(list(steps), 1).flatten(0, 1)
        rows = torch.cat(list(steps))
        if self.offsets is not None:
            return rows[torch.argsort(torch.cat(self.jagged_steps))]
        return rows


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _abridged(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"({shown}, ... {len(numbers)} in all)" if len(numbers) > 8 else f"({shown})"
