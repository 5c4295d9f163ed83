"""Run ``python -m perf features``: try every feature here and now, and judge its results."""

from __future__ import annotations

import importlib
import os

import pandas as pd
import torch

from perf.features.attempt import FEATURES, sides

# The modules of the rows, in the order of the table.
PROBES = ("contract", "derivatives", "weights", "ragged", "programs", "processes", "gpu")
for _name in PROBES:
    importlib.import_module(f"perf.features.{_name}")


def run() -> tuple[pd.DataFrame, list[str]]:
    """Try every feature on every side.

    Returns:
        The table, and the reason of each failure.
    """
    if not torch.cuda.is_available():
        # The interpreter, for the Triton path; it must be chosen before Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    table = pd.DataFrame({"": [feature.wording for feature in FEATURES]})
    reasons = []
    for column, side in sides().items():
        tried = [feature.attempt(side) for feature in FEATURES]
        table[column] = [outcome.word for outcome in tried]
        reasons += [
            f"{column}, {feature.wording}: {outcome.reason}"
            for feature, outcome in zip(FEATURES, tried)
            if outcome.reason
        ]
    return table, reasons
