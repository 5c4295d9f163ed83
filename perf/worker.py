"""A process of its own for one case, so that what goes wrong in it is a row and no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from perf.cases import Case
from perf.measure import Measurement, Row, Settings, failure
from perf.roofline import Device

# Triton's interpreter is never timed, and no peer's back end is chosen from outside.
UNSET = ("TRITON_INTERPRET", "TRITONRNN_BACKEND")


@dataclass(frozen=True)
class Request:
    """What a worker is to do.

    Attributes:
        modes: For each, the peers.
        log: Takes whatever a peer prints.
    """

    case: Case
    modes: Mapping[str, Sequence[str]]
    settings: Settings
    device: Device | None
    log: Path


@dataclass(frozen=True)
class Begun:
    """A phase begins. If nothing follows, this is where it went wrong."""

    peer: str
    mode: str
    phase: str


@dataclass(frozen=True)
class Measured:
    """A row is known."""

    row: Row


@dataclass(frozen=True)
class Crashed:
    """The process can't go on."""

    columns: Row


@dataclass(frozen=True)
class Finished:
    """There is nothing more to do."""


Message = Begun | Measured | Crashed | Finished


def serve(pipe: Connection, request: Request) -> None:
    """Measure a case, and tell of it through the pipe. Runs in a new process."""
    # Of a group of its own, so that it can be ended with all that it starts.
    os.setsid()
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    for name in UNSET:
        os.environ.pop(name, None)
    if request.settings.threads:
        torch.set_num_threads(request.settings.threads)
    try:
        if request.case.on_gpu:
            torch.cuda.set_device(torch.device(request.case.device))
            # CUDA graphs can't be recorded on the default stream, nor where work waits for it.
            torch.cuda.set_stream(torch.cuda.Stream())
        Measurement(
            request.case,
            request.settings,
            request.device,
            begin=lambda *where: pipe.send(Begun(*where)),
            emit=lambda row: pipe.send(Measured(row)),
        ).run(request.modes)
    except Exception as exception:
        pipe.send(Crashed(failure(exception)))
    else:
        pipe.send(Finished())
    # After a fault of the GPU, Python's own way out can hang.
    pipe.close()
    sys.stdout.flush()
    os._exit(0)
