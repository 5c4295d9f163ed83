"""Measure one case: check every peer, weigh its memory and time it against the others."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from perf import peers
from perf.bench import memory, timing
from perf.bench.cases import DTYPES, Case, Workload, set_precision
from perf.bench.check import Check, results_of
from perf.bench.failures import Row, failure, first_line, raise_if_gpu_is_lost
from perf.peers.peer import Runner
from perf.roofline import model as roofline

# A peer and a mode; a peer and the column that a clock measures.
Cell = tuple[str, str]
Timed = tuple[str, str]

# Even a case that takes too long gets so many rounds, for its quantiles.
LEAST_ROUNDS = 3
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


class Begun(NamedTuple):
    """Report that a phase begins. If no message follows, it failed in this phase."""

    peer: str
    mode: str
    phase: str


class Measurement:
    """Measure one case in this process.

    Args:
        case, settings: What to measure, and how.
        gpu: Constants of the roofline model, if the case runs on a GPU.
        send: Called with each phase that begins, and with each row as soon as it is known.
    """

    def __init__(
        self, case: Case, settings: Settings, gpu: roofline.GPU | None, send: Callable[..., None]
    ) -> None:
        self._case, self._settings = case, settings
        self._device, self._gpu = torch.device(case.device), gpu
        self._send = send
        # All modes that train share a run, which is checked.
        self._checked = functools.cache(self._build_and_check)
        set_precision(case)

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure the cells, mode by mode, and send a row for each."""
        able: dict[str, list[str]] = {}
        for name, mode in cells:
            reason = peers.find(name).supports(self._case)
            if reason is None:
                able.setdefault(mode, []).append(name)
            else:
                self._send(self._case.row(name, mode) | {"status": "unsupported", "error": reason})
        if not able:
            return
        drawn = Workload.make(self._case, seed=self._settings.seed)
        self._workload = drawn.to(self._case.device, DTYPES[self._case.dtype])
        self._check = Check(self._case, drawn, self._settings.seed)
        for mode, names in able.items():
            self._measure(mode, names)

    def _measure(self, mode: str, names: Sequence[str]) -> None:
        trains = mode != "infer"
        self._send(Begun("", mode, "float64"))
        self._check.tolerance(trains)
        rows: dict[str, Row] = {}
        clocks: dict[Timed, timing.Clock] = {}
        for name in names:
            try:
                self._send(Begun(name, mode, "check"))
                runner, columns = self._checked(name, trains)
                row = self._case.row(name, mode) | columns
                if row["status"] != "ok":
                    self._send(row)
                    continue
                self._send(Begun(name, mode, "memory"))
                row |= self._weigh(runner, mode)
                self._send(Begun(name, mode, "warm up"))
                clocks |= self._clocks(name, runner, mode, row)
                rows[name] = row
            except Exception as exception:
                raise_if_gpu_is_lost(exception)
                self._send(self._case.row(name, mode) | failure(exception))
        self._time(mode, rows, clocks)

    def _build_and_check(self, name: str, trains: bool) -> tuple[Runner, Row]:
        """Run a peer once; return it, and the columns of its rows: right or wrong."""
        module = self._case.make_module(self._settings.seed)
        module = module.to(self._case.device, DTYPES[self._case.dtype])
        started = time.perf_counter()
        runner = peers.find(name).build(self._case, module, self._workload)
        with runner.context():
            results = results_of(runner, self._workload, trains)
            with torch.set_grad_enabled(trains):
                plan = runner.plan()
        error, tolerance = self._check.error(results, trains), self._check.tolerance(trains)
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
        job = timing.make_job(runner, self._workload, mode)
        with job.context():
            peak_bytes = memory.footprint(job.call, self._device).peak_bytes
            job.reset()
            forward = timing.make_job(runner, self._workload, "infer" if mode == "infer" else "fwd")
            kept = memory.footprint(forward.call, self._device)
        saved = max(0, kept.alive_bytes - memory.unique_bytes(kept.result))
        return {"peak_MiB": peak_bytes / memory.MIB, "saved_MiB": saved / memory.MIB}

    def _clocks(self, name: str, runner: Runner, mode: str, row: Row) -> dict[Timed, timing.Clock]:
        seconds = self._settings.sample_s
        job = functools.partial(timing.make_job, runner, self._workload, mode)
        clocks: dict[Timed, timing.Clock] = {(name, "wall_us"): timing.WallClock(job(), seconds)}
        if self._case.on_gpu:
            clocks[name, "event_us"] = timing.EventClock(job(), seconds)
            if runner.no_graph:
                row["note"] = f"no CUDA graph: {runner.no_graph}"
                return clocks
            try:
                clocks[name, "graph_us"] = timing.GraphClock(job(), seconds)
            except Exception as exception:
                raise_if_gpu_is_lost(exception)
                row["note"] = f"no CUDA graph: {first_line(exception)}"
        return clocks

    def _time(self, mode: str, rows: dict[str, Row], clocks: dict[Timed, timing.Clock]) -> None:
        """Take samples of every clock in rounds, each in random order, and send the rows.

        If the machine slows down for a while, it slows every peer of a round; so ratios of times
        are taken within a round.
        """
        settings, telemetry = self._settings, timing.Telemetry(self._device)
        samples: dict[Timed, list[float]] = {key: [] for key in clocks}
        # Seeded by the case and mode, so that a case has the same order after a resumed run.
        random = Random(f"{settings.seed} {self._case.case_id} {mode}")
        deadline, rounds = time.monotonic() + settings.max_s, 0
        while rounds < settings.rounds and (rounds < LEAST_ROUNDS or time.monotonic() < deadline):
            rounds += 1
            for name, clock in random.sample(list(samples), len(samples)):
                telemetry.sample()
                self._send(Begun(name, mode, "timing"))
                try:
                    samples[name, clock].append(clocks[name, clock].sample_us())
                except Exception as exception:
                    raise_if_gpu_is_lost(exception)
                    del samples[name, clock]
                    # Another clock of this peer may have raised before.
                    if name in rows and clock == "graph_us":
                        rows[name]["note"] = f"no CUDA graph: {first_line(exception)}"
                    elif name in rows:
                        self._send(rows.pop(name) | failure(exception))
        floor = timing.floor_us(settings.sample_s) if self._case.on_gpu and rows else None
        model = roofline.columns(self._case, mode, self._gpu, settings.seed)
        for name, row in rows.items():
            times = self._times(name, samples)
            row |= {"n_samples": rounds} | times | telemetry.columns() | model
            if floor is not None:
                row["event_floor_us"] = floor
                if times["event_us_p50"] < FLOORS * floor:
                    row["note"] = f"{row.get('note', '')} under {FLOORS} empty kernels".strip()
            self._send(row)

    def _times(self, name: str, samples: Mapping[Timed, Sequence[float]]) -> dict[str, float]:
        times: dict[str, float] = {}
        for clock in ("event_us", "graph_us", "wall_us"):
            if (name, clock) in samples:
                times |= quantiles(clock, samples[name, clock])
        clock = "event_us" if self._case.on_gpu else "wall_us"
        reference = samples.get((peers.baseline(self._case.device), clock))
        if reference is not None:
            ratios = [theirs / own for theirs, own in zip(reference, samples[name, clock])]
            times |= quantiles("speedup_vs_nn", ratios)
            times["speedup_vs_nn"] = times.pop("speedup_vs_nn_p50")
        return times


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the columns ``name_p10``, ``name_p50`` and ``name_p90``."""
    columns = (f"{name}_p10", f"{name}_p50", f"{name}_p90")
    return dict(zip(columns, np.quantile(values, (0.1, 0.5, 0.9)).tolist()))
