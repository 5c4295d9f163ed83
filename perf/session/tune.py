"""Run ``python -m perf tune``: time every feasible plan, and compute the regret of the choice.

The peers of this sweep are the plans: tritonrnn with each plan forced, and the torch path. The
regret of a cell is the time of the chosen plan divided by that of the best one, less 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from perf import peers
from perf.bench import presets
from perf.bench.measure import Settings
from perf.bench.run import run as run_units
from perf.bench.run import waiting
from perf.bench.sweep import Unit
from perf.report import tables

REGRET, PAGE = "regret", "tune.md"
OURS = "tritonrnn"
MODES = ("infer", "fwdbwd")
# The largest geometric mean of the regret over all shapes.
TARGET = 0.05
WORST = 10
SETTINGS = Settings(rounds=9, sample_s=0.02, max_s=15.0)
TIMEOUT_S = 120.0

# The peer that runs a plan of the torch path, by the device and by the name of the plan in
# ``tritonrnn.explain``; a Triton plan has the peer "tritonrnn-" and its name. On a GPU, the plan
# "aten" is cuDNN, and the torch path has no other plan.
_ON_TORCH = {
    "cpu": {"in-place": "tritonrnn-torch", "aten": "nn_aten"},
    "cuda": {"aten": "tritonrnn-torch"},
}

_KEYS = ["case_id", "device", "mode"]
_SIZES = ["T", "B", "I", "H", "layers", "directions", "dtype", "fp32_mode"]
_COLUMNS = [*_KEYS, *_SIZES, "chosen", "chosen_us", "best", "best_us", "regret"]


def plans(device: str) -> tuple[str, ...]:
    """Return the peers that are plans on a device.

    On a CPU, where no Triton plan is timed, they are those of the torch path: in place, and ATen's
    kernels.
    """
    if device == "cpu":
        return tuple(_ON_TORCH["cpu"].values())
    return tuple(name for name in peers.PEERS if name.startswith(f"{OURS}-"))


def units(preset: str, device: str) -> list[Unit]:
    """Return the cases of a preset, forward and forward+backward, with every plan as a peer."""
    names = (OURS, *plans(device))
    modes = ",".join(MODES)
    return presets.units(preset, {"modes": modes, "layouts": "padded"}, names, device)


def chosen_peer(plan: str, device: str) -> str | None:
    """Return the peer that runs a plan of tritonrnn's rows, if there is one."""
    backend, _, name = plan.partition(", ")
    if backend == "torch":
        return _ON_TORCH[device.split(":")[0]].get(name)
    peer = f"{OURS}-{name.partition(':')[0]}"
    return peer if peer in peers.PEERS else None


def regrets(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each case and mode whose choice was timed.

    Args:
        rows: Rows of the schema, of tritonrnn and of the plans.

    Returns:
        Keys and sizes, then ``chosen`` and ``best`` with their times, ``regret``, and a column
        with the time of each plan; the largest regret first. The chosen plan's time is that of its
        own peer, which is forced as the others are; if the plan has no peer, it is tritonrnn's.
    """
    timed = rows[rows["status"] == "ok"].astype({"peer": "string"})
    timed = timed.assign(us=timed["event_us_p50"].fillna(timed["wall_us_p50"]))
    found = []
    for key, cell in timed.groupby(_KEYS, observed=True):
        assert isinstance(key, tuple)
        by_peer = cell.set_index("peer")
        if OURS not in by_peer.index:
            continue
        device = str(key[1])
        names = [name for name in plans(device.split(":")[0]) if name in by_peer.index]
        chosen = chosen_peer(str(by_peer["plan"][OURS]), device)
        chosen = chosen if chosen in names else OURS
        us = {name: float(by_peer["us"][name]) for name in {*names, chosen}}
        best = min(us, key=lambda name: (us[name], name))
        found.append(
            dict(zip(_KEYS, key))
            | {name: by_peer[name].iloc[0] for name in _SIZES}
            | {
                "chosen": chosen,
                "chosen_us": us[chosen],
                "best": best,
                "best_us": us[best],
                "regret": us[chosen] / us[best] - 1,
            }
            | {f"{name}_us": us[name] for name in names}
        )
    table = pd.DataFrame(found)
    return table if table.empty else table.sort_values("regret", ascending=False, ignore_index=True)


def mean_regret(table: pd.DataFrame) -> float:
    """Return the geometric mean of chosen over best, less 1."""
    return float(np.expm1(np.log1p(table["regret"]).mean()))


def verdict(table: pd.DataFrame) -> Iterator[str]:
    """Yield sentences about what the choices lose."""
    for mode, cells in table.groupby("mode", observed=True):
        mean = mean_regret(cells)
        best = int((cells["chosen"] == cells["best"]).sum())
        yield (
            f"{mode}: the chosen plan takes {100 * mean:.1f} % longer than the best in the "
            f"geometric mean over {len(cells)} cells; the target of {100 * TARGET:.0f} % is "
            f"{'met' if mean < TARGET else 'NOT met'}. It is the best in {best} of them, and at "
            f"worst takes {100 * cells['regret'].max():.0f} % longer."
        )


def summary(table: pd.DataFrame, rows: int = WORST) -> str:
    """Return the verdict and the cells of the largest regret in markdown."""
    if table.empty:
        return "No choice was timed."
    shown = table.head(rows)[["case_id", "mode", "chosen", "chosen_us", "best", "best_us"]].assign(
        regret=[f"{100 * regret:.1f} %" for regret in table["regret"].head(rows)]
    )
    plans = table.head(rows)[[name for name in table if name not in _COLUMNS]]
    return "\n\n".join(
        [
            "\n".join(f"- {line}" for line in verdict(table)),
            "Medians in us; the largest regret first.",
            pd.concat([shown, plans], axis=1).to_markdown(index=False, floatfmt=",.1f"),
        ]
    )


def run(
    out: Path,
    preset: str,
    device: str,
    budget_s: float,
    console: Console | None = None,
) -> pd.DataFrame:
    """Time the cells that have no row, and write ``regret.csv``, ``regret.parquet``, ``tune.md``.

    Returns:
        The table of :func:`regrets` for all rows of ``out``.
    """
    console = console or Console()
    wanted: Sequence[Unit] = units(preset, device)
    run_units(
        wanted,
        out,
        SETTINGS,
        device=device,
        timeout_s=TIMEOUT_S,
        budget_s=budget_s,
        console=console,
    )
    lines = tables.read_lines(out / tables.ROWS)
    table = regrets(tables.load(out)) if lines else pd.DataFrame()
    if not table.empty:
        tables.write(out, REGRET, table)
    title = "# What the choice of a plan loses"
    (out / PAGE).write_text(f"{title}\n\n{summary(table, len(table))}\n")
    if left := waiting(wanted, lines):
        console.print(f"{left} of {len(wanted)} cases to go; run the same command again.")
    return table
