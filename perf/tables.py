"""Results as files: a run adds its rows to those of earlier runs and overwrites none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd


def append_rows(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Add rows to ``name.parquet`` and ``name.csv``, which hold the same.

    Args:
        folder: Made if it is not there.
        name: The table, without a suffix.
        rows: Tidy rows; the column ``run_id`` tells one run from another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder / f"{name}.parquet"
    if parquet.exists():
        rows = pd.concat([pd.read_parquet(parquet), rows], ignore_index=True)
    # Replaced whole, so that a run that dies here leaves the old rows.
    for path, write in ((parquet, rows.to_parquet), (folder / f"{name}.csv", rows.to_csv)):
        unfinished = path.with_suffix(path.suffix + ".part")
        write(unfinished, index=False)
        unfinished.replace(path)


def add_environment(folder: Path, run_id: str, facts: Mapping[str, object]) -> None:
    """Add the facts of a run to ``env.json``, under its ``run_id``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "env.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs[run_id] = dict(facts)
    path.write_text(json.dumps(runs, indent=2) + "\n")
