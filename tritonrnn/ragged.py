"""Ragged layouts that no one packed: jagged rows, padded batches with lengths, resets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tritonrnn.layout import PackedForm, Rows, SequenceLayout, abridged
from tritonrnn.memo import Memo


@dataclass(frozen=True, eq=False, kw_only=True)
class RaggedLayout(SequenceLayout):
    """Sequences of any lengths, 0 among them, whose tokens lie a fixed number of rows apart.

    Build it with :meth:`jagged` or :meth:`padded`, and cut it with :meth:`cut`. Its tensors lie on
    the device of the lengths, and nothing waits for that device but what says so.

    Args:
        stride: rows from a token of a sequence to its next.
        batch_base: ``[B]``, each sequence's first row.
        lengths: ``[B]``, each sequence's tokens.
        padding: ``(T, B)`` of the padded batch that the rows are, None where every row is a token.
        origin: the layout before it was cut, and which of its B sequences each of these was cut
            from, ascending, ``[B]``.
    """

    stride: int
    # Fields without a default, where the base class derives them.
    batch_base: Tensor = field()
    lengths: Tensor = field()
    padding: tuple[int, int] | None = None
    origin: tuple[RaggedLayout, Tensor] | None = None

    @classmethod
    def jagged(cls, offsets: Tensor, num_rows: int) -> RaggedLayout:
        """Sequences one after the other: sequence b is rows ``offsets[b]:offsets[b + 1]``.

        Waits for the device of ``offsets``.

        Raises:
            ValueError: ``offsets`` does not start at 0, falls, or does not end at ``num_rows``.
        """
        offsets = offsets.detach().to(torch.int64, copy=True)
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
            batch_base=offsets[:-1],
            lengths=lengths,
        )

    @classmethod
    def padded(
        cls, T: int, B: int, batch_first: bool, lengths: Tensor | None = None
    ) -> RaggedLayout:
        """A padded batch, whose sequence b has ``lengths[b]`` tokens, or all T.

        Raises:
            ValueError: ``lengths`` on the CPU has a number outside 0 to T.
        """
        if lengths is None:
            lengths = torch.full((B,), T)
        lengths = lengths.detach().to(torch.int64, copy=True)
        longest = T
        if lengths.device.type == "cpu":
            longest = int(lengths.max()) if B else 0
            if longest > T or (B and int(lengths.min()) < 0):
                raise ValueError(
                    f"Expected lengths from 0 to the {T} steps of the input, "
                    f"got {abridged(lengths.tolist())}"
                )
        else:
            # To read them is to wait. What the device finds wrong, the next call that waits raises.
            torch._assert_async(
                ((lengths >= 0) & (lengths <= T)).all(),
                f"tritonrnn: Expected lengths from 0 to the {T} steps of the input",
            )
        return cls(
            T=longest,
            B=B,
            N=T * B,
            stride=1 if batch_first else B,
            batch_base=torch.arange(B, device=lengths.device) * (T if batch_first else 1),
            lengths=lengths,
            padding=(T, B),
        )

    def cut(self, reset: Tensor) -> RaggedLayout:
        """Let a sequence of its own begin at every token that is marked. Waits for the device.

        What is cut apart can be walked side by side: no state passes from one to the other.

        Args:
            reset: ``[N]`` bool.
        """
        device = reset.device
        base, lengths = self.batch_base.to(device), self.lengths.to(device)
        t = torch.arange(self.T, device=device)
        rows = (base[:, None] + t * self.stride).clamp(max=max(self.N - 1, 0))
        begins = (t < lengths[:, None]) & (reset[rows] | (t == 0))
        sequence, start = begins.nonzero(as_tuple=True)
        # Each ends where the next of its sequence begins, the last where the sequence does.
        end = torch.cat([start[1:], start[:1]])
        is_last = torch.ones_like(sequence, dtype=torch.bool)
        is_last[:-1] = sequence[1:] != sequence[:-1]
        new_lengths = torch.where(is_last, lengths[sequence], end) - start
        return RaggedLayout(
            T=int(new_lengths.max()) if len(new_lengths) else 0,
            B=len(sequence),
            N=self.N,
            stride=self.stride,
            batch_base=base[sequence] + start * self.stride,
            lengths=new_lengths,
            padding=self.padding,
            origin=(self, sequence),
        )

    @cached_property
    def time_base(self) -> Tensor:
        """``[T]`` int64, where :attr:`lengths` is."""
        return torch.arange(self.T, device=self.lengths.device) * self.stride

    @property
    def is_padded(self) -> bool:
        """False: lengths differ, or may."""
        return False

    @property
    def is_ragged(self) -> bool:
        """True."""
        return True

    @property
    def whole(self) -> RaggedLayout:
        """The layout before it was cut."""
        return self if self.origin is None else self.origin[0]

    def entering(self, v_0: Tensor, reverse: Sequence[bool]) -> Tensor:
        """Give v_0 to the first, or last, of those that were cut from a sequence; 0 to the rest."""
        if self.origin is None:
            return v_0
        _, sequence = self.origin
        sequence = sequence.to(v_0.device)
        is_first = torch.ones_like(sequence, dtype=torch.bool)
        is_first[1:] = sequence[1:] != sequence[:-1]
        is_last = is_first.roll(-1)
        takes = torch.stack([is_last if backwards else is_first for backwards in reverse])
        return v_0[:, sequence].masked_fill(~takes[..., None], 0)

    def first_rows(self, device: torch.device) -> Rows:
        """The row of every sequence's first token; any row where it has none."""
        return self._on(device, "_first_rows")

    def last_rows(self, device: torch.device) -> Rows:
        """The row of every sequence's last token; any row where it has none."""
        return self._on(device, "_last_rows")

    @cached_property
    def _first_rows(self) -> Tensor:
        return self.batch_base.clamp(max=max(self.N - 1, 0))

    @cached_property
    def _last_rows(self) -> Tensor:
        return self._first_rows + (self.lengths - 1).clamp(min=0) * self.stride

    def empty(self, device: torch.device) -> Tensor | None:
        """Which sequences have no token, ``[B]`` bool."""
        return self._on(device, "_empty")

    @cached_property
    def _empty(self) -> Tensor:
        return self.lengths == 0

    def dead_rows(self, device: torch.device) -> Tensor | None:
        """Which rows are padding, ``[N]`` bool, or None where none can be."""
        return None if self.padding is None else self._on(device, "_dead_rows")

    @cached_property
    def _dead_rows(self) -> Tensor:
        assert self.padding is not None
        T, B = self.padding
        lengths = self.whole.lengths
        t = torch.arange(T, device=lengths.device)
        if self.stride == B:
            return (t[:, None] >= lengths).flatten()
        return (t >= lengths[:, None]).flatten()

    def neighbours(self, device: torch.device) -> tuple[Rows, Rows]:
        """Rows ``(earlier, later)``, the stride apart."""
        return slice(0, max(self.N - self.stride, 0)), slice(self.stride, self.N)

    def seams(self, device: torch.device) -> tuple[Rows, Rows]:
        """Rows ``(last, first)`` of every sequence that has a token, as masks ``[N]``."""
        return self._on(device, "_is_last"), self._on(device, "_is_first")

    @cached_property
    def _is_first(self) -> Tensor:
        return self._marked(self._first_rows)

    @cached_property
    def _is_last(self) -> Tensor:
        return self._marked(self._last_rows)

    def _marked(self, rows: Tensor) -> Tensor:
        # Sequences with no token mark a row that is then cut off.
        marked = torch.zeros(self.N + 1, dtype=torch.bool, device=rows.device)
        return marked.index_fill_(0, rows.masked_fill(self._empty, self.N), True)[: self.N]

    @cached_property
    def packed_form(self) -> PackedForm:
        """The tokens as a ``PackedSequence`` would hold them. Waits for the device."""
        device = self.lengths.device
        ascending, order = self.lengths.cpu().sort(stable=True)
        order = order.flip(0)
        T = int(ascending[-1]) if self.B else 0
        # Of so many sequences, those that are longer than t are alive at t.
        batch_sizes = self.B - torch.searchsorted(ascending, torch.arange(T), right=True)
        order = order[: int(batch_sizes[0]) if T else 0].to(device)
        layout = SequenceLayout(
            T, len(order), int(batch_sizes.sum()), batch_sizes=tuple(batch_sizes.tolist())
        )
        rank = torch.arange(layout.N) - layout.time_base.repeat_interleave(batch_sizes)
        t = torch.arange(T).repeat_interleave(batch_sizes)
        rows = self.batch_base[order[rank.to(device)]] + t.to(device) * self.stride
        return PackedForm(rows, order, layout)


_ragged: Memo[RaggedLayout] = Memo()


def layout_of(
    kind: str, shape: Sequence[int], extents: Tensor | None, reset: Tensor | None
) -> SequenceLayout:
    """The layout of an input, remembered for as long as the tensors that say it live unchanged.

    Args:
        kind: "time_major", "batch_major", "packed" or "jagged".
        shape: of the input, without its features: ``(T, B)``, ``(B, T)``, or ``(N,)``.
        extents: batch_sizes ``[T]`` of a packed input, offsets ``[B + 1]`` of a jagged one,
            lengths ``[B]`` of a padded one, or None where it has its T tokens in every sequence.
        reset: of a padded input, its shape, bool: where a new sequence begins, or None.

    Raises:
        IndexError, RuntimeError, ValueError: the extents don't describe such an input.
    """
    if kind == "packed":
        assert extents is not None
        return SequenceLayout.of_packed(extents, shape[0])
    if kind == "jagged":
        assert extents is not None
        offsets, num_rows = extents, shape[0]
        return _ragged.get([offsets], num_rows, lambda: RaggedLayout.jagged(offsets, num_rows))
    batch_first = kind == "batch_major"
    B, T = shape if batch_first else reversed(shape)
    if extents is None and reset is None:
        return (SequenceLayout.batch_major if batch_first else SequenceLayout.time_major)(*shape)

    def derive() -> RaggedLayout:
        layout = RaggedLayout.padded(T, B, batch_first, extents)
        return layout if reset is None else layout.cut(reset.flatten())

    # By the tensors, and by which of them is which.
    given = [tensor for tensor in (reset, extents) if tensor is not None]
    return _ragged.get(given, (T, B, batch_first, extents is None, reset is None), derive)
