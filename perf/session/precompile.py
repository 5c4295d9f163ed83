"""Compile kernels in parallel, before a run whose workers would compile them one by one.

Every peer that compiles runs a few steps of each case in a pool of processes. That leaves its
kernels in the disk caches of Triton and of torch's extensions; a kernel does not depend on the
number of steps.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from perf import peers
from perf.bench.cases import DTYPES, Case, Workload
from perf.bench.measure import first_line
from perf.bench.sweep import Unit
from perf.bench.switches import set_precision

STEPS = 2
# These come first, because nvcc takes a minute or two where Triton takes a second.
FIRST = ("flashrnn", "flashrnn-alternating")
# The processes of the pool share one GPU; more of them would not fit its memory.
MOST_PROCESSES = 16


@dataclass(frozen=True)
class Compiled:
    """Hold a peer and a case, the time they took, and the error, if one was raised."""

    peer: str
    case: Case
    seconds: float
    error: str | None


def tasks(units: Iterable[Unit], *, every_epilogue: bool = False) -> list[tuple[str, Case]]:
    """Return each peer that compiles with each case that has kernels of its own, slowest first.

    Args:
        units: The units that will be run.
        every_epilogue: Whether to compile each case with both nonlinearities; those that no unit
            asks for come last.
    """
    found: dict[tuple[str, Case], int] = {}
    for unit in units:
        for name in {name for name, _ in unit.cells() if peers.find(name).compiles}:
            for nonlinearity in ("tanh", "relu") if every_epilogue else (unit.case.nonlinearity,):
                case = replace(unit.case, T=STEPS, nonlinearity=nonlinearity)
                asked = nonlinearity == unit.case.nonlinearity
                order = 0 if name in FIRST else 1 if asked else 2
                if peers.find(name).supports(case) is None:
                    found[name, case] = min(order, found.get((name, case), order))
    return sorted(found, key=lambda task: found[task])


def compile_one(task: tuple[str, Case]) -> Compiled:
    """Run a few steps of a case, forward and backward, in a process of the pool."""
    name, case = task
    started = time.monotonic()
    error = None
    try:
        if case.on_gpu:
            torch.cuda.set_device(torch.device(case.device))
        set_precision(case)
        workload = Workload.make(case, seed=0).to(case.device, DTYPES[case.dtype])
        module = case.make_module(nn.RNN, 0).to(case.device, DTYPES[case.dtype])
        runner = peers.find(name).build(case, module, workload)
        with runner.context():
            for trains in (False, True):
                runner.results(workload, trains=trains)
    except Exception as exception:
        error = f"{type(exception).__name__}: {first_line(exception)}"
    return Compiled(name, case, time.monotonic() - started, error)


def compile_all(todo: list[tuple[str, Case]], budget_s: float) -> Iterator[Compiled]:
    """Compile in parallel, and yield each result, for as long as the budget lasts."""
    deadline = time.monotonic() + budget_s
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(todo))
    if not processes:
        return
    # Leaving the pool kills its processes, whatever they are doing.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.imap_unordered(compile_one, todo)
        for _ in todo:
            try:
                # If a process dies, its task never yields a result.
                yield results.next(max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                return
