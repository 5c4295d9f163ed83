"""What a layer launches on a GPU: exact numbers, so that they only fall."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from typer.testing import CliRunner

from perf.__main__ import app
from perf.bench import launch_counts
from tritonrnn.ragged import RaggedLayout

# For one direction and two, each without hx and with it: forward and backward with new lengths,
# then with lengths seen before.
EXPECTED = {
    "time-major": [(3, 6, 3, 6), (4, 7, 4, 7), (5, 9, 5, 9), (6, 11, 6, 11)],
    "batch-first": [(3, 7, 3, 7), (4, 8, 4, 8), (5, 10, 5, 10), (6, 12, 6, 12)],
    "packed": [(4, 8, 3, 7), (5, 9, 4, 8), (6, 12, 5, 11), (7, 14, 6, 13)],
    "lengths on the GPU": [(6, 9, 4, 7), (7, 10, 5, 8), (8, 12, 6, 10), (9, 14, 7, 12)],
    "lengths on the GPU, batch-first": [
        (6, 10, 4, 8),
        (7, 11, 5, 9),
        (8, 13, 6, 11),
        (9, 15, 7, 13),
    ],
    "lengths on the CPU": [(5, 8, 4, 7), (6, 9, 5, 8), (7, 11, 6, 10), (8, 13, 7, 12)],
    "jagged": [(6, 12, 4, 7), (7, 13, 5, 8), (8, 15, 6, 10), (9, 17, 7, 12)],
    "reset": [(37, 21, 7, 16), (46, 27, 16, 21), (43, 24, 12, 19), (51, 33, 20, 28)],
}


@pytest.mark.parametrize("layout", launch_counts.LAYOUTS)
def test_layer_launches_no_more_than_it_did(layout):
    listed = [launch_counts.launches(layout, hx, D) for D, hx in product((1, 2), (False, True))]
    found = [tuple(len(names) for names in passes.values()) for passes in listed]
    assert found == EXPECTED[layout], listed


@pytest.mark.parametrize("length", [-1, launch_counts.T + 1])
def test_lengths_on_the_gpu_are_checked_there(length):
    with (
        launch_counts.counting(),
        pytest.raises(RuntimeError, match=f"index {length} is out of bounds"),
    ):
        RaggedLayout.padded(
            launch_counts.T, 2, False, launch_counts.on_gpu(torch.tensor([1, length]))
        )


@pytest.mark.slow
def test_launches_command_prints_a_table():
    result = CliRunner().invoke(app, "launches", catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("\n") == 2 + 4 * len(EXPECTED)
