"""Results as files: a run adds its rows to those of earlier runs and overwrites none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from perf import schema

ROWS, ENVIRONMENT, CALIBRATION = "rows.jsonl", "env.json", "calibration.json"

# The facts of a run that a reader joins to its rows.
JOINED_FACTS = ("cpu", "threads", "gpu", "driver", "torch", "triton", "cudnn", "commit", "dirty")


class RowFile:
    """``rows.jsonl``, to which rows are added as they come; a context manager.

    On leaving, ``rows.csv`` and ``rows.parquet`` are made from it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.path = folder, folder / ROWS
        self.rows = read_lines(self.path)
        # A run that was killed while it wrote left part of a line.
        if self.path.exists():
            whole = self.path.read_bytes().rfind(b"\n") + 1
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def add(self, row: Mapping[str, object]) -> None:
        """Write a row, at once."""
        self.rows.append(dict(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.rows:
            write(self._folder, "rows", schema.typed(pd.DataFrame(self.rows)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a line-by-line file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\n" in line]


def load(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read the results of runs, each row with the facts of its run.

    Args:
        paths: A folder of ``python -m perf run``, or a ``rows.jsonl``, ``.csv`` or ``.parquet`` in
            one; or several.

    Returns:
        The rows, typed as the schema says, with ordered categories; then the columns
        ``JOINED_FACTS``.

    Raises:
        FileNotFoundError: there are no rows.
    """
    several: Sequence[str | Path] = [paths] if isinstance(paths, (str, Path)) else list(paths)
    rows = pd.concat([_load_one(Path(path)) for path in several], ignore_index=True)
    facts = rows.columns.intersection(list(JOINED_FACTS))
    return schema.typed(rows)[[*schema.NAMES, *facts]]


def _load_one(path: Path) -> pd.DataFrame:
    path = path / ROWS if path.is_dir() else path
    if path.suffix == ".parquet":
        rows = pd.read_parquet(path)
    elif path.suffix == ".csv":
        # An empty field is missing; the word "none" is a value.
        rows = pd.read_csv(path, keep_default_na=False, na_values=[""])
    elif path.exists():
        rows = pd.DataFrame(read_lines(path))
    else:
        raise FileNotFoundError(f"no rows at {path}")
    for name in rows.select_dtypes("category"):
        rows[name] = rows[name].astype("string")
    runs = read_environments(path.parent)
    facts = pd.DataFrame([{"run_id": run_id} | runs[run_id] for run_id in runs])
    if facts.empty:
        return rows
    return rows.merge(
        facts[["run_id", *facts.columns.intersection(list(JOINED_FACTS))]], on="run_id", how="left"
    )


def read_environments(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of every run of a folder, by ``run_id``, in order of time."""
    path = folder / ENVIRONMENT
    return dict(sorted(json.loads(path.read_text()).items())) if path.exists() else {}


def read_calibration(folder: Path) -> dict[str, Any]:
    """Return what ``calibrate`` wrote to a folder; nothing if it did not."""
    path = folder / CALIBRATION
    return json.loads(path.read_text()) if path.exists() else {}


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
    write(folder, name, rows)


def write(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Write ``name.parquet`` and ``name.csv``, in place of those that are there."""
    # Replaced whole, so that a run that dies here leaves the old rows.
    for path, write in (
        (folder / f"{name}.parquet", rows.to_parquet),
        (folder / f"{name}.csv", rows.to_csv),
    ):
        unfinished = path.with_suffix(path.suffix + ".part")
        write(unfinished, index=False)
        unfinished.replace(path)


def add_environment(folder: Path, run_id: str, facts: Mapping[str, object]) -> None:
    """Add the facts of a run to ``env.json``, under its ``run_id``."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = read_environments(folder)
    runs[run_id] = dict(facts)
    (folder / ENVIRONMENT).write_text(json.dumps(runs, indent=2) + "\n")
