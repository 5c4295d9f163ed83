"""Measure one case: check every peer, weigh its memory and time it against the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor, nn

from perf import peers
from perf.bench import memory, oracle
from perf.bench.cases import DTYPES, Case, Workload
from perf.bench.switches import set_precision
from perf.bench.telemetry import Telemetry
from perf.bench.timing import (
    Clock,
    EventClock,
    GraphClock,
    Job,
    WallClock,
    floor_us,
    time_in_rounds,
)
from perf.peers.peer import Runner
from perf.roofline import model as roofline

Row = dict[str, object]
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
    """

    rounds: int = 20
    sample_s: float = 0.05
    max_s: float = 60.0
    threads: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Checked:
    """Hold a peer that was run once and compared with float64."""

    runner: Runner
    max_rel_err: float
    compile_s: float


class Measurement:
    """Measure one case in this process.

    Args:
        case: What to run.
        settings: How to measure.
        gpu: Constants of the roofline model, if they are known for the device.
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
        self._baseline = peers.baseline(case.device)
        self._checked: dict[tuple[str, bool], Checked | Row] = {}
        self._exact: dict[bool, list[Tensor]] = {}
        self._packed_errors: dict[bool, float] = {}
        set_precision(case)

    def run(self, modes: Mapping[str, Sequence[str]]) -> None:
        """Measure the peers of each mode, and emit a row for each."""
        cells = {(peer, mode): peers.find(peer) for mode in modes for peer in modes[mode]}
        able = []
        for (name, mode), peer in cells.items():
            reason = peer.supports(self._case)
            if reason is None:
                able.append((name, mode))
            else:
                self._fail((name, mode), "unsupported", reason)
        if not able:
            return
        self._begin("", "", "float64")
        settings = self._settings
        self._drawn = Workload.make(self._case, seed=settings.seed)
        self._workload = self._drawn.to(self._case.device, DTYPES[self._case.dtype])
        for mode in modes:
            names = [name for name, its_mode in able if its_mode == mode]
            # The baseline comes first: the others are timed against it and judged by its error.
            self._measure(mode, sorted(names, key=lambda name: name != self._baseline))

    def _measure(self, mode: str, names: Sequence[str]) -> None:
        trains = mode != "infer"
        if names and trains not in self._exact:
            self._begin("", mode, "float64")
            self._exact[trains] = self._module_results(oracle.RNN, torch.float64, trains)
        rows: dict[str, Row] = {}
        clocks: dict[Cell, Clock] = {}
        for name in names:
            with self._failing(name, mode):
                self._begin(name, mode, "check")
                row = self._check(name, mode)
                if row["status"] != "ok":
                    self._emit(row)
                    continue
                self._begin(name, mode, "memory")
                checked = self._checked[name, trains]
                assert isinstance(checked, Checked)
                row |= self._weigh(checked.runner, mode)
                self._begin(name, mode, "warm up")
                clocks |= self._clocks(name, checked.runner, mode, row)
                rows[name] = row
        self._time(mode, rows, clocks)

    def _check(self, name: str, mode: str) -> Row:
        """Return a row with the status of the peer's results: right, wrong or failed."""
        trains = mode != "infer"
        if (name, trains) not in self._checked:
            self._checked[name, trains] = self._run_once(name, trains)
        checked = self._checked[name, trains]
        if not isinstance(checked, Checked):
            return {**checked, "mode": mode}
        tolerance = oracle.tolerance(self._case.eps, self._reference_error(trains))
        row = self._row((name, mode)) | {
            "status": "ok",
            "max_rel_err": checked.max_rel_err,
            "tolerance": tolerance,
            "compile_s": checked.compile_s,
            "plan": checked.runner.plan or None,
        }
        if not checked.max_rel_err <= tolerance:
            row["status"] = "wrong"
            row["error"] = f"off by {checked.max_rel_err:.3g}, allowed {tolerance:.3g}"
        return row

    def _reference_error(self, trains: bool) -> float | None:
        """Return the error of nn.RNN at the precision of the case, if nn.RNN ran."""
        if self._case.layout != "jagged":
            reference = self._checked.get((self._baseline, trains))
            return reference.max_rel_err if isinstance(reference, Checked) else None
        if trains not in self._packed_errors:
            # The baseline takes no nested tensor, so it runs the same batch packed.
            results = self._module_results(nn.RNN, DTYPES[self._case.dtype], trains)
            self._packed_errors[trains] = oracle.max_relative_error(results, self._exact[trains])
        return self._packed_errors[trains]

    def _module_results(
        self, rnn_class: type[nn.RNN], dtype: torch.dtype, trains: bool
    ) -> list[Tensor]:
        """Return the results of a class of modules in some dtype.

        The inputs and weights have the values that a peer gets: rounded to the dtype of the case.
        """
        case, narrow = self._case, DTYPES[self._case.dtype]
        module = case.make_module(rnn_class, self._settings.seed).to(narrow).to(case.device, dtype)
        workload = self._drawn.to(case.device, narrow).to(case.device, dtype)
        # A jagged batch is packed, because nn.RNN takes no nested tensor.
        runner = Runner(
            lambda tokens: workload.run_packed(module, tokens), list(module.parameters())
        )
        return runner.results(workload, trains=trains)

    def _run_once(self, name: str, trains: bool) -> Checked | Row:
        module = self._case.make_module(nn.RNN, self._settings.seed)
        module = module.to(self._case.device, DTYPES[self._case.dtype])
        started = time.perf_counter()
        try:
            runner = peers.find(name).build(self._case, module, self._workload)
            with runner.context():
                results = runner.results(self._workload, trains=trains)
            error = oracle.max_relative_error(results, self._exact[trains])
        except Exception as exception:
            if gpu_is_lost():
                raise
            return self._row((name, "")) | failure(exception)
        return Checked(runner, error, time.perf_counter() - started)

    def _weigh(self, runner: Runner, mode: str) -> Row:
        runner = replace(runner, forward=runner.uncaptured or runner.forward)
        job = make_job(runner, self._workload, mode)
        with job.context():
            called, _ = memory.footprint(job.call, self._device)
            job.reset()
            forward = make_job(runner, self._workload, "infer" if mode == "infer" else "fwd")
            kept, results = memory.footprint(forward.call, self._device)
        assert isinstance(results, tuple)
        saved = max(0, kept.alive_bytes - memory.unique_bytes(results))
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
                if gpu_is_lost():
                    raise
                row["note"] = f"no CUDA graph: {first_line(exception)}"
        return clocks

    def _time(self, mode: str, rows: Mapping[str, Row], clocks: Mapping[Cell, Clock]) -> None:
        settings, timed = self._settings, dict(rows)
        telemetry = Telemetry(self._device)

        def before(cell: Cell) -> None:
            telemetry.sample()
            self._begin(cell[0], mode, "timing")

        def failed(cell: Cell, exception: Exception) -> None:
            if gpu_is_lost():
                raise exception
            name, clock = cell
            if clock == "graph_us":
                rows[name]["note"] = f"no CUDA graph: {first_line(exception)}"
            elif timed.pop(name, None) is not None:
                self._emit(rows[name] | failure(exception))

        # Seeded by the case and mode, so that a case has the same order after a resumed run.
        random = Random(f"{settings.seed} {self._case.case_id} {mode}")
        samples = time_in_rounds(
            clocks,
            rounds=settings.rounds,
            max_seconds=settings.max_s,
            random=random,
            before=before,
            failed=failed,
        )
        floor = floor_us(settings.sample_s) if self._case.on_gpu and timed else None
        for name, row in timed.items():
            row |= self._times(name, samples) | telemetry.columns()
            row |= self._model(mode, row)
            if floor is not None:
                row["event_floor_us"] = floor
                if headline_us(row) < FLOORS * floor:
                    row["note"] = f"{row.get('note', '')} under {FLOORS} empty kernels".strip()
            self._emit(row)

    def _times(self, name: str, samples: Sequence[Mapping[Cell, float]]) -> Row:
        row: Row = {"n_samples": len(samples)}
        for clock in ("event_us", "graph_us", "wall_us"):
            if all((name, clock) in sample for sample in samples):
                row |= quantiles(clock, [sample[name, clock] for sample in samples])
        row["us_per_step"] = headline_us(row) / self._case.T
        own = (name, "event_us" if self._case.on_gpu else "wall_us")
        reference = (self._baseline, own[1])
        if all(reference in sample for sample in samples):
            ratios = quantiles(
                "speedup_vs_nn", [sample[reference] / sample[own] for sample in samples]
            )
            row["speedup_vs_nn"] = ratios.pop("speedup_vs_nn_p50")
            row |= ratios
        return row

    def _model(self, mode: str, row: Row) -> Row:
        work = roofline.work(self._case, mode, self._settings.seed)
        seconds = 1e-6 * headline_us(row)
        columns: Row = {
            "flop": work.flop,
            "min_bytes": work.bytes,
            "tflops": work.flop / seconds / 1e12,
            "gbps": work.bytes / seconds / 1e9,
        }
        if self._gpu is not None:
            limit = roofline.limit(self._case, mode, self._gpu, self._settings.seed)
            columns |= limit.columns()
            columns["limit_constants"] = self._gpu.origin
            columns["pct_of_limit"] = 100 * limit.limit_us / headline_us(row)
        return columns

    def _row(self, cell: Cell) -> Row:
        name, mode = cell
        return {**self._case.columns(), "peer": name, "mode": mode}

    def _fail(self, cell: Cell, status: str, reason: str) -> None:
        self._emit(self._row(cell) | {"status": status, "error": reason})

    @contextmanager
    def _failing(self, name: str, mode: str) -> Iterator[None]:
        """Make a row of an exception raised inside, unless the process can't continue."""
        try:
            yield
        except Exception as exception:
            if gpu_is_lost():
                raise
            self._emit(self._row((name, mode)) | failure(exception))


def make_job(runner: Runner, workload: Workload, mode: str) -> Job:
    """Return the job of a peer that a mode times."""
    tokens = workload.tokens.detach().clone().requires_grad_(mode != "infer")
    leaves = [tokens, *runner.parameters] if mode != "infer" else []
    gradients = (workload.output_grad, workload.h_n_grad)

    def infer() -> object:
        with torch.no_grad():
            return runner.forward(tokens)

    def train() -> None:
        torch.autograd.backward(runner.forward(tokens), gradients)

    if mode == "infer":
        call: Callable[[], object] = infer
    elif mode == "fwd":
        call = lambda: runner.forward(tokens)  # noqa: E731
    elif mode == "fwdbwd":
        call = train
    else:
        with runner.context():
            results = runner.forward(tokens)
        call = lambda: torch.autograd.backward(results, gradients, retain_graph=True)  # noqa: E731
    return Job(call, leaves, runner.context)


def headline_us(row: Row) -> float:
    """Return the time that counts: GPU time where there is one, else wall time."""
    value = row.get("event_us_p50", row["wall_us_p50"])
    assert isinstance(value, float)
    return value


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the columns ``name_p10``, ``name_p50`` and ``name_p90``."""
    return {
        f"{name}_p{percent}": float(np.quantile(values, percent / 100)) for percent in (10, 50, 90)
    }


def is_out_of_memory(exception: BaseException) -> bool:
    """Return whether memory ran out: the GPU's, or the CPU's, for which torch has no exception."""
    return isinstance(exception, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(exception)
    )


def gpu_is_lost() -> bool:
    """Return whether this process can't use the GPU any more.

    The GPU is asked, because the exception does not show it: torch raises the same one for an
    illegal access, after which the context is lost, and for a call that a CUDA graph can't capture,
    after which it is not. Triton raises exceptions of its own.
    """
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def failure(exception: BaseException) -> Row:
    """Return the columns of a row for an exception."""
    if is_out_of_memory(exception):
        status = "oom"
    elif isinstance(exception, NotImplementedError):
        status = "unsupported"
    else:
        status = "error"
    return {"status": status, "error": f"{type(exception).__name__}: {first_line(exception)}"}


def first_line(exception: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(exception).strip().splitlines()), "")[:300]
