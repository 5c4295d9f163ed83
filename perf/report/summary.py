"""Run ``python -m perf report DIR``: show a folder of results in markdown and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from perf.bench import cpu
from perf.peers import BASELINE
from perf.report import plots, tables
from perf.roofline import calibrate

REPORT, PICTURES = "report.md", "plots"

# The cells of a geometric mean share these columns.
KINDS = ["peer", "device", "mode", "layout", "dtype", "fp32_mode"]
OURS = "tritonrnn"
METRICS = {
    "us": "us",
    "us_per_step": "us/step",
    "speedup_vs_nn": "x nn.RNN",
    "pct_of_limit": "% of limit",
    "peak_MiB": "peak MiB",
    "saved_MiB": "saved MiB",
}


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
        _environment(folder),
        "## Calibration",
        _calibration(folder),
        "## Failures",
        *_failures(rows),
        "## Speed-up over nn.RNN",
        *_speedups(rows),
        "## Pictures",
        *(f"![{picture.caption}]({PICTURES}/{picture.path.name})" for picture in drawn),
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


def _environment(folder: Path) -> str:
    runs = tables.read_environments(folder)
    return pd.DataFrame(runs).to_markdown() if runs else "Not recorded."


def _calibration(folder: Path) -> str:
    content = tables.read_calibration(folder)
    if not content:
        return "None was made for this folder (`python -m perf calibrate --out ...`)."
    table = calibrate.table(content)
    return f"{content['device']}\n\n{table.to_markdown(index=False, floatfmt='.4g')}"


def _failures(rows: pd.DataFrame) -> Iterator[str]:
    counts = pd.crosstab(rows["peer"].astype("string"), rows["status"].astype("string"))
    yield "Cells by status:"
    yield counts.to_markdown()
    failed = rows[rows["status"] != "ok"]
    if failed.empty:
        yield "Every cell is ok."
        return
    reasons = (
        failed.astype({"peer": "string", "status": "string"})
        .groupby(["peer", "status", "error"], dropna=False)["case_id"]
        .agg(["size", "first"])
        .reset_index()
        .rename(columns={"size": "cells", "first": "for example", "error": "reason"})
    )
    yield reasons.to_markdown(index=False)


def _speedups(rows: pd.DataFrame) -> Iterator[str]:
    timed = rows[rows["speedup_vs_nn"].notna() & ~rows["peer"].isin(list(BASELINE.values()))]
    if timed.empty:
        yield "Nothing was timed beside nn.RNN."
        return
    yield (
        "Geometric mean over the cells of a kind. A cell is won or lost where p10 to p90 of its "
        "rounds lie on one side of 1, else it is even. `nn_again` is nn.RNN against itself."
    )
    summary = pd.DataFrame(
        [
            dict(zip(KINDS, key)) | _summary(cells)  # type: ignore[arg-type]
            for key, cells in timed.groupby(KINDS, observed=True)
        ]
    )
    yield summary.to_markdown(index=False, floatfmt=".2f")
    ours = timed[timed["peer"] == OURS].sort_values("speedup_vs_nn")
    if ours.empty:
        return
    lost = ours[ours["speedup_vs_nn"] < 1]
    yield f"### Where {OURS} is slower: {len(lost)} of {len(ours)} cells"
    if not lost.empty:
        yield _cells(lost)
    yield f"### Where {OURS} is fastest"
    yield _cells(ours.iloc[::-1].head(max(5, len(lost))))
    if (rows["device"] == "cpu").any():
        known = {unit.case.case_id for unit in cpu.units()}
        judged = rows[rows["case_id"].isin(known) & (rows["device"] == "cpu")]
        if set(judged["case_id"]) == known:
            yield "### Targets of the CPU path"
            yield "\n".join(f"- {sentence}" for sentence in cpu.verdict(cpu.summarize(judged)))


def _summary(cells: pd.DataFrame) -> dict[str, object]:
    speedups = cells["speedup_vs_nn"]
    won = int((cells["speedup_vs_nn_p10"] > 1).sum())
    lost = int((cells["speedup_vs_nn_p90"] < 1).sum())
    return {
        "geometric mean": float(np.exp(np.log(speedups).mean())),
        "worst": speedups.min(),
        "best": speedups.max(),
        "cells": len(cells),
        "won": won,
        "even": len(cells) - won - lost,
        "lost": lost,
    }


def _cells(cells: pd.DataFrame) -> str:
    columns = [
        *("case_id", "mode", "speedup_vs_nn_p10", "speedup_vs_nn", "speedup_vs_nn_p90"),
        *("us_per_step", "plan"),
    ]
    return cells[columns].to_markdown(index=False, floatfmt=".2f")


def _pivots(rows: pd.DataFrame) -> Iterator[str]:
    timed = rows[rows["status"] == "ok"].astype({"peer": "string"})
    timed = timed.assign(us=timed["event_us_p50"].fillna(timed["wall_us_p50"]))
    for key, family in timed.groupby(plots.FAMILY, observed=True, sort=True):
        assert isinstance(key, tuple)
        yield f"### {plots.family_title(key)}"
        metrics = [metric for metric in METRICS if family[metric].notna().any()]
        table = family.pivot_table(
            index=["T", "B", "I", "H"], columns="peer", values=metrics, observed=True
        )
        table = table.swaplevel(axis=1).sort_index(axis=1, level=0, sort_remaining=False)
        ordered = [
            (peer, metric)
            for peer in plots.peers_of(family)
            for metric in metrics
            if (peer, metric) in table.columns
        ]
        table = table[ordered]
        table.columns = pd.Index([f"{peer} {METRICS[metric]}" for peer, metric in ordered])
        yield table.reset_index().to_markdown(index=False, floatfmt=",.4g")
