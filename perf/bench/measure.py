"""Measure one case: check every peer, weigh its memory and time it against the others."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import nn

from perf import peers
from perf.bench import memory
from perf.bench.cases import DTYPES, Case, Workload
from perf.bench.check import Check, results_of
from perf.bench.failures import Row, failure, first_line, raise_if_gpu_is_lost
from perf.bench.switches import set_precision
from perf.bench.telemetry import Telemetry
from perf.bench.timing import (
    Clock,
    EventClock,
    GraphClock,
    Job,
    WallClock,
    floor_us,
    make_job,
    time_in_rounds,
)
from perf.peers.peer import Runner
from perf.roofline import model as roofline

Cell = tuple[str, str]

# A row gets a note if its time is below that of so many empty kernels.
FLOORS = 5


@dataclass(frozen=True)
class Settings:
    """Hold how to measure.

    Attributes:
        rounds: Samples of each peer.
        sample_s: About how long a sample lasts.
        max_s: About how long the rounds of a case and mode may last.
        threads: CPU threads of torch; 0 for its own choice.
        seed: Seed of the inputs, the weights and the order of the peers.
        timeout_s: A worker that sends nothing for longer is killed.
        budget_s: Time after which a sweep stops.
        one_process: Whether a worker that has finished a case takes the next one, which saves the
            seconds that one takes to start.
    """

    rounds: int = 20
    sample_s: float = 0.05
    max_s: float = 60.0
    threads: int = 0
    seed: int = 0
    timeout_s: float = 300.0
    budget_s: float = float("inf")
    one_process: bool = False


class Measurement:
    """Measure one case in this process.

    Args:
        case: What to run.
        settings: How to measure.
        gpu: Constants of the roofline model, if the case runs on a GPU.
        begin: Called with the peer, mode and phase that come next, to name them after a crash.
        emit: Called with each row as soon as it is known.
    """

    def __init__(
        self,
        case: Case,
        settings: Settings,
        gpu: roofline.GPU | None,
        *,
        begin: Callable[[str, str, str], None],
        emit: Callable[[Row], None],
    ) -> None:
        self._case, self._settings = case, settings
        self._device, self._gpu = torch.device(case.device), gpu
        self._begin, self._emit = begin, emit
        self._clock = "event_us" if case.on_gpu else "wall_us"
        # All modes that train share a run, which is checked.
        self._checked = functools.cache(self._build_and_check)
        set_precision(case)

    def run(self, modes: Mapping[str, Sequence[str]]) -> None:
        """Measure the peers of each mode, and emit a row for each."""
        able: dict[str, list[str]] = {}
        for mode, names in modes.items():
            for name in names:
                reason = peers.find(name).supports(self._case)
                if reason is None:
                    able.setdefault(mode, []).append(name)
                else:
                    self._emit(self._row(name, mode) | {"status": "unsupported", "error": reason})
        if not able:
            return
        drawn = Workload.make(self._case, seed=self._settings.seed)
        self._workload = drawn.to(self._case.device, DTYPES[self._case.dtype])
        self._check = Check(self._case, drawn, self._settings.seed)
        for mode, names in able.items():
            self._measure(mode, names)

    def _measure(self, mode: str, names: Sequence[str]) -> None:
        self._begin("", mode, "float64")
        self._check.tolerance(mode != "infer")
        rows: dict[str, Row] = {}
        clocks: dict[Cell, Clock] = {}
        for name in names:
            try:
                self._begin(name, mode, "check")
                runner, columns = self._checked(name, mode != "infer")
                row = self._row(name, mode) | columns
                if runner is None or row["status"] != "ok":
                    self._emit(row)
                    continue
                self._begin(name, mode, "memory")
                row |= self._weigh(runner, mode)
                self._begin(name, mode, "warm up")
                clocks |= self._clocks(name, runner, mode, row)
                rows[name] = row
            except Exception as exception:
                raise_if_gpu_is_lost(exception)
                self._emit(self._row(name, mode) | failure(exception))
        self._time(mode, rows, clocks)

    def _build_and_check(self, name: str, trains: bool) -> tuple[Runner | None, Row]:
        """Run a peer once; return it, and the columns of its rows: right, wrong or failed."""
        module = self._case.make_module(nn.RNN, self._settings.seed)
        module = module.to(self._case.device, DTYPES[self._case.dtype])
        started = time.perf_counter()
        try:
            runner = peers.find(name).build(self._case, module, self._workload)
            with runner.context():
                results = results_of(runner, self._workload, trains)
                with torch.set_grad_enabled(trains):
                    plan = runner.plan()
            error = self._check.error(results, trains)
        except Exception as exception:
            raise_if_gpu_is_lost(exception)
            return None, failure(exception)
        tolerance = self._check.tolerance(trains)
        columns: Row = {
            "status": "ok",
            "max_rel_err": error,
            "tolerance": tolerance,
            "compile_s": time.perf_counter() - started,
            "plan": plan or None,
        }
        if not error <= tolerance:
            wrong = f"off by {error:.3g}, allowed {tolerance:.3g}"
            columns |= {"status": "wrong", "error": wrong}
        return runner, columns

    def _weigh(self, runner: Runner, mode: str) -> Row:
        runner = replace(runner, forward=runner.uncaptured or runner.forward)
        job = make_job(runner, self._workload, mode)
        with job.context():
            called = memory.footprint(job.call, self._device)
            job.reset()
            forward = make_job(runner, self._workload, "infer" if mode == "infer" else "fwd")
            kept = memory.footprint(forward.call, self._device)
        saved = max(0, kept.alive_bytes - memory.unique_bytes(kept.result))
        return {"peak_MiB": called.peak_bytes / memory.MIB, "saved_MiB": saved / memory.MIB}

    def _clocks(self, name: str, runner: Runner, mode: str, row: Row) -> dict[Cell, Clock]:
        seconds = self._settings.sample_s

        def job() -> Job:
            return make_job(runner, self._workload, mode)

        clocks: dict[Cell, Clock] = {(name, "wall_us"): WallClock(job(), seconds)}
        if self._case.on_gpu:
            clocks[name, "event_us"] = EventClock(job(), seconds)
            if runner.uncaptured is not None:
                row["note"] = "no CUDA graph: it replays some of its own"
                return clocks
            try:
                clocks[name, "graph_us"] = GraphClock(job(), seconds)
            except Exception as exception:
                raise_if_gpu_is_lost(exception)
                row["note"] = f"no CUDA graph: {first_line(exception)}"
        return clocks

    def _time(self, mode: str, rows: Mapping[str, Row], clocks: Mapping[Cell, Clock]) -> None:
        settings, timed = self._settings, dict(rows)
        telemetry = Telemetry(self._device)

        def before(cell: Cell) -> None:
            telemetry.sample()
            self._begin(cell[0], mode, "timing")

        def failed(cell: Cell, exception: Exception) -> None:
            raise_if_gpu_is_lost(exception)
            name, clock = cell
            if clock == "graph_us":
                rows[name]["note"] = f"no CUDA graph: {first_line(exception)}"
            elif timed.pop(name, None) is not None:
                self._emit(rows[name] | failure(exception))

        # Seeded by the case and mode, so that a case has the same order after a resumed run.
        random = Random(f"{settings.seed} {self._case.case_id} {mode}")
        rounds, most_s = settings.rounds, settings.max_s
        samples = time_in_rounds(
            clocks, rounds=rounds, max_seconds=most_s, random=random, before=before, failed=failed
        )
        floor = floor_us(settings.sample_s) if self._case.on_gpu and timed else None
        model = roofline.columns(self._case, mode, self._gpu, settings.seed)
        for name, row in timed.items():
            times = self._times(name, samples)
            row |= times | telemetry.columns() | model
            if floor is not None:
                row["event_floor_us"] = floor
                if times["event_us_p50"] < FLOORS * floor:
                    row["note"] = f"{row.get('note', '')} under {FLOORS} empty kernels".strip()
            self._emit(row)

    def _times(self, name: str, samples: Sequence[Mapping[Cell, float]]) -> dict[str, float]:
        times: dict[str, float] = {"n_samples": len(samples)}
        for clock in ("event_us", "graph_us", "wall_us"):
            if all((name, clock) in sample for sample in samples):
                times |= quantiles(clock, [sample[name, clock] for sample in samples])
        own, reference = ((one, self._clock) for one in (name, peers.baseline(self._case.device)))
        if all(reference in sample for sample in samples):
            ratios = [sample[reference] / sample[own] for sample in samples]
            times |= quantiles("speedup_vs_nn", ratios)
            times["speedup_vs_nn"] = times.pop("speedup_vs_nn_p50")
        return times

    def _row(self, name: str, mode: str) -> Row:
        return {**self._case.columns(), "peer": name, "mode": mode}


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the columns ``name_p10``, ``name_p50`` and ``name_p90``."""
    return {
        f"{name}_p{percent}": float(np.quantile(values, percent / 100)) for percent in (10, 50, 90)
    }
