"""Peers timed side by side: short samples of each, in rounds, in random order."""

from __future__ import annotations

import functools
import math
import statistics
import time
import timeit
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import benchmark

WARM_UP_CALLS = 3
# A case that takes longer than it may still has quantiles of something.
LEAST_ROUNDS = 3
# Several times any L2 cache so far.
CACHE_BYTES = 2**28

Key = TypeVar("Key", bound=Hashable)


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Job:
    """What is timed of one peer.

    Attributes:
        call: The work.
        leaves: Tensors whose gradients a call leaves behind.
        context: Switches that calls are made under, entered once a sample.
    """

    call: Callable[[], object]
    leaves: Sequence[Tensor] = ()
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def reset(self) -> None:
        """Drop the gradients, so that the next call adds to none."""
        for leaf in self.leaves:
            leaf.grad = None


class Clock(Protocol):
    """Takes one sample of one job."""

    def sample_us(self) -> float:
        """Return the microseconds of a call."""


class WallClock:
    """What a user waits, on any device: calls one after the other, and one wait at the end.

    Dropping the gradients is timed, as it is part of a step of training.

    Args:
        job: What to time.
        seconds: About how long a sample lasts; it has at least one call.
    """

    def __init__(self, job: Job, seconds: float) -> None:
        # torch's timer waits for the accelerator, if there is one.
        self._timer = timeit.Timer(
            "call(); reset()",
            timer=benchmark.timer,
            globals={"call": job.call, "reset": job.reset},
        )
        self._context = job.context
        with self._context():
            self._timer.timeit(WARM_UP_CALLS)
            seconds_per_call = self._timer.timeit(WARM_UP_CALLS) / WARM_UP_CALLS
        self._calls = max(1, math.ceil(seconds / seconds_per_call))

    def sample_us(self) -> float:
        """Return the microseconds of a call."""
        with self._context():
            return 1e6 * self._timer.timeit(self._calls) / self._calls


class EventClock:
    """Time on the GPU between events around each call, its L2 cache flushed before; the median.

    ``triton.testing.do_bench`` measures the same, but makes seven calls to find out how many it
    is to make, in every sample again.

    Args:
        job: What to time.
        seconds: About how long a sample lasts, flushes included; it has at least one call.
    """

    def __init__(self, job: Job, seconds: float) -> None:
        self._job = job
        self._times_us(WARM_UP_CALLS)
        started = time.perf_counter()
        self._times_us(WARM_UP_CALLS)
        seconds_per_call = (time.perf_counter() - started) / WARM_UP_CALLS
        self._calls = max(1, math.ceil(seconds / seconds_per_call))

    def sample_us(self) -> float:
        """Return the microseconds of a call."""
        return statistics.median(self._times_us(self._calls))

    def _times_us(self, calls: int) -> list[float]:
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
        return [1e3 * before.elapsed_time(after) for before, after in events]


@functools.cache
def cache_filler(device: int) -> Tensor:
    """Return more bytes than the L2 cache of a GPU holds, to be written before each call."""
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


class GraphClock(EventClock):
    """As :class:`EventClock`, of a CUDA graph that replays a call: a peer without its launches.

    It is recorded on the current stream, which may not be the default one: autograd adds up
    gradients on the stream that first saw a parameter, and can do so in a recording only there.

    Args:
        job: What to record.
        seconds: About how long a sample lasts.
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
        # What the graph reads and writes must outlive it.
        self._recorded = job


def time_in_rounds(
    clocks: Mapping[Key, Clock],
    *,
    rounds: int,
    max_seconds: float,
    random: Random,
    before: Callable[[Key], None] = lambda key: None,
    failed: Callable[[Key, Exception], None],
) -> list[dict[Key, float]]:
    """Take samples of jobs against each other.

    What slows the machine down for a while slows every peer of a round, so that the ratio of two
    times is to be taken within a round.

    Args:
        clocks: What to sample.
        rounds: Samples of each clock.
        max_seconds: No round is begun later, once there are a few.
        random: Chooses the order of the clocks, anew in each round.
        before: Told what is to be sampled next.
        failed: Told what raised in its turn; it has no further one.

    Returns:
        For each round, each clock's microseconds for a call.
    """
    running = dict(clocks)
    samples: list[dict[Key, float]] = []
    deadline = time.monotonic() + max_seconds
    while len(samples) < rounds and (len(samples) < LEAST_ROUNDS or time.monotonic() < deadline):
        sample = {}
        for key in random.sample(list(running), len(running)):
            before(key)
            try:
                sample[key] = running[key].sample_us()
            except Exception as error:
                del running[key]
                failed(key, error)
        samples.append(sample)
    return [{key: sample[key] for key in running} for sample in samples]


def floor_us(seconds: float) -> float:
    """Return what :class:`EventClock` says of a kernel that does nothing."""
    from perf.probes import empty_kernel

    return EventClock(Job(lambda: empty_kernel[(1,)]()), seconds).sample_us()
