"""Which short sequences count as slower, and the table that shows them."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from perf.bench.cases import Case
from perf.report import schema, short_table

CASE = Case(T=4, B=16, I=64, H=64)


def rows_of(case: Case, speedup: float | None, again: float | None = 1.0, mode: str = "infer"):
    """Return the rows of a cell; without a speed-up, it is wrong or was not timed."""
    found = {"tritonrnn": speedup, "nn_again": again, "nn_aten": 1.0}
    return [
        {
            **case.row(peer, mode),
            "status": "wrong" if ratio is None else "ok",
            "speedup_vs_nn": ratio,
        }
        for peer, ratio in found.items()
    ]


def table(*cells: list[dict]) -> pd.DataFrame:
    return schema.typed(pd.DataFrame([row for cell in cells for row in cell]))


@pytest.mark.parametrize(
    ("speedup", "again", "slower"),
    [
        (0.94, 1.0, True),
        (0.95, 1.0, False),
        # nn.RNN against itself is as slow, or slower.
        (0.94, 0.94, False),
        (0.94, 0.93, False),
        (0.94, 0.945, True),
        # It is not slower for being slower than that alone.
        (0.97, 0.99, False),
        (0.94, None, True),
        (None, 1.0, False),
    ],
)
def test_cell_is_slower_below_both_limits(speedup, again, slower):
    judged = short_table.judge(table(rows_of(CASE, speedup, again)))
    assert judged["slower"].tolist() == [slower]


def test_table_has_a_row_for_a_kind_of_call_and_a_column_for_a_length():
    cell, lengths = replace(CASE, layout="cell"), replace(CASE, layout="lengths", lengths="linear")
    rows = table(
        rows_of(replace(CASE, T=12), 1.2, 0.9),
        rows_of(CASE, 0.8),
        rows_of(CASE, 1.1, mode="fwdbwd"),
        rows_of(replace(CASE, directions=2), 0.94, 0.93),
        rows_of(lengths, 0.7),
        rows_of(cell, None),
        # Cases of other presets.
        rows_of(replace(CASE, T=5), 0.1),
        rows_of(replace(CASE, layout="packed", lengths="words"), 0.1),
    )
    _, shown, count = short_table.paragraphs(rows)
    head, _, *lines = ([text.strip() for text in line.split("|")] for line in shown.splitlines())
    assert head[1:-1] == ["layout", "mode", "B", "H", "directions", "T 4", "T 12"]
    assert [line[1:-1] for line in lines] == [
        ["padded", "fwdbwd", "16", "64", "1", "1.10", ""],
        ["padded", "infer", "16", "64", "1", "**0.80**", "1.20"],
        ["padded", "infer", "16", "64", "2", "0.94", ""],
        ["lengths", "infer", "16", "64", "1", "**0.70**", ""],
        ["cell", "infer", "16", "64", "1", "wrong", ""],
    ]
    assert count == (
        "2 of 5 cells are slower, the worst at 0.70. nn.RNN against itself is below 0.95 in 2, "
        "from 0.90 to 1.00."
    )


def test_nothing_timed_is_said():
    [sentence] = short_table.paragraphs(table(rows_of(CASE, None)))
    assert "No short sequence" in sentence
