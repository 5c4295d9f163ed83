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

So no input is padded, unpacked or transposed to be walked, and lengths need not be sorted. Here are
the first three, in which every row is a token and every sequence has one; ``ragged.py`` has the
fourth, padded batches whose sequences end early, and sequences that a reset cuts in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tritonrnn.memo import Memo

# What selects rows of a matrix: a slice where one does, which makes views of what it selects.
Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Where every token of a batch lives: T steps, B sequences, N rows.

    Build it with :meth:`time_major`, :meth:`batch_major` or :meth:`packed`. What is costly to
    derive is derived when first asked for, so that a walk in torch never builds the tensors that
    only a kernel reads, nor the other way round.
    """

    T: int
    B: int
    N: int
    batch_first: bool = False
    batch_sizes: tuple[int, ...] | None = None

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
                f"got {abridged(sizes)}"
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
        return _packed.get(
            [batch_sizes], num_rows, lambda: cls.packed(batch_sizes.tolist(), num_rows)
        )

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, ``[B]`` int64."""
        if self.batch_sizes is not None:
            # batch_sizes never grows, so sequence b is alive in as many steps as have more than
            # b rows: a search in the ascending order.
            ascending = torch.tensor(self.batch_sizes[::-1], dtype=torch.int64)
            return self.T - torch.searchsorted(ascending, torch.arange(self.B), right=True)
        return torch.full((self.B,), self.T, dtype=torch.int64)

    @cached_property
    def time_base(self) -> Tensor:
        """``[T]`` int64, where :attr:`lengths` is."""
        if self.batch_sizes is not None:
            before = list(accumulate(self.batch_sizes, initial=0))[:-1]
            return torch.tensor(before, dtype=torch.int64)
        return torch.arange(self.T) * (1 if self.batch_first else self.B)

    @cached_property
    def batch_base(self) -> Tensor:
        """``[B]`` int64, where :attr:`lengths` is."""
        return torch.arange(self.B) * (self.T if self.batch_first else 1)

    def row_map(self, device: torch.device) -> Tensor:
        """``time_base[T], batch_base[B], lengths[B]`` as one int64 tensor on a device."""
        return self._on(device, "_row_map")

    @cached_property
    def _row_map(self) -> Tensor:
        return torch.cat([self.time_base, self.batch_base, self.lengths])

    def _on(self, device: torch.device, name: str) -> Tensor:
        """An attribute, on a device: one pinned, asynchronous copy for all layers and passes.

        A copy belongs to the stream that it was queued on. A CUDA graph that is being captured
        gets one of its own, in its own memory.
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
        """Whether every sequence has all T tokens."""
        return self.batch_sizes is None

    @property
    def is_ragged(self) -> bool:
        """Whether it is one of ``ragged.py``."""
        return False

    @property
    def whole(self) -> SequenceLayout:
        """The layout of the sequences that states are given and returned for.

        Another one where sequences are cut, see ``ragged.py``.
        """
        return self

    def entering(self, v_0: Tensor, reverse: Sequence[bool]) -> Tensor:
        """``v_0`` of this layout's sequences, ``[G, B, H]``, from that of the whole ones.

        Args:
            v_0: what enters each whole sequence, ``[G, whole.B, H]``.
            reverse: for each group whether it enters at the last token, not the first.
        """
        return v_0

    def first_rows(self, device: torch.device) -> Rows:
        """The row of every sequence's first token; any row where it has none."""
        return slice(0, self.N, self.T) if self.batch_first else slice(0, self.B)

    def last_rows(self, device: torch.device) -> Rows:
        """The row of every sequence's last token; any row where it has none."""
        if self.batch_first:
            return slice(self.T - 1, self.N, self.T)
        if self.is_padded:
            return slice(self.N - self.B, self.N)
        return self._on(device, "_last_rows")

    @cached_property
    def _last_rows(self) -> Tensor:
        return self.batch_base + self.time_base[self.lengths - 1]

    def empty(self, device: torch.device) -> Tensor | None:
        """Which sequences have no token, ``[B]`` bool, or None where all have one."""
        return None

    def dead_rows(self, device: torch.device) -> Tensor | None:
        """Which rows hold no token, ``[N]`` bool, or None where all hold one."""
        return None

    def neighbours(self, device: torch.device) -> tuple[Rows, Rows]:
        """Rows ``(earlier, later)``, pair by pair two consecutive tokens of one sequence.

        The pairs at :meth:`seams` are none: they are here so that slices do.
        """
        if self.batch_first:
            return slice(0, max(self.N - 1, 0)), slice(1, self.N)
        if self.batch_sizes is None:
            return slice(0, self.N - self.B), slice(self.B, self.N)
        return self._on(device, "_earlier_rows"), slice(self.B, self.N)

    def seams(self, device: torch.device) -> tuple[Rows, Rows] | None:
        """Rows ``(last, first)`` where :meth:`neighbours` pairs what is of two sequences, or None.

        Every pair to be left out has its earlier row in ``last`` and its later one in ``first``,
        and no other pair has either.
        """
        if self.batch_first:
            return self.last_rows(device), self.first_rows(device)
        return None

    @cached_property
    def _earlier_rows(self) -> Tensor:
        sizes = torch.tensor(self.batch_sizes)
        # Between row (t, b) and row (t - 1, b) lie the batch_sizes[t - 1] rows of step t - 1.
        distance = sizes[:-1].repeat_interleave(sizes[1:])
        return torch.arange(self.B, self.N) - distance

    @property
    def packed_form(self) -> PackedForm | None:
        """How to walk these sequences in torch where :meth:`steps` can't, else None."""
        return None

    def steps(self, matrix: Tensor) -> Sequence[Tensor]:
        """The rows of ``matrix [N, F]`` step by step, the longest sequence first: views."""
        if self.batch_sizes is not None:
            return matrix.split(self.batch_sizes)
        if self.batch_first:
            return matrix.unflatten(0, (self.B, self.T)).unbind(1)
        return matrix.unflatten(0, (self.T, self.B)).unbind(0)

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`steps`: a new ``[N, F]`` matrix."""
        if self.batch_first:
            return torch.stack(list(steps), 1).flatten(0, 1)
        return torch.cat(list(steps))


class PackedForm(NamedTuple):
    """The tokens of a layout in the order of a ``PackedSequence``.

    Attributes:
        rows: where they are, step by step.
        order: the sequences that have a token, the longest first.
        layout: of those rows.
    """

    rows: Tensor
    order: Tensor
    layout: SequenceLayout


_packed: Memo[SequenceLayout] = Memo()


def abridged(numbers: Sequence[int]) -> str:
    """Numbers for a message, the first few of many."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"({shown}, ... {len(numbers)} in all)" if len(numbers) > 8 else f"({shown})"
