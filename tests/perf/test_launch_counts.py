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
    "time-major": [(3, 5, 3, 5), (4, 6, 4, 6), (5, 8, 5, 8), (6, 10, 6, 10)],
    "batch-first": [(3, 6, 3, 6), (4, 7, 4, 7), (5, 9, 5, 9), (6, 11, 6, 11)],
    "packed": [(4, 7, 3, 6), (5, 8, 4, 7), (6, 11, 5, 10), (7, 13, 6, 12)],
    "lengths on the GPU": [(6, 8, 4, 6), (7, 9, 5, 7), (8, 11, 6, 9), (9, 13, 7, 11)],
    "lengths on the GPU, batch-first": [
        (6, 9, 4, 7),
        (7, 10, 5, 8),
        (8, 12, 6, 10),
        (9, 14, 7, 12),
    ],
    "lengths on the CPU": [(5, 7, 4, 6), (6, 8, 5, 7), (7, 10, 6, 9), (8, 12, 7, 11)],
    "jagged": [(6, 11, 4, 6), (7, 12, 5, 7), (8, 14, 6, 9), (9, 16, 7, 11)],
    "reset": [(37, 20, 7, 15), (46, 26, 16, 20), (43, 23, 12, 18), (51, 32, 20, 27)],
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
