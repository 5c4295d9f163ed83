"""Time peers side by side: short samples of each, in rounds, in random order."""

from __future__ import annotations

import functools
import math
import statistics
import time
import timeit
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from perf.bench.cases import Workload
from perf.peers.peer import Context, Runner

WARM_UP_CALLS = 3
# Several times the size of any L2 cache.
CACHE_BYTES = 2**28

# What is read of a GPU while it is measured; nothing is ever set.
SENSORS = {
    "sm_MHz": torch.cuda.clock_rate,
    "power_W": lambda device: torch.cuda.power_draw(device) / 1e3,
    "temp_C": torch.cuda.temperature,
}


def synchronized_time() -> float:
    """Wait for all queued work, and return the time in seconds.

    ``torch.utils.benchmark.timer`` does the same, but takes 0.4 s to import in every worker.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Job:
    """Hold the work of one peer that is timed.

    Attributes:
        call: The work.
        leaves: Tensors that have gradients after a call.
        context: Switches that are set during the calls; entered once a sample.
    """

    call: Callable[[], object]
    leaves: Sequence[Tensor] = ()
    context: Context = nullcontext

    def reset(self) -> None:
        """Drop the gradients, so that the next call does not add to them."""
        for leaf in self.leaves:
            leaf.grad = None


def make_job(runner: Runner, workload: Workload, mode: str) -> Job:
    """Return the job of a peer that a mode times."""
    tokens = workload.tokens.detach().clone().requires_grad_(mode != "infer")
    leaves = [tokens, *runner.parameters] if mode != "infer" else []
    gradients = (workload.output_grad, workload.h_n_grad)

    def infer() -> object:
        with torch.no_grad():
            return runner.forward(tokens)

    def train() -> object:
        results = runner.forward(tokens)
        torch.autograd.backward(results, gradients)
        return results

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


class Clock(ABC):
    """Take samples of one job.

    Args:
        job: What to time.
        seconds: About how long a sample lasts; it has at least one call.
    """

    def __init__(self, job: Job, seconds: float) -> None:
        self._job = job
        self._call_us(WARM_UP_CALLS)
        started = time.perf_counter()
        self._call_us(WARM_UP_CALLS)
        seconds_per_call = (time.perf_counter() - started) / WARM_UP_CALLS
        self._calls = max(1, math.ceil(seconds / seconds_per_call))

    def sample_us(self) -> float:
        """Return the microseconds of a call."""
        return self._call_us(self._calls)

    @abstractmethod
    def _call_us(self, calls: int) -> float:
        """Return the microseconds of one of so many calls."""


class WallClock(Clock):
    """Time calls one after the other on the host's clock, on any device; synchronise at the end.

    Dropping the gradients is timed too, because it is part of a training step.
    """

    def _call_us(self, calls: int) -> float:
        names = {"call": self._job.call, "reset": self._job.reset}
        timer = timeit.Timer("call(); reset()", timer=synchronized_time, globals=names)
        with self._job.context():
            return 1e6 * timer.timeit(calls) / calls


class EventClock(Clock):
    """Time each call on the GPU between two events, after flushing the L2 cache; take the median.

    ``triton.testing.do_bench`` measures the same, but spends seven calls of every sample on finding
    out how many calls to make. The flushes count among the seconds of a sample.
    """

    def _call_us(self, calls: int) -> float:
        cache = cache_filler(torch.cuda.current_device())
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(calls)
        ]
        with self._job.context():
            self._job.reset()
            for before, after in events:
                cache.zero_()
                before.record()
                self._job.call()
                after.record()
                self._job.reset()
        torch.cuda.synchronize()
        return statistics.median(1e3 * before.elapsed_time(after) for before, after in events)


@functools.cache
def cache_filler(device: int) -> Tensor:
    """Return a tensor larger than the L2 cache of a GPU, to be written before each call."""
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


class GraphClock(EventClock):
    """Time a CUDA graph of a call as :class:`EventClock` does: a peer without its launches.

    The graph is captured on the current stream, which must not be the default one: autograd
    accumulates gradients on the stream that first used a parameter, and a capture allows that only
    if it is the captured stream.
    """

    def __init__(self, job: Job, seconds: float) -> None:
        with job.context():
            for _ in range(WARM_UP_CALLS):
                job.call()
                job.reset()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                job.call()
            job.reset()
        super().__init__(Job(graph.replay), seconds)
        # The tensors that the graph reads and writes must outlive it.
        self._captured = job


class Telemetry:
    """Sample a GPU's state; do nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: defaultdict[str, list[float]] = defaultdict(list)

    def sample(self) -> None:
        """Read every sensor once; leave out those that fail, as some do in virtual machines."""
        if self._device.type == "cuda":
            for name, read in SENSORS.items():
                # NVML may be missing, and has exceptions of its own.
                with suppress(Exception):
                    value = read(self._device)
                    self._samples[name].append(value)

    def columns(self) -> dict[str, float]:
        """Return the median of each sensor that was read."""
        return {name: statistics.median(values) for name, values in self._samples.items()}


def floor_us(seconds: float) -> float:
    """Return the time that :class:`EventClock` measures for a kernel that does nothing."""
    from perf.roofline.probes import empty_kernel

    return EventClock(Job(lambda: empty_kernel[(1,)]()), seconds).sample_us()
