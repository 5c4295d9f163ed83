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
    """Compare two tables of the schema; see :func:`compare`."""
    _check_precisions(before, after)
    noise = {"before": _repeat_noise(before), "after": _repeat_noise(after)}
    joined = pd.merge(
        _times(before),
        _times(after),
        how="outer",
        left_index=True,
        right_index=True,
        suffixes=("_before", "_after"),
    )
    statuses = ["status_before", "status_after"]
    joined[statuses] = joined[statuses].fillna("absent")
    joined = joined[(joined[statuses] == "ok").any(axis=1)]
    rows = []
    for key, cell in joined.iterrows():
        assert isinstance(key, tuple)
        place = (key[0], key[1], key[3])
        repeats = max(noise["before"].get(place, 0.0), noise["after"].get(place, 0.0))
        rows.append(dict(zip(KEYS, key)) | _judge(cell, max(LEAST_NOISE, repeats)))
    columns = [*KEYS, "before_us", "after_us", "speedup", "noise", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    table["verdict"] = pd.Categorical(table["verdict"], VERDICTS, ordered=True)
    return table.sort_values(["verdict", "speedup"], ignore_index=True)


def _judge(cell: pd.Series, noise: float) -> dict[str, object]:
    """Return the times of a cell and the verdict.

    FASTER and SLOWER: the ranges from p10 to p90 do not touch, and the medians differ by more than
    the noise. SAME: the medians differ by no more than the noise, and the ranges are narrow.
    UNCLEAR: all other cells.
    """
    row: dict[str, object] = {
        "before_us": cell["p50_before"],
        "after_us": cell["p50_after"],
        "speedup": cell["p50_before"] / cell["p50_after"],
        "noise": noise,
    }
    if cell["status_before"] != "ok":
        return row | {"verdict": "NEW"}
    if cell["status_after"] != "ok":
        return row | {"verdict": "LOST"}
    change = abs(np.log(cell["p50_after"] / cell["p50_before"]))
    apart = cell["p10_after"] > cell["p90_before"] or cell["p10_before"] > cell["p90_after"]
    spread = max(
        (cell[f"p90_{run}"] - cell[f"p10_{run}"]) / cell[f"p50_{run}"]
        for run in ("before", "after")
    )
    if change > np.log1p(noise):
        faster = cell["p50_after"] < cell["p50_before"]
        verdict = ("FASTER" if faster else "SLOWER") if apart else "UNCLEAR"
    else:
        verdict = "SAME" if spread <= WIDEST_SAME or apart else "UNCLEAR"
    return row | {"verdict": verdict}


def _times(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the status and the quantiles of each cell: of GPU time on a GPU, else of wall time."""
    on_gpu = rows["device"].str.startswith("cuda")
    table = rows[list(KEYS)].astype("string").assign(status=rows["status"].astype("string"))
    for quantile in ("p10", "p50", "p90"):
        table[quantile] = rows[f"event_us_{quantile}"].where(on_gpu, rows[f"wall_us_{quantile}"])
    # If a cell was measured twice, the last row counts.
    return table.drop_duplicates(list(KEYS), keep="last").set_index(list(KEYS))


def _repeat_noise(rows: pd.DataFrame) -> dict[tuple[object, ...], float]:
    """Return, for each case, device and mode, how far ``nn_again`` was from ``nn.RNN``."""
    again = rows[(rows["peer"] == "nn_again") & rows["speedup_vs_nn"].notna()]
    return {
        (row["case_id"], row["device"], str(row["mode"])): abs(np.log(row["speedup_vs_nn"]))
        for _, row in again.iterrows()
    }


def _check_precisions(before: pd.DataFrame, after: pd.DataFrame) -> None:
    """Raise if both runs have a case, but at no common precision."""
    found: list[dict[tuple[object, ...], set[tuple[str, ...]]]] = []
    for rows in (before, after):
        cases: dict[tuple[object, ...], set[tuple[str, ...]]] = {}
        for values in rows[_SIZES + _PRECISION].astype("string").drop_duplicates().values.tolist():
            cases.setdefault(tuple(values[: len(_SIZES)]), set()).add(tuple(values[len(_SIZES) :]))
        found.append(cases)
    for sizes in found[0].keys() & found[1].keys():
        if not found[0][sizes] & found[1][sizes]:
            raise NotComparableError(
                f"different precisions: {sorted(found[0][sizes])} and {sorted(found[1][sizes])}"
            )


def summary(table: pd.DataFrame) -> str:
    """Return in one line how many cells have each verdict."""
    counts = table["verdict"].value_counts(sort=False)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def has_regressed(table: pd.DataFrame) -> bool:
    """Return whether a cell is slower or lost."""
    return bool(table["verdict"].isin(REGRESSIONS).any())
