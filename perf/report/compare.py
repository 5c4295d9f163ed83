"""Run ``python -m perf compare A B``: judge cell by cell whether B is faster than A."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from perf.bench import environment
from perf.report import tables
from perf.report.schema import KEYS

VERDICTS = ("SLOWER", "LOST", "UNCLEAR", "SAME", "FASTER", "NEW")
REGRESSIONS = ("SLOWER", "LOST")

# A smaller difference counts as noise, however quiet the two runs were.
LEAST_NOISE = 0.02
# A cell whose samples spread wider than this is not called the same.
WIDEST_SAME = 0.10

# Sizes and layout, which two cases share that differ in precision only.
_SIZES = [
    *("T", "B", "I", "H", "layers", "directions", "nonlinearity", "layout", "lengths", "device")
]
_PRECISION = ["dtype", "fp32_mode"]
# The cells of all peers, which share their noise.
_NOISE_KEYS = ["case_id", "device", "mode"]


class NotComparableError(Exception):
    """The times of two runs can't be compared."""


def compare(before: Path, after: Path) -> pd.DataFrame:
    """Join two runs cell by cell.

    Args:
        before, after: Folders of runs.

    Returns:
        One row for each cell that was timed in either: its keys, ``before_us`` and ``after_us``,
        ``speedup`` (above 1 if ``after`` is faster), ``noise`` and ``verdict``; the worst first.

    Raises:
        NotComparableError: the machines or the precisions of the runs differ.
    """
    check_machines(*(list(tables.read_environments(path).values()) for path in (before, after)))
    return judge(tables.load(before), tables.load(after))


def check_machines(*runs: Sequence[dict[str, object]]) -> None:
    """Raise unless all runs on one kind of device come from one machine."""
    seen: dict[object, dict[str, object]] = {}
    for facts in (one for run in runs for one in run):
        machine = environment.machine(facts)
        kind = str(machine["device"]).split(":")[0]
        known = seen.setdefault(kind, machine)
        if {**known, "device": ""} != {**machine, "device": ""}:
            raise NotComparableError(f"different machines: {known} and {machine}")


def judge(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Compare two tables of the schema; see :func:`compare`.

    FASTER and SLOWER: the ranges from p10 to p90 do not touch, and the medians differ by more than
    the noise. SAME: the medians differ by no more than the noise, and the ranges are narrow.
    UNCLEAR: all other cells that both runs have.
    """
    _check_precisions(before, after)
    suffixes = ("_before", "_after")
    cells = pd.merge(
        _times(before), _times(after), how="outer", on=list(KEYS), suffixes=suffixes
    ).merge(_noise(before, after), how="left", on=_NOISE_KEYS)
    cells["before_us"], cells["after_us"] = cells["us_p50_before"], cells["us_p50_after"]
    cells["speedup"] = cells["before_us"] / cells["after_us"]
    cells["noise"] = cells["noise"].fillna(0.0).clip(lower=LEAST_NOISE)
    in_before, in_after = (cells[f"status{run}"].eq("ok").fillna(False) for run in suffixes)
    spread = pd.concat(
        [
            (cells[f"us_p90{run}"] - cells[f"us_p10{run}"]) / cells[f"us_p50{run}"]
            for run in suffixes
        ],
        axis=1,
    ).max(axis=1)
    apart = (cells["us_p10_after"] > cells["us_p90_before"]) | (
        cells["us_p10_before"] > cells["us_p90_after"]
    )
    differs = np.log(cells["speedup"]).abs() > np.log1p(cells["noise"])
    verdicts = {
        "NEW": ~in_before,
        "LOST": ~in_after,
        "FASTER": differs & apart & (cells["speedup"] > 1),
        "SLOWER": differs & apart,
        "SAME": ~differs & (apart | (spread <= WIDEST_SAME)),
    }
    conditions = [condition.to_numpy(bool) for condition in verdicts.values()]
    names = np.select(conditions, list(verdicts), "UNCLEAR")
    cells["verdict"] = pd.Categorical(names, VERDICTS, ordered=True)
    columns = [*KEYS, "before_us", "after_us", "speedup", "noise", "verdict"]
    return cells.loc[in_before | in_after, columns].sort_values(
        ["verdict", "speedup"], ignore_index=True
    )


def _times(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the keys, the status and the times of each cell."""
    table = rows[[*KEYS, "status", "us_p10", "us_p50", "us_p90"]]
    table = table.astype(dict.fromkeys([*KEYS, "status"], "string"))
    # If a cell was measured twice, the last row counts.
    return table.drop_duplicates(list(KEYS), keep="last")


def _noise(*runs: pd.DataFrame) -> pd.DataFrame:
    """Return for each case, device and mode how far ``nn_again`` was from ``nn.RNN`` at most."""
    again = pd.concat([rows[rows["peer"] == "nn_again"] for rows in runs])
    noise = np.log(again["speedup_vs_nn"]).abs()
    keyed = again[_NOISE_KEYS].astype("string").assign(noise=noise)
    return keyed.groupby(_NOISE_KEYS, as_index=False)["noise"].max()


def _check_precisions(before: pd.DataFrame, after: pd.DataFrame) -> None:
    """Raise if both runs have a case, but at no common precision."""
    found = [
        rows[_SIZES + _PRECISION].astype("string").drop_duplicates() for rows in (before, after)
    ]
    both = found[0].merge(found[1], on=_SIZES, suffixes=("_before", "_after"))
    both["equal"] = (both["dtype_before"] == both["dtype_after"]) & (
        both["fp32_mode_before"] == both["fp32_mode_after"]
    )
    for sizes, cases in both.groupby(_SIZES):
        if not cases["equal"].any():
            precisions = cases.drop(columns=[*_SIZES, "equal"]).drop_duplicates()
            raise NotComparableError(
                f"different precisions of {sizes}: {precisions.to_dict('records')}"
            )


def summary(table: pd.DataFrame) -> str:
    """Return in one line how many cells have each verdict."""
    counts = table["verdict"].value_counts(sort=False)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def has_regressed(table: pd.DataFrame) -> bool:
    """Return whether a cell is slower or lost."""
    return bool(table["verdict"].isin(REGRESSIONS).any())
