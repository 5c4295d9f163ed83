"""Run ``python -m perf report DIR``: show a folder of results in markdown and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from perf.bench import presets
from perf.peers import BASELINE, OURS
from perf.report import plots, tables
from perf.report.schema import SHARED_KEYS
from perf.roofline import calibrate

REPORT, PICTURES = "report.md", "plots"

# The cells of a geometric mean share these columns.
KINDS = ["peer", "device", "mode", "layout", "dtype", "fp32_mode"]
METRICS = {
    "us_p50": "us",
    "us_per_step": "us/step",
    "speedup_vs_nn": "x nn.RNN",
    "pct_of_limit": "% of limit",
    "peak_MiB": "peak MiB",
    "saved_MiB": "saved MiB",
}
SPEEDUPS = ["speedup_vs_nn_p10", "speedup_vs_nn", "speedup_vs_nn_p90"]


def write(folder: Path) -> Path:
    """Write ``report.md`` and its pictures into a folder of results, and return its path."""
    rows = tables.load(folder)
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    # Pictures of an earlier report may show rows that are gone.
    for old in pictures.glob("*.png"):
        old.unlink()
    drawn = plots.draw(rows, pictures)
    sections = [
        *_introduction(rows),
        "## Environment",
        pd.DataFrame(tables.read_environments(folder)).to_markdown() or "Not recorded.",
        "## Calibration",
        _calibration(folder),
        "## Failures",
        *_failures(rows),
        "## Speed-up over nn.RNN",
        *speedups(rows),
        "## Pictures",
        *(f"![{caption}]({PICTURES}/{name})" for name, caption in drawn.items()),
        "## Tables",
        "What the columns of `rows.csv` and `rows.parquet` mean: `python -m perf schema`.",
        *_pivots(rows),
    ]
    path = folder / REPORT
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _introduction(rows: pd.DataFrame) -> Iterator[str]:
    kinds = {str(device).split(":")[0] for device in rows["device"].dropna()}
    yield f"# {len(rows):,} results of {rows['case_id'].nunique():,} cases"
    if "cpu" in kinds:
        yield (
            "On the CPU the fallback was measured, tritonrnn's torch path: no Triton kernel ran, "
            "Triton's interpreter was not timed, `wall_us` counts, and the columns of a GPU and of "
            "the roofline model are empty."
        )
    if "cuda" in kinds:
        yield (
            "On the GPU `event_us` counts. The limit is a model, not a measurement: "
            "`perf/roofline/model.py`."
        )


def _calibration(folder: Path) -> str:
    content = tables.read_calibration(folder)
    if not content:
        return "None was made for this folder (`python -m perf calibrate --out ...`)."
    table = calibrate.table(content)
    return f"{content['device']}\n\n{table.to_markdown(index=False, floatfmt='.4g')}"


def _failures(rows: pd.DataFrame) -> Iterator[str]:
    rows = rows.astype({"peer": "string", "status": "string"})
    yield "Cells by status:"
    yield pd.crosstab(rows["peer"], rows["status"]).to_markdown()
    failed = rows[rows["status"] != "ok"].rename(columns={"error": "reason"})
    if failed.empty:
        yield "Every cell is ok."
        return
    of_one_reason = failed.groupby(["peer", "status", "reason"], dropna=False)["case_id"]
    reasons = of_one_reason.agg(**{"cells": "size", "for example": "first"})
    yield reasons.reset_index().to_markdown(index=False)


def speedups(rows: pd.DataFrame) -> Iterator[str]:
    """Yield paragraphs on how fast each peer is, and where tritonrnn is slower than nn.RNN."""
    timed = rows[rows["speedup_vs_nn"].notna() & ~rows["peer"].isin(list(BASELINE.values()))]
    if timed.empty:
        yield "Nothing was timed beside nn.RNN."
        return
    yield (
        "Geometric mean over the cells of a kind. A cell is won or lost where p10 to p90 of its "
        "rounds lie on one side of 1, else it is even. `nn_again` is nn.RNN against itself."
    )
    won, lost = timed["speedup_vs_nn_p10"] > 1, timed["speedup_vs_nn_p90"] < 1
    kinds = timed.assign(won=won, lost=lost, even=~won & ~lost).groupby(KINDS, observed=True)
    means = {"geometric mean": _geometric_mean, "worst": "min", "best": "max", "cells": "size"}
    table = kinds["speedup_vs_nn"].agg(**means).join(kinds[["won", "even", "lost"]].sum())
    yield table.reset_index().to_markdown(index=False, floatfmt=".2f")
    ours = timed[timed["peer"] == OURS].sort_values("speedup_vs_nn")
    if ours.empty:
        return
    slower = ours[ours["speedup_vs_nn"] < 1]
    yield f"### Where {OURS} is slower: {len(slower)} of {len(ours)} cells"
    if not slower.empty:
        yield _speedup_table(slower, rows)
    yield f"### Where {OURS} is fastest"
    yield _speedup_table(ours.iloc[::-1].head(max(5, len(slower))), rows)
    yield from _cpu_targets(rows)


def _geometric_mean(speedups: pd.Series) -> float:
    """Return the mean; NaN if a cell was not timed."""
    return float(np.exp(np.log(speedups).mean(skipna=False)))


def _speedup_table(cells: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Return a table of cells, each with the p10 of nn.RNN against itself."""
    cells = with_noise(cells, rows, nn_again_p10="speedup_vs_nn_p10")
    columns = ["case_id", "mode", *SPEEDUPS, "nn_again_p10", "us_per_step", "plan"]
    return cells[columns].to_markdown(index=False, floatfmt=".2f")


def with_noise(cells: pd.DataFrame, rows: pd.DataFrame, **columns: str) -> pd.DataFrame:
    """Return cells with new columns: of the row of ``nn_again`` beside each, the columns named."""
    again = rows[rows["peer"] == "nn_again"].set_index(SHARED_KEYS)
    noise = pd.DataFrame({new: again[name] for new, name in columns.items()})
    return cells.join(noise, on=SHARED_KEYS)


def cells_of_preset(rows: pd.DataFrame, preset: str) -> tuple[pd.DataFrame, int]:
    """Return tritonrnn's rows of a preset on the CPU, and the number of cells that it has."""
    units = presets.units(preset, {}, (OURS,), "cpu")
    known = {(unit.case.case_id, mode) for unit in units for _, mode in unit.cells}
    ours = rows[(rows["device"] == "cpu") & (rows["peer"] == OURS)]
    is_known = [cell in known for cell in zip(ours["case_id"], ours["mode"], strict=True)]
    return ours[is_known], len(known)


def _cpu_targets(rows: pd.DataFrame) -> Iterator[str]:
    """Yield whether the targets of the preset ``cpu`` are met, if all of its cases are there."""
    cells, expected = cells_of_preset(rows, "cpu")
    if len(cells) < expected:
        return
    yield "### Targets of the CPU path"
    kinds = cells.groupby(["mode", "layout"], observed=True)["speedup_vs_nn"]
    means = kinds.agg(_geometric_mean)
    yield "\n".join(
        f"- {', '.join(kind)}: {means[kind]:.2f} times as fast as nn.RNN in the geometric mean; "
        f"the target of {target} is {'met' if means[kind] >= target else 'NOT met'}."
        for kind, target in presets.CPU_TARGETS.items()
        if kind in means
    )


def _pivots(rows: pd.DataFrame) -> Iterator[str]:
    for title, _, family in plots.families(rows):
        yield f"### {title}"
        table = family.pivot_table(
            index=["T", "B", "I", "H"], columns="peer", values=[*METRICS], observed=True
        )
        wanted = itertools.product(plots.peers_of(family), METRICS)
        columns = [(metric, peer) for peer, metric in wanted if (metric, peer) in table]
        table = table[columns]
        table.columns = pd.Index([f"{peer} {METRICS[metric]}" for metric, peer in columns])
        yield table.reset_index().to_markdown(index=False, floatfmt=",.4g")
