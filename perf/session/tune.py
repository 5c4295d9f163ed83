"""Run ``python -m perf tune``: try every plan on the GPU at hand, before a call asks for it.

A call tries the first few plans of its ranking. Here all are tried, so that what the ranking loses
is known too. What has been tried is not tried again: Triton's cache keeps the records.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import tritonrnn
from perf.bench import presets
from perf.bench.cases import DTYPES, Case, set_precision
from perf.report import tables
from tritonrnn import autotune
from tritonrnn.autotune.records import Kernel, Shapes
from tritonrnn.kernels.cost import rank_plans
from tritonrnn.kernels.devices import device_of
from tritonrnn.precision import rounds_to_tf32

TRIALS, PLANS, TORCH = "trials", "plans", "torch"
TIMED = ["faster", "tie", "slower"]
VERDICTS = ["right", "wrong", "failed", *TIMED]
# Columns that name a class of calls, and a trial.
CLASS = [field.name for field in fields(Shapes) if field.name != "plan"]
KEY = ["kind", *dict.fromkeys(field.name for key in (Kernel, Shapes) for field in fields(key))]


def call_of(case: Case, *, training: bool) -> autotune.Call:
    """Return what a case asks of the plans, in the precision that is set."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    return autotune.Call(
        device,
        dtype,
        rounds_to_tf32(device, dtype),
        T=case.T,
        B=case.B,
        I=case.I,
        G=case.directions,
        H=case.H,
        L=case.layers,
        nonlinearity=case.nonlinearity,
        mapped=case.is_ragged,
        ragged=case.layout == "jagged",
        hx=False,
        training=training,
        torch_path="aten",
    )


def run(
    out: Path, preset: str, device: str, plan: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the trials that have no record, and write ``trials`` and ``plans`` as tables.

    The arguments are the options of the command. With a plan, the tables have its name.

    Returns:
        The rows of :func:`tritonrnn.trials` of this device and these kernels, and those of
        :func:`side_by_side`.

    Raises:
        ValueError: no plan is tried on the device.
    """
    tuner = autotune.tuner_of(torch.device(device))
    if tuner is None:
        raise ValueError(f"No plan is tried on {device}")
    serving, asked = [], autotune.mode()
    try:
        for unit in presets.units(preset, {}, ("tritonrnn",), device):
            set_precision(unit.case)
            for training in (False, True):
                call = call_of(unit.case, training=training)
                plans = rank_plans(call.problem, device_of(call.device), training)
                for one in plans:
                    if plan in (None, one.name):
                        tuner.choose_among((one,), call, plans, asked, may_try=True)
                decision = tuner.decide(call, plans, asked, may_try=False)
                name = decision.plan.name if decision.plan else TORCH
                serving.append(asdict(call.shapes(name)))
                print(f"{call.shapes(name)}: {name}. {decision.reason}", flush=True)
    finally:
        # Ties are remembered by this process only, so no later one could write them.
        here = {f"device_{name}": value for name, value in tuner.store.device.items()}.items()
        trials = pd.DataFrame(row for row in tritonrnn.trials() if here <= row.items())
        beside = side_by_side(trials, pd.DataFrame(serving))
        if plan is not None and not trials.empty:
            trials = trials[trials["plan"] == plan]
        for name, rows in ((TRIALS, trials), (PLANS, beside)):
            if not rows.empty:
                tables.write(out, f"{name}-{plan}" if plan else name, rows)
    return trials, beside


def read(folder: Path) -> pd.DataFrame:
    """Return the trials in the tables of a folder, each as it was last made."""
    found = [pd.read_parquet(path) for path in folder.glob(f"{TRIALS}*.parquet")]
    if not found:
        return pd.DataFrame()
    rows = pd.concat(found).sort_values("when")
    key = [name for name in KEY if name in rows]
    return rows.drop_duplicates(key, keep="last", ignore_index=True)


def side_by_side(trials: pd.DataFrame, serving: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each class of calls: the time by each plan, and what the choice loses.

    Args:
        trials: Rows of :func:`tritonrnn.trials`.
        serving: Classes of calls with the ``plan`` that serves each, or ``torch``.

    Returns:
        The class and what serves it; the microseconds of a call by each plan and by torch's own
        path; ``regret``, the time of what serves it divided by the shortest, less 1. The largest
        regret comes first.
    """
    if trials.empty or serving.empty or not (is_timed := trials["verdict"].isin(TIMED)).any():
        return pd.DataFrame()
    timed = trials[is_timed]
    us = timed.pivot_table(index=CLASS, columns="plan", values="plan_us_p50", observed=True)
    us[TORCH] = timed.groupby(CLASS)["other_us_p50"].median()
    serves = serving.drop_duplicates(CLASS).set_index(CLASS)["plan"].rename("serves")
    table = us.join(serves, how="inner")
    chosen_us = [row.get(row["serves"]) for _, row in table.iterrows()]
    table["regret"] = chosen_us / table[us.columns].min(axis=1) - 1
    return table.sort_values("regret", ascending=False).reset_index()


def verdict(beside: pd.DataFrame) -> str:
    """Return in a sentence what the choices of :func:`side_by_side` lose."""
    if beside.empty:
        return "No plan was timed."
    mean, best = np.expm1(np.log1p(beside["regret"]).mean()), (beside["regret"] == 0).sum()
    return (
        f"What serves takes {100 * mean:.1f} % longer than the best in the geometric mean over "
        f"{len(beside)} classes of calls, is the best in {best} of them, and takes "
        f"{100 * beside['regret'].max():.0f} % longer at worst."
    )


def summary(trials: pd.DataFrame) -> str:
    """Return a table of verdicts by plan and arithmetic, and why plans are wrong or failed."""
    if trials.empty:
        return "No plan was tried."
    arithmetic = trials["dtype"].where(~trials["tf32"], "tf32")
    by = [trials["plan"], arithmetic.rename("arithmetic")]
    table = pd.crosstab(by, trials["verdict"]).reindex(columns=VERDICTS, fill_value=0)
    table["largest error"] = trials["error"].groupby(by).max()
    is_timed = trials["verdict"].isin(TIMED)
    speedup = (trials["other_us_p50"] / trials["plan_us_p50"]).where(is_timed)
    table["times torch"] = np.exp(np.log(speedup).groupby(by).mean())
    bad = trials[trials["verdict"].isin(["wrong", "failed"])]
    lines = [f"- {one.plan} {one.verdict}: {one.reason}" for one in bad.itertuples()]
    shown = table.reset_index().to_markdown(index=False, floatfmt=".2f")
    return "\n".join([shown, "", *dict.fromkeys(lines)]).rstrip()
