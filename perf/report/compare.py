"""Run ``python -m perf compare A B``: judge cell by cell whether B is faster than A."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from perf.bench import environment
from perf.report import tables
from perf.report.schema import KEYS, SHARED_KEYS

VERDICTS = ("SLOWER", "LOST", "UNCLEAR", "SAME", "FASTER", "NEW")
REGRESSIONS = ("SLOWER", "LOST")

# A smaller difference counts as noise, however quiet the two runs were.
LEAST_NOISE = 0.02
# A cell whose samples spread wider than this is not called the same.
WIDEST_SAME = 0.10

_TEXTS = [*KEYS, "dtype", "fp32_mode", "status"]


def compare(before: Path, after: Path) -> pd.DataFrame:
    """Join two runs cell by cell.

    Args:
        before, after: Folders of runs.

    Returns:
        One row for each cell that was timed in either: its keys, ``before_us`` and ``after_us``,
        ``speedup`` (above 1 if ``after`` is faster), ``noise`` and ``verdict``; the worst first.

    Raises:
        ValueError: the machines of the runs differ, or they have no precision in common.
    """
    runs = (tables.read_environments(folder).values() for folder in (before, after))
    environment.check_machines(itertools.chain(*runs))
    return judge(tables.load(before), tables.load(after))


def judge(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Compare two tables of the schema; see :func:`compare`.

    FASTER and SLOWER: the ranges from p10 to p90 do not touch, and the medians differ by more than
    the noise. SAME: the medians differ by no more than the noise, and the ranges are narrow.
    UNCLEAR: all other cells that both runs have.
    """
    # Categories of two runs may differ, and then can't be compared.
    before, after = (rows.astype(dict.fromkeys(_TEXTS, "string")) for rows in (before, after))
    _check_precisions(before, after)
    # If a cell was measured twice, the last row counts.
    old = before.drop_duplicates(KEYS, keep="last").set_index(KEYS)
    new = after.drop_duplicates(KEYS, keep="last").set_index(KEYS)
    old, new = old.align(new)
    cells = pd.DataFrame({"before_us": old["us_p50"], "after_us": new["us_p50"]})
    cells["speedup"] = cells["before_us"] / cells["after_us"]
    cells = cells.join(_noise(before, after), on=SHARED_KEYS)
    cells["noise"] = cells["noise"].fillna(0.0).clip(lower=LEAST_NOISE)
    in_old, in_new = ((run["status"] == "ok").fillna(False) for run in (old, new))
    old_spread, new_spread = ((run["us_p90"] - run["us_p10"]) / run["us_p50"] for run in (old, new))
    apart = (new["us_p10"] > old["us_p90"]) | (old["us_p10"] > new["us_p90"])
    differs = np.log(cells["speedup"]).abs() > np.log1p(cells["noise"])
    verdicts = {
        "NEW": ~in_old,
        "LOST": ~in_new,
        "FASTER": differs & apart & (cells["speedup"] > 1),
        "SLOWER": differs & apart,
        "SAME": ~differs & (apart | (np.maximum(old_spread, new_spread) <= WIDEST_SAME)),
    }
    conditions = [condition.to_numpy(bool) for condition in verdicts.values()]
    names = np.select(conditions, list(verdicts), "UNCLEAR")
    cells["verdict"] = pd.Categorical(names, VERDICTS, ordered=True)
    return cells[in_old | in_new].sort_values(["verdict", "speedup"]).reset_index()


def _noise(*runs: pd.DataFrame) -> pd.Series:
    """Return for each case, device and mode how far ``nn_again`` was from ``nn.RNN`` at most."""
    again = pd.concat([rows[rows["peer"] == "nn_again"] for rows in runs]).set_index(SHARED_KEYS)
    return np.log(again["speedup_vs_nn"]).abs().groupby(SHARED_KEYS).max().rename("noise")


def _check_precisions(*runs: pd.DataFrame) -> None:
    """Raise if no cell of one run can be in the other, because each has precisions of its own."""
    before, after = (set((rows["dtype"] + " " + rows["fp32_mode"]).dropna()) for rows in runs)
    if before.isdisjoint(after):
        raise ValueError(f"Runs of different precisions: {sorted(before)} and {sorted(after)}")


def summary(table: pd.DataFrame) -> str:
    """Return in one line how many cells have each verdict."""
    counts = table["verdict"].value_counts(sort=False)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def has_regressed(table: pd.DataFrame) -> bool:
    """Return whether a cell is slower or lost."""
    return bool(table["verdict"].isin(REGRESSIONS).any())
