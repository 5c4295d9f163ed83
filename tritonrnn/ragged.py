"""Row maps of ragged batches without packing: jagged rows, lengths of a padded batch, resets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tritonrnn.layout import PackedForm, Rows, SequenceLayout, abridged
from tritonrnn.memo import derive_once


@dataclass(frozen=True, eq=False, kw_only=True)
class RaggedLayout(SequenceLayout):
    """Sequences of any lengths, also 0, with a fixed number of rows from token to token.

    Build it with :meth:`jagged` or :meth:`padded`, then :meth:`split_at_resets`. Its tensors are on
    the device of the lengths. Only methods whose docstring says so wait for that device.

    Args:
        stride: rows from a token of a sequence to its next.
        lengths: ``[B]``, each sequence's number of tokens.
        first: ``[B]``, each sequence's first row, or None in a padded batch.
        padding: ``(T, B)`` of a padded batch with lengths, or None if every row is a token.
        split_from: the layout before the split at resets, and the index in it of the sequence that
            each of these was part of, ascending, ``[B]``. None if it was not split.
    """

    stride: int
    # The base class derives it. Here it is a field without a default.
    lengths: Tensor = field()
    first: Tensor | None = None
    padding: tuple[int, int] | None = None
    split_from: tuple[RaggedLayout, Tensor] | None = None

    @classmethod
    def jagged(cls, offsets: Tensor, num_rows: int) -> RaggedLayout:
        """Return the layout of sequences in rows ``offsets[b]:offsets[b + 1]``.

        Waits for the device of ``offsets``.

        Raises:
            ValueError: ``offsets`` does not start at 0, falls, or does not end at ``num_rows``.
        """
        offsets = offsets.detach().to(torch.int64)
        bounds = offsets.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != num_rows:
            raise ValueError(
                f"Expected offsets to run from 0 to the {num_rows} rows, got {abridged(bounds)}"
            )
        lengths = offsets.diff()
        longest = max((later - earlier for earlier, later in pairwise(bounds)), default=0)
        if any(later < earlier for earlier, later in pairwise(bounds)):
            raise ValueError(f"Expected offsets never to fall, got {abridged(bounds)}")
        return cls(
            T=longest,
            B=len(bounds) - 1,
            N=num_rows,
            stride=1,
            first=offsets[:-1],
            lengths=lengths,
        )

    @classmethod
    def padded(
        cls, T: int, B: int, batch_first: bool, lengths: Tensor | None = None
    ) -> RaggedLayout:
        """Return the layout of a padded batch whose sequence b has ``lengths[b]`` tokens, or T.

        Raises:
            ValueError: ``lengths`` on the CPU has a value outside 0 to T.
        """
        padding = None if lengths is None else (T, B)
        if lengths is None:
            lengths = torch.full((B,), T, device="cpu")
        lengths = lengths.detach().to(torch.int64)
        longest = T
        if lengths.device.type == "cpu":
            longest = longest_of(lengths, T)
        elif B:
            # Reading them here would wait. The device checks that each is an index of T + 1 steps,
            # and the next call that waits for it raises.
            lengths[:1].expand(T + 1).gather(0, lengths)
        return cls(
            T=longest,
            B=B,
            N=T * B,
            batch_first=batch_first,
            stride=1 if batch_first else B,
            lengths=lengths,
            padding=padding,
        )

    def split_at_resets(self, reset: Tensor) -> RaggedLayout:
        """Return a layout in which a new sequence begins at every marked token.

        No state passes between the parts of a sequence, so they run side by side. Waits for the
        device.

        Args:
            reset: the marks, ``[N]`` bool.
        """
        device = reset.device
        base, lengths = self.batch_base.to(device), self.lengths.to(device)
        t = torch.arange(self.T, device=device)
        rows = (base[:, None] + t * self.stride).clamp(max=max(self.N - 1, 0))
        begins = (t < lengths[:, None]) & (reset[rows] | (t == 0))
        sequence, start = begins.nonzero(as_tuple=True)
        # Each part ends where the next part of its sequence begins, the last one where the sequence
        # ends.
        end = torch.cat([start[1:], start[:1]])
        is_last = torch.ones_like(sequence, dtype=torch.bool)
        is_last[:-1] = sequence[1:] != sequence[:-1]
        new_lengths = torch.where(is_last, lengths[sequence], end) - start
        return RaggedLayout(
            T=int(new_lengths.max()) if len(new_lengths) else 0,
            B=len(sequence),
            N=self.N,
            batch_first=self.batch_first,
            stride=self.stride,
            first=base[sequence] + start * self.stride,
            lengths=new_lengths,
            padding=self.padding,
            split_from=(self, sequence),
        )

    @cached_property
    def time_base(self) -> Tensor:
        """Return the row map's term of each step, ``[T]`` int64, on the device of lengths."""
        return torch.arange(self.T, device=self.lengths.device) * self.stride

    @cached_property
    def batch_base(self) -> Tensor:
        """Return the row map's term of each sequence, ``[B]`` int64, on the device of lengths."""
        if self.first is not None:
            return self.first
        return torch.arange(self.B, device=self.lengths.device) * self.strides[1]

    @property
    def padded_T(self) -> int:
        """Return the steps that a sequence has rows for, of a padded batch more than T."""
        return self.T if self.padding is None else self.padding[0]

    @property
    def strides(self) -> tuple[int, int]:
        """Return the rows from a step to the next, and from a padded sequence to the next."""
        return self.stride, self.padded_T if self.batch_first else 1

    def terms(self, device: torch.device) -> tuple[None, Tensor | None, Tensor | None]:
        """Return no time_base, the first rows if they are irregular, and lengths, on a device."""
        first = None if self.first is None else self._on(device, "first")
        return None, first, self._on(device, "lengths")

    @property
    def is_padded(self) -> bool:
        """Return False: lengths differ, or may."""
        return False

    @property
    def is_ragged(self) -> bool:
        """Return True."""
        return True

    @property
    def parent(self) -> RaggedLayout:
        """Return the layout before it was split at resets."""
        return self if self.split_from is None else self.split_from[0]

    def initial_states(self, v_0: Tensor, reverse: Sequence[bool]) -> Tensor:
        """Return v_0 for the first, or last, part of each sequence, and 0 for the other parts."""
        if self.split_from is None:
            return v_0
        _, sequence = self.split_from
        sequence = sequence.to(v_0.device)
        is_first = torch.ones_like(sequence, dtype=torch.bool)
        is_first[1:] = sequence[1:] != sequence[:-1]
        is_last = is_first.roll(-1)
        takes_v_0 = torch.stack([is_last if backwards else is_first for backwards in reverse])
        return v_0[:, sequence].masked_fill(~takes_v_0[..., None], 0)

    def first_rows(self, device: torch.device) -> Rows:
        """Return the row of every sequence's first token, or any row where it has none."""
        return self._on(device, "_first_rows")

    def last_rows(self, device: torch.device) -> Rows:
        """Return the row of every sequence's last token, or any row where it has none."""
        return self._on(device, "_last_rows")

    @cached_property
    def _first_rows(self) -> Tensor:
        return self.batch_base.clamp(max=max(self.N - 1, 0))

    @cached_property
    def _last_rows(self) -> Tensor:
        return self._first_rows + (self.lengths - 1).clamp(min=0) * self.stride

    def empty(self, device: torch.device) -> Tensor | None:
        """Return which sequences have no token, ``[B]`` bool."""
        return self._on(device, "_empty")

    @cached_property
    def _empty(self) -> Tensor:
        return self.lengths == 0

    def live_rows(self, device: torch.device) -> Tensor | None:
        """Return which rows hold a token, ``[N]`` bool, or None if all do."""
        return None if self.padding is None else self._on(device, "_live_rows")

    @cached_property
    def _live_rows(self) -> Tensor:
        assert self.padding is not None
        lengths = self.parent.lengths
        t = torch.arange(self.padding[0], device=lengths.device)
        if self.batch_first:
            return (t < lengths[:, None]).flatten()
        return (t[:, None] < lengths).flatten()

    def adjacent_rows(self, device: torch.device) -> tuple[Rows, Rows]:
        """Return rows ``(earlier, later)``, the stride apart."""
        return slice(0, max(self.N - self.stride, 0)), slice(self.stride, self.N)

    def crossing_pairs(self, device: torch.device) -> Rows | None:
        """Return which of the :meth:`adjacent_rows` are of two sequences, or None if none are."""
        if self.first is not None:
            return self._on(device, "_begins")[self.stride :]
        return slice(self.strides[1] - 1, None, self.strides[1]) if self.batch_first else None

    @cached_property
    def _begins(self) -> Tensor:
        # Sequences without a token mark an extra row, which is dropped.
        rows = self.batch_base.masked_fill(self.lengths == 0, self.N)
        marked = torch.zeros(self.N + 1, dtype=torch.bool, device=rows.device)
        return marked.index_fill_(0, rows, True)[: self.N]

    @cached_property
    def packed_form(self) -> PackedForm:
        """Return the tokens as a ``PackedSequence`` holds them. Waits for the device."""
        device = self.lengths.device
        descending, order = self.lengths.cpu().sort(descending=True, stable=True)
        T = int(descending[0]) if self.B else 0
        # The sequences that are longer than t have a token at t.
        has_token = torch.arange(T, device="cpu")[:, None] < descending
        t, rank = has_token.nonzero(as_tuple=True)
        batch_sizes = tuple(has_token.sum(1).tolist())
        order = order[: batch_sizes[0] if T else 0].to(device)
        layout = SequenceLayout(T, len(order), len(t), batch_sizes=batch_sizes)
        rows = self.batch_base[order[rank.to(device)]] + t.to(device) * self.stride
        return PackedForm(rows, order, layout)


def longest_of(lengths: Tensor, T: int) -> int:
    """Return the largest of the lengths of a padded batch, which are on the CPU.

    Raises:
        ValueError: one is outside 0 to T.
    """
    values = lengths.tolist()
    longest: int = max(values, default=0)
    if longest > T or min(values, default=0) < 0:
        raise ValueError(
            f"Expected lengths from 0 to the {T} steps of the input, got {abridged(values)}"
        )
    return longest


def layout_of(
    kind: str, shape: Sequence[int], seq_metadata: Tensor | None, reset: Tensor | None
) -> SequenceLayout:
    """Return the layout of an input, the same one for the same copies of :func:`memo.take`.

    Args:
        kind: "time_major", "batch_major", "packed" or "jagged".
        shape: of the input, without its features: ``(T, B)``, ``(B, T)``, or ``(N,)``.
        seq_metadata: batch_sizes ``[T]`` of a packed input, offsets ``[B + 1]`` of a jagged one,
            lengths ``[B]`` of a padded one, or None if all its sequences have T tokens.
        reset: where a sequence starts anew, bool, shaped as ``shape``, of a padded input; or None.

    Raises:
        IndexError, RuntimeError, ValueError: ``seq_metadata`` describes no such input.
    """
    if kind == "packed":
        assert seq_metadata is not None
        return SequenceLayout.of_packed(seq_metadata, shape[0])
    if kind == "jagged":
        assert seq_metadata is not None
        num_rows = shape[0]
        return derive_once(
            [seq_metadata], num_rows, lambda offsets: RaggedLayout.jagged(offsets, num_rows)
        )
    batch_first = kind == "batch_major"
    B, T = shape if batch_first else reversed(shape)
    if seq_metadata is None and reset is None:
        return (SequenceLayout.batch_major if batch_first else SequenceLayout.time_major)(*shape)

    def derive(*copies: Tensor) -> RaggedLayout:
        lengths = None if seq_metadata is None else copies[-1]
        layout = RaggedLayout.padded(T, B, batch_first, lengths)
        return layout if reset is None else layout.split_at_resets(copies[0].flatten())

    # The parameters tell a call with lengths alone from one with a reset alone.
    given = [tensor for tensor in (reset, seq_metadata) if tensor is not None]
    return derive_once(given, (T, B, batch_first, seq_metadata is None, reset is None), derive)


def rows_of(
    input: Tensor, kind: str, seq_metadata: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, SequenceLayout]:
    """Return an input as ``[N, I]`` and where its rows lie. Takes what :func:`layout_of` takes."""
    layout = layout_of(kind, input.shape[:-1], seq_metadata, reset)
    return input.reshape(layout.N, input.shape[-1]), layout
