"""Run ``python -m perf run``: a sweep that shows its progress and can be resumed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perf import peers
from perf.bench import environment
from perf.bench.failures import Row
from perf.bench.measure import Settings
from perf.bench.sweep import OutOfTimeError, Sweep, Unit
from perf.report import tables
from perf.roofline import model as roofline


def run(units: Sequence[Unit], out: Path, settings: Settings, device: str) -> list[Row]:
    """Measure the cells that have no row in ``out`` yet.

    Args:
        units: What to measure.
        out: Folder for the rows and the facts of the run.
        settings: How to measure.
        device: Where the units run.

    Returns:
        The rows of this run.

    Raises:
        ValueError: a peer is not known, or ``out`` has rows of another machine.
    """
    for name in {name for unit in units for name, _ in unit.cells()}:
        peers.find(name)
    facts = environment.describe(torch.device(device))
    facts["threads"] = settings.threads or facts["threads"]
    _check_machine(out, facts)
    run_id = environment.new_run_id()
    tables.add_environment(out, run_id, facts)
    known = roofline.gpu_at(torch.device(device))
    calibration = tables.read_calibration(out)
    if known is not None and calibration.get("device") == known.name:
        known = known.measured(calibration["measured"])
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with (
        tables.RowFile(out) as file,
        Progress(*columns, TimeElapsedColumn(), transient=True) as progress,
    ):
        before = len(file.rows)
        bar = progress.add_task("", total=len(units))
        started = time.monotonic()
        try:
            with closing(Sweep(file, run_id, settings, known)) as sweep:
                for unit in units:
                    sweep.run(unit, lambda what: progress.update(bar, description=what))
                    progress.advance(bar)
        except (OutOfTimeError, KeyboardInterrupt):
            stopped = f"Stopped after {time.monotonic() - started:.0f} s"
            progress.console.print(f"{stopped}; run the same command again to continue.")
        rows = file.rows[before:]
    counts = Counter(str(row["status"]) for row in rows)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing new"
    waiting = sum(1 for unit in units if unit.left(file.rows).modes)
    progress.console.print(
        f"{out}: {summary}; {len(file.rows)} rows in all, {waiting} of {len(units)} cases to go."
    )
    return rows


def _check_machine(out: Path, facts: dict[str, object]) -> None:
    here = environment.machine(facts)
    for run_id, before in tables.read_environments(out).items():
        # A CPU and a GPU of one machine may share a folder.
        there = environment.machine(before)
        if there["device"] == here["device"] and there != here:
            raise ValueError(f"{out} has rows of {there}, measured in {run_id}; here it is {here}")
