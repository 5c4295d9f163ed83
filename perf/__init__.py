"""Measure tritonrnn against its peers: run ``python -m perf`` from a checkout.

In a notebook, ``perf.load("perf/results/...")`` reads the rows of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import pandas as pd


def load(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read the rows of runs as :func:`perf.report.tables.load` does."""
    # Imported here, because a worker process does not need pandas.
    from perf.report import tables

    return tables.load(paths)
