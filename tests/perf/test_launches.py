"""What a layer launches on a GPU: exact numbers, so that they only fall."""

from __future__ import annotations

from itertools import product

import pytest
from typer.testing import CliRunner

from perf.__main__ import app
from perf.bench import launches

# For one direction and two, each without hx and with it: forward and backward with new lengths,
# then with lengths seen before.
EXPECTED = {
    ("time-major", "fp32"): [(4, 8, 4, 8), (5, 10, 5, 10), (8, 14, 8, 14), (9, 18, 9, 18)],
    ("time-major", "bf16"): [(4, 8, 4, 8), (7, 10, 7, 10), (8, 14, 8, 14), (11, 18, 11, 18)],
    ("batch-first", "fp32"): [(4, 11, 4, 11), (5, 13, 5, 13), (8, 20, 8, 20), (9, 24, 9, 24)],
    ("batch-first", "bf16"): [(4, 11, 4, 11), (7, 13, 7, 13), (8, 20, 8, 20), (11, 24, 11, 24)],
    ("packed", "fp32"): [(7, 10, 5, 9), (8, 12, 6, 11), (11, 17, 9, 16), (12, 22, 10, 21)],
    ("packed", "bf16"): [(7, 10, 5, 9), (10, 12, 8, 11), (11, 17, 9, 16), (14, 22, 12, 21)],
    ("lengths on the GPU", "fp32"): [
        (28, 22, 8, 14),
        (28, 27, 8, 19),
        (35, 31, 15, 23),
        (34, 41, 14, 33),
    ],
    ("lengths on the GPU", "bf16"): [
        (28, 22, 8, 14),
        (30, 27, 10, 19),
        (35, 31, 15, 23),
        (36, 41, 16, 33),
    ],
    ("lengths on the GPU, batch-first", "fp32"): [
        (28, 22, 8, 14),
        (28, 27, 8, 19),
        (35, 31, 15, 23),
        (34, 41, 14, 33),
    ],
    ("lengths on the GPU, batch-first", "bf16"): [
        (28, 22, 8, 14),
        (30, 27, 10, 19),
        (35, 31, 15, 23),
        (36, 41, 16, 33),
    ],
    ("lengths on the CPU", "fp32"): [
        (12, 16, 8, 14),
        (12, 22, 8, 19),
        (20, 25, 15, 23),
        (19, 35, 14, 33),
    ],
    ("lengths on the CPU", "bf16"): [
        (12, 16, 8, 14),
        (14, 22, 10, 19),
        (20, 25, 15, 23),
        (21, 35, 16, 33),
    ],
    ("jagged", "fp32"): [(19, 19, 7, 11), (19, 24, 7, 16), (26, 28, 14, 20), (25, 38, 13, 30)],
    ("jagged", "bf16"): [(19, 19, 7, 11), (21, 24, 9, 16), (26, 28, 14, 20), (27, 38, 15, 30)],
    ("reset", "fp32"): [(42, 37, 8, 23), (51, 43, 17, 28), (50, 46, 15, 32), (58, 56, 23, 42)],
    ("reset", "bf16"): [(42, 37, 8, 23), (53, 43, 19, 28), (50, 46, 15, 32), (60, 56, 25, 42)],
}


@pytest.mark.parametrize(("layout", "dtype"), EXPECTED, ids="-".join)
def test_layer_launches_no_more_than_it_did(layout, dtype):
    listed = [launches.launches(layout, dtype, hx, D) for D, hx in product((1, 2), (False, True))]
    found = [tuple(len(names) for names in passes.values()) for passes in listed]
    assert found == EXPECTED[layout, dtype], listed


def test_every_layout_and_dtype_is_counted():
    assert list(EXPECTED) == list(product(launches.LAYOUTS, launches.DTYPES))


@pytest.mark.slow
def test_launches_command_prints_a_table():
    result = CliRunner().invoke(app, "launches", catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("\n") == 2 + 4 * len(EXPECTED)
