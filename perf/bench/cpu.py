"""Run ``python -m perf cpu``: measure the preset ``cpu``, and judge tritonrnn by its targets."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pandas as pd

from perf.bench import presets
from perf.bench.measure import Settings
from perf.bench.run import run as run_units
from perf.bench.sweep import Unit
from perf.report import tables

# The geometric mean of the speedups that each mode should reach.
TARGETS = {"train": 1.8, "train_packed": 2.5, "infer": 1.1}

# torch.nn.RNN is measured twice: its speedup over itself is the noise.
REFERENCE, AGAIN, OURS = "nn_aten", "nn_again", "tritonrnn"

TIMEOUT_S = 300.0


def units() -> list[Unit]:
    """Return the units of the preset ``cpu``."""
    return presets.units("cpu", {}, (REFERENCE, AGAIN, OURS), "cpu")


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each case and mode: times, speedup, and the noise of nn.RNN.

    Args:
        rows: Rows of the schema; other peers and modes are left out.

    Returns:
        A table. Its column ``slower`` is true where tritonrnn is slower than nn.RNN beyond the
        noise: its median speedup is below 1 and below the noise's p10.
    """
    rows = rows.assign(mode=[_mode(row) for _, row in rows.iterrows()])
    rows = rows[rows["mode"].isin(list(TARGETS))]
    keys = ["case_id", "mode"]
    reference, again, ours = (
        rows[rows["peer"] == peer].set_index(keys) for peer in (REFERENCE, AGAIN, OURS)
    )
    speedup = ours["speedup_vs_nn"]
    noise = again.reindex(ours.index)
    summary = pd.DataFrame(
        {
            "nn_us": reference["wall_us_p50"].reindex(ours.index),
            "tritonrnn_us": ours["wall_us_p50"],
            "speedup_p10": ours["speedup_vs_nn_p10"],
            "speedup_p50": speedup,
            "speedup_p90": ours["speedup_vs_nn_p90"],
            "noise_p10": noise["speedup_vs_nn_p10"],
            "noise_p90": noise["speedup_vs_nn_p90"],
            "slower": (speedup < 1) & (speedup < noise["speedup_vs_nn_p10"]),
            "status": ours["status"].astype("string"),
        }
    )
    order = {mode: place for place, mode in enumerate(TARGETS)}
    return summary.reset_index().sort_values(
        "mode", key=lambda modes: modes.map(order), kind="stable"
    )


def _mode(row: pd.Series) -> str:
    """Return the target that a row counts for, or "" if it counts for none."""
    if row["mode"] == "infer":
        return "infer" if row["layout"] == "padded" else ""
    if row["mode"] == "fwdbwd":
        return "train" if row["layout"] == "padded" else "train_packed"
    return ""


def geometric_means(summary: pd.DataFrame) -> dict[str, float]:
    """Return the geometric mean of each mode's median speedups."""
    return {
        # If a case was not timed, its mode has no mean.
        str(mode): math.exp(group["speedup_p50"].map(math.log).mean(skipna=False))
        for mode, group in summary.groupby("mode", sort=False)
    }


def verdict(summary: pd.DataFrame) -> list[str]:
    """Return sentences about which targets are met."""
    sentences = [
        f"{str(row['status']).upper()}: {row['mode']} {row['case_id']} was not timed."
        for _, row in summary[summary["status"] != "ok"].iterrows()
    ]
    for mode, speedup in geometric_means(summary).items():
        met = "met" if speedup >= TARGETS[mode] else "NOT met"
        sentences.append(
            f"{mode}: {speedup:.2f} times as fast as torch.nn.RNN in the geometric mean; "
            f"the target of {TARGETS[mode]} is {met}."
        )
    slower = summary[summary["slower"]]
    sentences += [
        f"SLOWER: {row['mode']} {row['case_id']} runs at {row['speedup_p50']:.3f} of the speed "
        f"of torch.nn.RNN, below the {row['noise_p10']:.3f} that its noise explains."
        for _, row in slower.iterrows()
    ]
    if slower.empty:
        sentences.append("No case is slower than torch.nn.RNN beyond its noise against itself.")
    return sentences


def run(settings: Settings, out: Path | None) -> bool:
    """Measure, print the table and the verdict.

    Args:
        settings: How to measure.
        out: Folder for the rows, if they are wanted; cells that it holds are not measured again.

    Returns:
        Whether every result was right.
    """
    wanted = units()
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        run_units(wanted, folder, settings, device="cpu", timeout_s=TIMEOUT_S)
        rows = tables.load(folder)
    cases = {unit.case.case_id for unit in wanted}
    summary = summarize(rows[rows["case_id"].isin(cases) & (rows["device"] == "cpu")])
    formats = ("", "", ".0f", ".0f", ".2f", ".2f", ".2f", ".2f", ".2f", "", "")
    print(summary.to_markdown(index=False, floatfmt=formats))
    print()
    print("\n".join(verdict(summary)))
    return bool((summary["status"] == "ok").all())
