"""Keep results in files: a run adds its rows to those of earlier runs and overwrites none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

from perf.report import schema

ROWS, ENVIRONMENT, CALIBRATION = "rows.jsonl", "env.json", "calibration.json"

# The facts of a run that are joined to its rows.
JOINED_FACTS = ["cpu", "threads", "gpu", "driver", "torch", "triton", "cudnn", "commit", "dirty"]

# Names in files of earlier versions, and the names they have now: of columns, and of values.
RENAMED_COLUMNS = {"turns": "interleave", "says": "message"}
RENAMED_VALUES = {
    "plan": {
        "torch, walk": "torch, in-place",
        "torch, native": "torch, aten",
        "torch, recorded": "torch, composite",
    },
    "peer": {"nn_native": "nn_no_cudnn"},
}


class RowFile(AbstractContextManager["RowFile"]):
    """Add rows to ``rows.jsonl``, one by one; a context manager.

    On leaving, ``rows.csv`` and ``rows.parquet`` are written from it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.path = folder, folder / ROWS
        self.rows = read_rows(self.path)
        # A run that was killed while it wrote left an incomplete line.
        if self.path.exists():
            complete = self.path.read_bytes().rfind(b"\n") + 1
            with self.path.open("r+b") as file:
                file.truncate(complete)

    def add(self, row: Mapping[str, object]) -> None:
        """Write a row at once."""
        self.rows.append(dict(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def __exit__(self, *exception: object) -> None:
        if self.rows:
            write(self._folder, "rows", schema.typed(pd.DataFrame(self.rows)))


def renamed(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row of any earlier version with the names of today."""
    return {
        RENAMED_COLUMNS.get(name, name): RENAMED_VALUES.get(name, {}).get(value, value)
        for name, value in row.items()
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``.jsonl``, ``.csv`` or ``.parquet``, with today's names.

    An incomplete last line is left out; a file that does not exist has no rows.
    """
    rows: Sequence[Mapping[Any, Any]] = []
    if path.suffix == ".parquet":
        rows = pd.read_parquet(path).to_dict("records")
    elif path.suffix == ".csv":
        # An empty field is missing; the word "none" is a value.
        rows = pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records")
    elif path.exists():
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [renamed(row) for row in rows]


def load(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read the results of runs, each row with the facts of its run.

    Args:
        paths: A folder of ``python -m perf run``, or a ``rows.jsonl``, ``.csv`` or ``.parquet`` in
            one; or several.

    Returns:
        The rows with the columns and types of the schema, and with ordered categories; then the
        columns ``JOINED_FACTS``. Names of earlier versions are replaced by those of today.

    Raises:
        FileNotFoundError: there are no rows.
    """
    several = [paths] if isinstance(paths, (str, Path)) else paths
    rows = pd.concat([_load_one(Path(path)) for path in several], ignore_index=True)
    return schema.typed(rows)[[*schema.NAMES, *rows.columns.intersection(JOINED_FACTS)]]


def _load_one(path: Path) -> pd.DataFrame:
    path = path / ROWS if path.is_dir() else path
    rows = read_rows(path)
    if not rows:
        raise FileNotFoundError(f"no rows at {path}")
    facts = pd.DataFrame.from_dict(read_environments(path.parent), orient="index")
    return pd.DataFrame(rows).join(facts.filter(JOINED_FACTS), on="run_id")


def read_environments(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of every run of a folder by ``run_id``, in the order of time."""
    path = folder / ENVIRONMENT
    return dict(sorted(json.loads(path.read_text()).items())) if path.exists() else {}


def add_environment(folder: Path, run_id: str, facts: Mapping[str, object]) -> None:
    """Add the facts of a run to ``env.json``, under its ``run_id``."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = read_environments(folder) | {run_id: facts}
    (folder / ENVIRONMENT).write_text(json.dumps(runs, indent=2) + "\n")


def read_calibration(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``calibration.json``; empty if there is none."""
    path = folder / CALIBRATION
    return json.loads(path.read_text()) if path.exists() else {}


def append_rows(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Add rows to ``name.parquet`` and ``name.csv``, which hold the same.

    Args:
        folder: Is created if it does not exist.
        name: The name of the table, without a suffix.
        rows: Tidy rows; the column ``run_id`` names the run of each.
    """
    parquet = folder / f"{name}.parquet"
    if parquet.exists():
        rows = pd.concat([pd.read_parquet(parquet), rows], ignore_index=True)
    write(folder, name, rows)


def write(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Write ``name.parquet`` and ``name.csv``; replace existing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, write_to in ((".parquet", rows.to_parquet), (".csv", rows.to_csv)):
        path = folder / f"{name}{suffix}"
        # Written to another file first, so that a crash leaves the old rows.
        unfinished = path.with_suffix(f"{suffix}.part")
        write_to(unfinished, index=False)
        unfinished.replace(path)
