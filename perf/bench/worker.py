"""Measure one case in a process of its own, so that a crash costs no more than a row."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from perf.bench.cases import Case
from perf.bench.measure import Measurement, Row, Settings, failure
from perf.roofline.model import GPU

# Unset, so that Triton's interpreter is never timed and each peer chooses its own back end.
UNSET = ("TRITON_INTERPRET", "TRITONRNN_BACKEND")


@dataclass(frozen=True)
class Request:
    """Describe the work of a worker.

    Attributes:
        modes: The peers of each mode.
        output: File for whatever a peer prints.
    """

    case: Case
    modes: Mapping[str, Sequence[str]]
    settings: Settings
    gpu: GPU | None
    output: Path


@dataclass(frozen=True)
class Begun:
    """Report that a phase begins. If no message follows, it failed in this phase."""

    peer: str
    mode: str
    phase: str


@dataclass(frozen=True)
class Measured:
    """Report a row."""

    row: Row


@dataclass(frozen=True)
class Crashed:
    """Report that the process can't continue."""

    columns: Row


@dataclass(frozen=True)
class Finished:
    """Report that there is nothing more to do."""


Message = Begun | Measured | Crashed | Finished


def serve(pipe: Connection, request: Request) -> None:
    """Measure a case in a new process, and send messages through the pipe."""
    # A process group of its own, so that it can be killed with all that it starts.
    os.setsid()
    output = os.open(request.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    for name in UNSET:
        os.environ.pop(name, None)
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
            emit=lambda row: pipe.send(Measured(row)),
        ).run(request.modes)
    except Exception as exception:
        pipe.send(Crashed(failure(exception)))
    else:
        pipe.send(Finished())
    # After a fault of the GPU, Python's normal exit can hang.
    pipe.close()
    sys.stdout.flush()
    os._exit(0)
