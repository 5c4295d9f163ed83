"""Measure many cases in worker processes; every outcome is a row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perf import peers
from perf.bench import environment
from perf.bench.cases import Case
from perf.bench.failures import Row
from perf.bench.measure import Begun, Cell, Settings
from perf.bench.worker import Ended, Message, Worker
from perf.report import tables
from perf.roofline import model as roofline


@dataclass(frozen=True)
class Unit:
    """Hold a case, and its cells: each peer that measures it, in each mode."""

    case: Case
    cells: tuple[Cell, ...]

    def has(self, row: Row) -> bool:
        """Return whether a row is of this case."""
        return (row["case_id"], row["device"]) == (self.case.case_id, self.case.device)

    def left(self, rows: Iterable[Row]) -> Unit:
        """Return the unit without the cells that have a row among these."""
        done = {(row["peer"], row["mode"]) for row in rows if self.has(row)}
        return Unit(self.case, tuple(cell for cell in self.cells if cell not in done))


class Sweep:
    """Measure the cells of units on a device, but for those that ``out`` has a row of.

    Args:
        units, settings, device: What is measured, how, and where.
        out: Folder for the rows and the facts of the run.

    Raises:
        ValueError: a peer is not known, or ``out`` has rows of another machine.
    """

    def __init__(self, units: Sequence[Unit], out: Path, settings: Settings, device: str) -> None:
        for name in {name for unit in units for name, _ in unit.cells}:
            peers.find(name)
        facts = environment.describe(device)
        facts["threads"] = settings.threads or facts["threads"]
        environment.check_machines([*tables.read_environments(out).values(), facts])
        self._units, self._out, self._settings = units, out, settings
        self._run_id = environment.new_run_id()
        tables.add_environment(out, self._run_id, facts)
        self._gpu = roofline.gpu_at(device)
        calibration = tables.read_calibration(out)
        if self._gpu is not None and calibration.get("device") == self._gpu.name:
            self._gpu = self._gpu.measured(calibration["measured"])
        self._timeout_s = settings.timeout_s
        self._worker: Worker | None = None

    def run(self) -> list[Row]:
        """Measure, show the progress, and return the rows of this run."""
        started = time.monotonic()
        self._deadline = started + self._settings.budget_s
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
        with (
            tables.RowFile(self._out) as self._file,
            Progress(*columns, TimeElapsedColumn(), transient=True) as progress,
        ):
            before = len(self._file.rows)
            bar = progress.add_task("", total=len(self._units))
            try:
                for unit in self._units:
                    self._measure(unit, lambda what: progress.update(bar, description=what))
                    progress.advance(bar)
            except (TimeoutError, KeyboardInterrupt):
                stopped = f"Stopped after {time.monotonic() - started:.0f} s"
                progress.console.print(f"{stopped}; run the same command again to continue.")
            finally:
                self._end_worker()
        rows = self._file.rows[before:]
        counts = Counter(str(row["status"]) for row in rows)
        summary = ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing new"
        waiting = sum(1 for unit in self._units if unit.left(self._file.rows).cells)
        progress.console.print(
            f"{self._out}: {summary}; {len(self._file.rows)} rows in all, "
            f"{waiting} of {len(self._units)} cases to go."
        )
        return rows

    def _measure(self, unit: Unit, log: Callable[[str], None]) -> None:
        """Measure what is left of a unit, with as many workers as it takes; log each phase."""
        while (left := unit.left(self._file.rows)).cells:
            if time.monotonic() > self._deadline:
                raise TimeoutError
            try:
                self._attempt(left, log)
            finally:
                if not self._settings.one_process or left.left(self._file.rows).cells:
                    self._end_worker()

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _attempt(self, left: Unit, log: Callable[[str], None]) -> None:
        """Have one worker measure until it ends; at least one cell has a row afterwards."""
        # One that waited for this unit may be gone.
        if self._worker is None or not self._worker.process.is_alive():
            self._end_worker()
            self._worker = Worker()
        cells = self._with_baseline(left)
        self._worker.pipe.send((left.case, cells, self._settings, self._gpu))
        at = Begun("", "", "starting")
        while not isinstance(message := self._receive(self._worker, at.phase), Ended):
            if isinstance(message, Begun):
                at = message
                log(f"{left.case.case_id} {at.mode} {at.peer} {at.phase}")
            elif (message["peer"], message["mode"]) in left.cells:
                self._write(message)
        self._give_up(left.left(self._file.rows), at, message.columns)

    def _receive(self, worker: Worker, phase: str) -> Message:
        """Return the next message; from a worker that died or sends nothing, a last one.

        Raises:
            TimeoutError: the budget is spent.
        """
        remaining_s = self._deadline - time.monotonic()
        try:
            if worker.pipe.poll(max(0.0, min(self._timeout_s, remaining_s))):
                return worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return Ended({"status": "error", "error": worker.last_words(phase)})
        if remaining_s <= self._timeout_s:
            raise TimeoutError
        error = f"nothing for {self._timeout_s:g} s while in: {phase}"
        return Ended({"status": "timeout", "error": error})

    def _with_baseline(self, left: Unit) -> tuple[Cell, ...]:
        """Add the baseline where it has its row: the others' speed-ups need it in their rounds.

        Leave it out where it failed, because it would fail again.
        """
        baseline = peers.baseline(left.case.device)
        failed = {
            row["mode"]
            for row in self._file.rows
            if left.has(row) and row["peer"] == baseline and row["status"] != "ok"
        }
        beside = [(baseline, mode) for _, mode in left.cells if mode not in failed]
        return tuple(dict.fromkeys([*beside, *left.cells]))

    def _give_up(self, left: Unit, at: Begun, columns: Row) -> None:
        """Write rows for cells that can't be measured: one peer's, or all of them."""
        if (at.peer, at.mode) in left.cells:
            self._write(left.case.row(at.peer, at.mode) | columns)
            return
        # Where the baseline, which has its row, failed this time, the others have no ratio to it.
        where = f"beside {at.peer}" if at.peer else at.phase
        reason = f"{columns['status']} in {where}: {columns['error']}"
        skipped = {"status": "skipped", "error": reason}
        for name, mode in left.cells:
            if at.peer or at.mode in ("", mode):
                self._write(left.case.row(name, mode) | skipped)

    def _write(self, row: Row) -> None:
        self._file.add({"run_id": self._run_id, **row})
