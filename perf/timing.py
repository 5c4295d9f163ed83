"""Peers timed side by side: short samples of each, in rounds, in random order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import torch

WARM_UP_CALLS = 3


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Job:
    """What is timed of one peer.

    Attributes:
        call: The work.
        reset: Undoes what a call leaves behind (gradients); not timed.
    """

    call: Callable[[], object]
    reset: Callable[[], object]


def time_in_rounds(
    jobs: Mapping[str, Job], *, rounds: int, seconds: float, random: Random
) -> list[dict[str, float]]:
    """Time CPU jobs against each other.

    What slows the machine down for a while slows every peer of a round, so that the ratio of two
    times is to be taken within a round.

    Args:
        jobs: One for each peer.
        rounds: Samples of each peer.
        seconds: About how long a sample lasts; it has at least one call.
        random: Chooses the order of the peers, anew in each round.

    Returns:
        For each round, each peer's seconds for a call.
    """
    for job in jobs.values():
        _seconds_per_call(job, WARM_UP_CALLS)
    calls = {
        peer: max(1, math.ceil(seconds / _seconds_per_call(job, WARM_UP_CALLS)))
        for peer, job in jobs.items()
    }
    samples = []
    for _ in range(rounds):
        order = random.sample(list(jobs), len(jobs))
        samples.append({peer: _seconds_per_call(jobs[peer], calls[peer]) for peer in order})
    return samples


def _seconds_per_call(job: Job, calls: int) -> float:
    total = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        job.call()
        total += time.perf_counter() - start
        job.reset()
    return total / calls
