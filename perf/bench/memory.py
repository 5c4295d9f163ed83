"""Measure the bytes that a call takes: at its peak, and alive after it.

On a GPU the caching allocator counts them. On a CPU, torch's profiler reports every allocation and
release of the CPU allocator; their running sum is the same count. It includes the memory that
operators allocate inside, which hooks on saved tensors do not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import profile

MIB = 2**20


class Footprint(NamedTuple):
    """Count the bytes that a call added to the memory in use.

    Attributes:
        peak_bytes: The most that were in use at once during the call.
        alive_bytes: Those still in use after the call, while its result lives.
        result: What the call returned.
    """

    peak_bytes: int
    alive_bytes: int
    result: Any


def footprint(call: Callable[[], object], device: torch.device) -> Footprint:
    """Run a call and return its footprint."""
    return _on_gpu(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_gpu(call: Callable[[], object], device: torch.device) -> Footprint:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Footprint(peak, torch.cuda.memory_allocated(device) - before, result)


def _on_cpu(call: Callable[[], object]) -> Footprint:
    # torch.profiler.profile wraps this one, but imports torch._inductor, which takes 2 s.
    with profile(profile_memory=True, acc_events=True) as profiler:
        result = call()
    assert profiler.kineto_results is not None
    # A release is negative. Memory allocated before the profiler started is not reported.
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    in_use = list(accumulate((nbytes for _, nbytes in changes), initial=0))
    return Footprint(max(in_use), in_use[-1], result)


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; a storage that several share counts at most once."""
    used: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        total = used.get(storage.data_ptr(), 0) + tensor.nbytes
        used[storage.data_ptr()] = min(total, storage.nbytes())
    return sum(used.values())
