"""Measure many cases in worker processes; every outcome is a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from perf import peers
from perf.bench.cases import Case
from perf.bench.failures import Row
from perf.bench.measure import Settings
from perf.bench.worker import Begun, Ended, Message, Request, Worker
from perf.report.tables import RowFile
from perf.roofline.model import GPU


@dataclass(frozen=True)
class Unit:
    """Hold a case, and the peers that run each mode of it."""

    case: Case
    modes: Mapping[str, Sequence[str]]

    def cells(self) -> Iterator[tuple[str, str]]:
        """Yield each peer and mode."""
        for mode, names in self.modes.items():
            for name in names:
                yield name, mode

    def has(self, row: Row) -> bool:
        """Return whether a row is of this case."""
        return (row["case_id"], row["device"]) == (self.case.case_id, self.case.device)

    def left(self, rows: Iterable[Row]) -> Unit:
        """Return the unit without the cells that have a row among these."""
        done = {(row["peer"], row["mode"]) for row in rows if self.has(row)}
        left = {
            mode: tuple(name for name in names if (name, mode) not in done)
            for mode, names in self.modes.items()
        }
        return Unit(self.case, {mode: names for mode, names in left.items() if names})


class OutOfTimeError(Exception):
    """The budget of a sweep is spent."""


class Sweep:
    """Measure units and write their rows.

    Args:
        file: File of the rows; cells that it holds are not measured again.
        run_id: The id of this run.
        settings: How to measure.
        gpu: Constants of the roofline model, if the cases run on a GPU.
    """

    def __init__(self, file: RowFile, run_id: str, settings: Settings, gpu: GPU | None) -> None:
        self._file, self._run_id = file, run_id
        self._settings, self._gpu = settings, gpu
        self._timeout_s = settings.timeout_s
        self._deadline = time.monotonic() + settings.budget_s
        self._worker: Worker | None = None

    def close(self) -> None:
        """End the worker that waits for the next unit."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def run(self, unit: Unit, log: Callable[[str], None]) -> None:
        """Measure what is left of a unit, with as many workers as it takes.

        Args:
            unit: What to measure.
            log: Called with a message when a phase begins.

        Raises:
            OutOfTimeError: the budget is spent; rows of finished cells are written.
        """
        while (left := unit.left(self._file.rows)).modes:
            if time.monotonic() > self._deadline:
                raise OutOfTimeError
            try:
                self._attempt(left, log)
            finally:
                if not self._settings.one_process or left.left(self._file.rows).modes:
                    self.close()

    def _attempt(self, left: Unit, log: Callable[[str], None]) -> None:
        """Have one worker measure until it ends; at least one cell has a row afterwards."""
        at = Begun("", "", "starting")
        columns: Row | None = None
        # One that waited for this unit may be gone.
        if self._worker is None or not self._worker.process.is_alive():
            self.close()
            self._worker = Worker()
        worker = self._worker
        worker.pipe.send(Request(left.case, self._with_baseline(left), self._settings, self._gpu))
        while columns is None:
            try:
                message = self._receive(worker.pipe)
            except TimeoutError as error:
                columns = {"status": "timeout", "error": f"{error} while in: {at.phase}"}
            except (EOFError, ConnectionResetError):
                columns = {"status": "error", "error": worker.last_words(at.phase)}
            else:
                if isinstance(message, Begun):
                    at = message
                    log(f"{left.case.case_id} {at.mode} {at.peer} {at.phase}")
                elif isinstance(message, Ended):
                    columns = message.columns
                elif (message["peer"], message["mode"]) in set(left.cells()):
                    self._write(message)
        self._give_up(left.left(self._file.rows), at, columns)

    def _receive(self, pipe: Connection) -> Message:
        """Return the next message.

        Raises:
            EOFError: the worker died.
            TimeoutError: the worker sends nothing.
            OutOfTimeError: the budget is spent.
        """
        remaining_s = self._deadline - time.monotonic()
        if not pipe.poll(max(0.0, min(self._timeout_s, remaining_s))):
            if remaining_s <= self._timeout_s:
                raise OutOfTimeError
            raise TimeoutError(f"nothing for {self._timeout_s:g} s")
        return pipe.recv()

    def _with_baseline(self, left: Unit) -> dict[str, Sequence[str]]:
        """Add the baseline where it has its row: the others' speed-ups need it in their rounds.

        Leave it out where it failed, because it would fail again.
        """
        name = peers.baseline(left.case.device)
        failed = {
            row["mode"]
            for row in self._file.rows
            if left.has(row) and row["peer"] == name and row["status"] != "ok"
        }
        return {
            mode: names if name in names or mode in failed else (name, *names)
            for mode, names in left.modes.items()
        }

    def _give_up(self, left: Unit, at: Begun, columns: Row) -> None:
        """Write rows for cells that can't be measured: one peer's, or all of them."""
        if (at.peer, at.mode) in left.cells():
            self._write({**left.case.columns(), "peer": at.peer, "mode": at.mode, **columns})
            return
        # Where the baseline, which has its row, failed this time, the others have no ratio to it.
        where = f"beside {at.peer}" if at.peer else at.phase
        reason = f"{columns['status']} in {where}: {columns['error']}"
        for name, mode in left.cells():
            if at.peer or at.mode in ("", mode):
                cell = {**left.case.columns(), "peer": name, "mode": mode}
                self._write(cell | {"status": "skipped", "error": reason})

    def _write(self, row: Row) -> None:
        self._file.add({"run_id": self._run_id, **row})
