"""SequenceLayout: the row of every token, held against torch's own containers."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

PADDED = [(1, 1), (7, 5), (5, 7), (1, 9), (9, 1), (3, 0)]
LENGTHS = [(1,), (5, 3, 4, 2), (4, 4, 4), (1, 1, 1), (9, 1), (1, 9, 1, 2), tuple(range(1, 24))]


def rows_of(layout: SequenceLayout) -> list[list[int]]:
    """Return the rows of each sequence, computed by the row map."""
    assert layout.time_base.dtype == torch.int64
    assert layout.batch_base.dtype == torch.int64
    assert layout.lengths.dtype == torch.int64
    assert len(layout.time_base) == layout.T
    assert len(layout.batch_base) == len(layout.lengths) == layout.B
    times, bases = layout.time_base.tolist(), layout.batch_base.tolist()
    return [
        [times[t] + base for t in range(length)]
        for base, length in zip(bases, layout.lengths.tolist())
    ]


def tokens(lengths) -> list[torch.Tensor]:
    """Return sequences of tokens (b, t), which name their sequence and their step."""
    return [torch.tensor([(b, t) for t in range(length)]) for b, length in enumerate(lengths)]


def assert_rows_hold_their_tokens(layout: SequenceLayout, data: torch.Tensor, order) -> None:
    assert len(data) == layout.N
    seen = []
    for b, rows in zip(order, rows_of(layout)):
        assert data[rows].tolist() == [[b, t] for t in range(len(rows))]
        seen += rows
    assert sorted(seen) == list(range(layout.N))


@pytest.mark.parametrize(("T", "B"), PADDED, ids=[f"T{T}-B{B}" for T, B in PADDED])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_padded_rows_are_those_of_the_flattened_tensor(T, B, batch_first):
    token = torch.stack(torch.meshgrid(torch.arange(B), torch.arange(T), indexing="ij"), dim=-1)
    if batch_first:
        layout, data = SequenceLayout.batch_major(B, T), token.reshape(-1, 2)
    else:
        layout, data = SequenceLayout.time_major(T, B), token.transpose(0, 1).reshape(-1, 2)
    assert (layout.T, layout.B) == (T, B)
    assert layout.is_padded
    assert layout.lengths.tolist() == [T] * B
    assert_rows_hold_their_tokens(layout, data, range(B))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_rows_are_those_of_a_packed_sequence(lengths):
    packed = pack_sequence(tokens(lengths), enforce_sorted=False)
    layout = SequenceLayout.packed(packed.batch_sizes.tolist(), len(packed.data))
    order = packed.sorted_indices.tolist()
    assert (max(lengths), len(lengths)) == (layout.T, layout.B)
    assert not layout.is_padded
    assert layout.lengths.tolist() == [lengths[b] for b in order]
    assert_rows_hold_their_tokens(layout, packed.data, order)


def test_packed_rows_are_those_of_a_packed_padded_batch():
    lengths = torch.tensor([6, 6, 3, 1])
    padded = torch.nn.utils.rnn.pad_sequence(tokens(lengths.tolist()))
    packed = pack_padded_sequence(padded, lengths)
    layout = SequenceLayout.packed(packed.batch_sizes.tolist(), len(packed.data))
    assert_rows_hold_their_tokens(layout, packed.data, range(4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_jagged_rows_are_those_of_a_jagged_tensor(lengths):
    nested = torch.nested.nested_tensor(tokens(lengths), layout=torch.jagged)
    layout = RaggedLayout.jagged(nested.offsets(), len(nested.values()))
    assert (max(lengths), len(lengths)) == (layout.T, layout.B)
    assert not layout.is_padded
    assert layout.lengths.tolist() == list(lengths)
    assert_rows_hold_their_tokens(layout, nested.values(), range(len(lengths)))


@pytest.mark.parametrize("lengths", [(), (0,), (2, 0, 3), (0, 0)], ids=str)
def test_jagged_takes_empty_sequences(lengths):
    offsets = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    layout = RaggedLayout.jagged(torch.tensor(offsets), sum(lengths))
    assert layout.lengths.tolist() == list(lengths)
    assert max(lengths, default=0) == layout.T
    assert [len(rows) for rows in rows_of(layout)] == list(lengths)


@pytest.mark.parametrize(
    ("batch_sizes", "num_rows", "message"),
    [
        ([], 0, "non-empty"),
        ([2, 3], 5, "(2, 3)"),
        ([3, 1, 2], 6, "(3, 1, 2)"),
        ([2, 2, 0], 4, "(2, 2, 0)"),
        ([0], 0, "(0)"),
        ([2, -1], 1, "(2, -1)"),
        ([2, 2, 1], 7, "7 rows, got 5"),
        ([2, 2, 1], 4, "4 rows, got 5"),
        ([2] * 50 + [3], 103, "51 in all"),
    ],
    ids=str,
)
def test_impossible_batch_sizes_raise(batch_sizes, num_rows, message):
    with pytest.raises((RuntimeError, IndexError), match=re.escape(message)):
        SequenceLayout.packed(batch_sizes, num_rows)


@pytest.mark.parametrize(
    ("offsets", "num_rows", "message"),
    [
        ([], 0, "()"),
        ([1, 3], 3, "(1, 3)"),
        ([0, 2], 3, "3 rows"),
        ([0, 3, 2, 4], 4, "(0, 3, 2, 4)"),
    ],
    ids=str,
)
def test_impossible_offsets_raise(offsets, num_rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RaggedLayout.jagged(torch.tensor(offsets, dtype=torch.int64), num_rows)


def test_equal_layouts_compare_equal():
    assert SequenceLayout.packed([2, 1], 3) == SequenceLayout.packed((2, 1), 3)
    assert SequenceLayout.time_major(3, 2) != SequenceLayout.batch_major(2, 3)
    assert hash(SequenceLayout.time_major(3, 2)) == hash(SequenceLayout.time_major(3, 2))
