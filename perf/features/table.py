"""``python -m perf features``: what works here and now, tried, and judged by its numbers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

import pandas as pd
import torch

from perf.environment import CHECKOUT
from perf.features.attempt import FEATURES, TORCH_NN, TORCH_PATH, TRITON_PATH, Outcome, sides

# Where the rows are, in this order.
PROBES = ("contract", "derivatives", "weights", "ragged", "programs", "processes", "gpu")
for _name in PROBES:
    importlib.import_module(f"perf.features.{_name}")


def outcomes(column: str) -> list[Outcome]:
    """Try every feature on one side, in this process."""
    side = sides()[column]
    return [feature.attempt(side) for feature in FEATURES]


def run() -> tuple[pd.DataFrame, list[str]]:
    """Try everything.

    The Triton path is tried in a process of its own, for without a GPU it runs in Triton's
    interpreter, which is chosen before Triton is imported.

    Returns:
        The table, and the reasons of what failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes.json")
        interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "perf.features.table", str(path)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | interpreted,
            cwd=CHECKOUT,
        )
        try:
            columns = {column: outcomes(column) for column in (TORCH_NN, TORCH_PATH)}
        finally:
            code = process.wait()
        if code:
            raise RuntimeError(f"the process of the Triton path ended with {code}")
        columns[TRITON_PATH] = [Outcome(*fields) for fields in json.loads(path.read_text())]
    table = pd.DataFrame({"": [feature.wording for feature in FEATURES]})
    reasons = []
    for column, tried in columns.items():
        table[column] = [outcome.word for outcome in tried]
        reasons += [
            f"{column}, {feature.wording}: {outcome.reason}"
            for feature, outcome in zip(FEATURES, tried)
            if outcome.reason
        ]
    return table, reasons


if __name__ == "__main__":
    # Threads that wait for one another are slow, and there are two processes of this.
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps([astuple(tried) for tried in outcomes(TRITON_PATH)]))
