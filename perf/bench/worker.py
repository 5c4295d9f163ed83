"""Measure cases in another process, so that a crash costs no more than a row."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from perf.bench.cases import Case
from perf.bench.failures import Row, failure
from perf.bench.measure import Begun, Cell, Measurement, Settings
from perf.roofline.model import GPU

# Not for workers: Triton's interpreter is never timed, and each peer chooses its own back end.
UNSET = ("TRITON_INTERPRET", "TRITONRNN_BACKEND")
LOG_TAIL = 300


class Ended(NamedTuple):
    """Report the end, and the columns of every cell that has no row."""

    columns: Row


Message = Begun | Row | Ended


class Worker:
    """Start a process that measures.

    Attributes:
        pipe: Takes a case, its cells, the settings and the constants of the GPU, and returns
            messages, the last of which is ``Ended``; then it takes the next case.
        process: The process.
    """

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "output"
        self.process = context.Process(target=serve, args=(there, self._output))
        # Before it starts, because tritonrnn and Triton read them when they are imported.
        unset = {name: os.environ.pop(name) for name in UNSET if name in os.environ}
        self.process.start()
        os.environ.update(unset)
        there.close()

    def last_words(self, phase: str) -> str:
        """Return in a line how the process ended, in which phase, and what it printed at last."""
        self.process.join()
        code = self.process.exitcode or 0
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        printed = self._output.read_text(errors="replace") if self._output.exists() else ""
        return f"{ended} in: {phase}. {' '.join(printed[-LOG_TAIL:].split())}".strip()

    def kill(self) -> None:
        """Kill the process, and all that it started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self._folder.cleanup()


def serve(pipe: Connection, output: Path) -> None:
    """Measure in a new process what the pipe asks for, until it is closed."""
    # A process group of its own, so that it can be killed with all that it starts.
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(Ended(_measure(pipe, *pipe.recv())))
    # After a fault of the GPU, Python's normal exit can hang.
    os._exit(0)


def _measure(
    pipe: Connection, case: Case, cells: Sequence[Cell], settings: Settings, gpu: GPU | None
) -> Row:
    """Measure a case; return the columns of every cell that has no row."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        if case.on_gpu:
            # "cuda" names the current one, and has no index, which this function asks for.
            torch.cuda.set_device(torch.device(case.device).index or 0)
            # CUDA graphs can't be captured on the default stream, nor while work waits for it.
            torch.cuda.set_stream(torch.cuda.Stream())
        Measurement(case, settings, gpu, pipe.send).run(cells)
    except Exception as exception:
        return failure(exception)
    return {"status": "error", "error": "the worker left it out"}
