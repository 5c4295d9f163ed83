"""Measure cases in another process, so that a crash costs no more than a row."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from perf.bench.cases import Case
from perf.bench.failures import Row, failure
from perf.bench.measure import Measurement, Settings
from perf.roofline.model import GPU

# Not for workers: Triton's interpreter is never timed, and each peer chooses its own back end.
UNSET = ("TRITON_INTERPRET", "TRITONRNN_BACKEND")


@dataclass(frozen=True)
class Request:
    """Describe the work of a worker.

    Attributes:
        modes: The peers of each mode.
    """

    case: Case
    modes: Mapping[str, Sequence[str]]
    settings: Settings
    gpu: GPU | None


@dataclass(frozen=True)
class Begun:
    """Report that a phase begins. If no message follows, it failed in this phase."""

    peer: str
    mode: str
    phase: str


@dataclass(frozen=True)
class Ended:
    """Report the end, and the columns of every cell that has no row."""

    columns: Row


Message = Begun | Row | Ended


@dataclass(frozen=True)
class Worker:
    """Hold a process that measures.

    Attributes:
        pipe: Takes requests, one after the other, and returns the messages of each.
        output: File of whatever a peer prints.
    """

    pipe: Connection
    process: BaseProcess
    output: Path


def serve(pipe: Connection, output: Path) -> None:
    """Measure in a new process what the pipe asks for, until it is closed."""
    # A process group of its own, so that it can be killed with all that it starts.
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(Ended(_measure(pipe, pipe.recv())))
    # After a fault of the GPU, Python's normal exit can hang.
    os._exit(0)


def _measure(pipe: Connection, request: Request) -> Row:
    """Measure a case; return the columns of every cell that has no row."""
    if request.settings.threads:
        torch.set_num_threads(request.settings.threads)
    try:
        if request.case.on_gpu:
            torch.cuda.set_device(torch.device(request.case.device))
            # CUDA graphs can't be captured on the default stream, nor while work waits for it.
            torch.cuda.set_stream(torch.cuda.Stream())
        Measurement(
            request.case,
            request.settings,
            request.gpu,
            begin=lambda *where: pipe.send(Begun(*where)),
            emit=pipe.send,
        ).run(request.modes)
    except Exception as exception:
        return failure(exception)
    return {"status": "error", "error": "the worker left it out"}


@contextmanager
def worker() -> Iterator[Worker]:
    """Start a worker and yield it; kill it with all its processes."""
    context = get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = context.Process(target=serve, args=(there, output))
        # Before it starts, because tritonrnn and Triton read them when they are imported.
        unset = {name: os.environ.pop(name) for name in UNSET if name in os.environ}
        process.start()
        os.environ.update(unset)
        there.close()
        try:
            yield Worker(here, process, output)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
            here.close()
