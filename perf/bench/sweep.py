"""Measure many cases, one worker process after the other; every outcome is a row."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from perf import peers
from perf.bench.cases import Case
from perf.bench.measure import Row, Settings
from perf.bench.worker import Begun, Crashed, Finished, Measured, Message, Request, serve
from perf.report.schema import KEYS
from perf.report.tables import RowFile
from perf.roofline.model import GPU

LOG_TAIL = 300


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

    def without(self, done: Iterable[tuple[str, str]]) -> Unit:
        """Return the unit without the cells that are done."""
        done = set(done)
        left = {
            mode: tuple(name for name in names if (name, mode) not in done)
            for mode, names in self.modes.items()
        }
        return Unit(self.case, {mode: names for mode, names in left.items() if names})

    def left(self, rows: Iterable[Row]) -> Unit:
        """Return the unit without the cells that have a row among these."""
        own = (self.case.case_id, self.case.device)
        return self.without(
            (str(row["peer"]), str(row["mode"]))
            for row in rows
            if (row["case_id"], row["device"]) == own
        )


class OutOfTimeError(Exception):
    """The budget of a sweep is spent."""


class Sweep:
    """Measure units and write their rows.

    Args:
        file: File of the rows; cells that it holds are not measured again.
        run_id: The id of this run.
        settings: How to measure.
        gpu: Constants of the roofline model, if they are known for the device.
        timeout_s: A worker that sends nothing for longer is killed.
        budget_s: Time after which the sweep stops.
    """

    def __init__(
        self,
        file: RowFile,
        run_id: str,
        settings: Settings,
        gpu: GPU | None,
        *,
        timeout_s: float,
        budget_s: float = float("inf"),
    ) -> None:
        self._file, self._run_id = file, run_id
        self._settings, self._gpu = settings, gpu
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + budget_s
        self._done = {tuple(str(row[key]) for key in KEYS) for row in file.rows}

    def left(self, unit: Unit) -> Unit:
        """Return the unit without the cells that have a row in the file."""
        return unit.without(
            (name, mode)
            for name, mode in unit.cells()
            if (unit.case.case_id, unit.case.device, name, mode) in self._done
        )

    def run(self, unit: Unit, log: Callable[[str], None] = lambda message: None) -> None:
        """Measure what is left of a unit, with as many workers as it takes.

        Args:
            unit: What to measure.
            log: Called with a message when a phase begins.

        Raises:
            OutOfTimeError: the budget is spent; rows of finished cells are written.
        """
        while (left := self.left(unit)).modes:
            if time.monotonic() > self._deadline:
                raise OutOfTimeError
            self._attempt(left, log)

    def _attempt(self, left: Unit, log: Callable[[str], None]) -> None:
        """Run one worker until it ends; at least one cell has a row afterwards."""
        at = Begun("", "", "starting")
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            modes = self._with_baseline(left)
            request = Request(left.case, modes, self._settings, self._gpu, output)
            with worker(request) as (pipe, ended):
                while True:
                    message = self._receive(pipe)
                    if isinstance(message, Begun):
                        at = message
                        log(f"{left.case.case_id} {at.mode} {at.peer} {at.phase}")
                    elif isinstance(message, Measured):
                        self._write(left, message.row)
                    elif isinstance(message, Finished):
                        # The worker sends nothing more, so a cell without a row gets an error.
                        columns: Row = {"status": "error", "error": "the worker left it out"}
                        return self._give_up(left, Begun("", "", ""), columns)
                    elif isinstance(message, Crashed):
                        return self._give_up(left, at, message.columns)
                    elif message is None:
                        error = f"nothing for {self._timeout_s:g} s while in: {at.phase}"
                        return self._give_up(left, at, {"status": "timeout", "error": error})
                    else:
                        error = f"{describe_exit(ended())} in: {at.phase}. {tail(output)}".strip()
                        return self._give_up(left, at, {"status": "error", "error": error})

    def _receive(self, pipe: Connection) -> Message | EOFError | None:
        """Return the next message, None after a timeout, or the error that ended the pipe."""
        remaining_s = self._deadline - time.monotonic()
        if not pipe.poll(max(0.0, min(self._timeout_s, remaining_s))):
            if remaining_s <= self._timeout_s:
                raise OutOfTimeError
            return None
        try:
            return pipe.recv()
        except EOFError as error:
            return error

    def _with_baseline(self, left: Unit) -> dict[str, Sequence[str]]:
        """Add the baseline where it has its row: the others' speed-ups need it in their rounds.

        Leave it out where it failed, because it would fail again.
        """
        name = peers.baseline(left.case.device)
        failed = {
            row["mode"]
            for row in self._file.rows
            if (row["case_id"], row["device"], row["peer"])
            == (left.case.case_id, left.case.device, name)
            and row["status"] != "ok"
        }
        return {
            mode: names if name in names or mode in failed else (name, *names)
            for mode, names in left.modes.items()
        }

    def _give_up(self, left: Unit, at: Begun, columns: Row) -> None:
        """Write rows for cells that can't be measured: one peer's, or all of them."""
        remaining = self.left(left)
        cells = [cell for cell in remaining.cells() if cell == (at.peer, at.mode)]
        if cells:
            self._write_failure(left.case, cells[0], columns)
        elif at.peer:
            # The baseline, which has its row, failed this time; the others have no ratio to it.
            for cell in remaining.cells():
                self._write_failure(left.case, cell, skipped(f"beside {at.peer}", columns))
        else:
            for cell in remaining.cells():
                if not at.mode or cell[1] == at.mode:
                    self._write_failure(left.case, cell, skipped(at.phase, columns))

    def _write_failure(self, case: Case, cell: tuple[str, str], columns: Row) -> None:
        self._write(None, {**case.columns(), "peer": cell[0], "mode": cell[1], **columns})

    def _write(self, left: Unit | None, row: Row) -> None:
        if left is not None and (row["peer"], row["mode"]) not in set(left.cells()):
            return
        self._done.add(tuple(str(row[key]) for key in KEYS))
        self._file.add({"run_id": self._run_id, **row})


def skipped(where: str, columns: Row) -> Row:
    """Return the columns of a cell that was never begun."""
    reason = f"{columns['status']} in {where}: {columns['error']}" if where else columns["error"]
    return {"status": "skipped", "error": reason}


@contextmanager
def worker(request: Request) -> Iterator[tuple[Connection, Callable[[], int | None]]]:
    """Start a worker; on leaving, kill it and all its processes.

    Yields:
        The reading end of the pipe, and a function that waits for the process and returns its exit
        code.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(sending, request))
    process.start()
    sending.close()

    def ended() -> int | None:
        process.join()
        return process.exitcode

    try:
        yield receiving, ended
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
        receiving.close()


def describe_exit(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with {code}"


def tail(path: Path) -> str:
    """Return the end of a file in one line."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return " ".join(text[-LOG_TAIL:].split())
