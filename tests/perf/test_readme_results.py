"""README's figures are those of the committed rows."""

from __future__ import annotations

import re
from pathlib import Path

import perf

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "perf" / "results" / "h100-2026-11-26"


def test_table_of_the_gpu_is_of_the_committed_rows():
    rows = perf.load(RESULTS)
    rows = rows[(rows["layout"] == "padded") & (rows["T"] == 1024)]
    names = {"none": "bf16", "tf32": "TF32", "ieee": "fp32"}
    found = {}
    for (mode, H, B), cell in rows.groupby(["fp32_mode", "H", "B"], observed=True):
        figures = []
        for way in ("infer", "fwdbwd"):
            peers = cell[cell["mode"] == way].set_index("peer")
            ours, theirs = peers.loc["tritonrnn"], peers.loc["nn_cudnn"]
            graphed = theirs["graph_us_p50"] / ours["graph_us_p50"]
            figures += [f"{ours['event_us_p50']:,.0f}"]
            figures += [f"{times:.2f}" for times in (ours["speedup_vs_nn"], graphed)]
        found[f"{names[mode]}, {H}, {B}"] = figures
    section = (ROOT / "README.md").read_text().partition("### On an H100")[2]
    lines = re.findall(r"^\| ((?:bf16|TF32|fp32), \d+, \d+) \| (.*) \|$", section, re.MULTILINE)
    assert {name: line.split(" | ") for name, line in lines} == found
