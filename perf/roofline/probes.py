"""Define Triton kernels that measure a GPU rather than an RNN."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from tritonrnn.kernels import cta_barrier
from tritonrnn.kernels.common import tanh_approx

# The smallest tile that wgmma reads from shared memory, and as many sequences as a resident plan.
CHAIN_HIDDEN, CHAIN_SEQUENCES, CHAIN_WARPS = 64, 16, 4


@dataclass(frozen=True)
class BarrierConstants:
    """Hold what a barrier of a CTA group has to know of its kernel."""

    INTERPRETED: bool = False


@triton.jit
def empty_kernel():
    """Do nothing, so that only the launch takes time."""


@triton.jit
def clocks():
    """Read the multiprocessor's cycle counter."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def chain_kernel(
    matrix_ptr, state_ptr, ticks_ptr, steps, HIDDEN: tl.constexpr, SEQUENCES: tl.constexpr
):
    """Run ``steps`` of the smallest resident recurrence, with neither drive nor output.

    A step is the chain of the roofline model: the state goes to shared memory, then a barrier, MMA,
    and the cheapest tanh of the hardware. The clock cycles and the nanoseconds of all ``steps`` are
    stored at ``ticks_ptr``.
    """
    offs_h = tl.arange(0, HIDDEN)
    offs_b = tl.arange(0, SEQUENCES)
    matrix = tl.load(matrix_ptr + offs_h[:, None] * HIDDEN + offs_h[None, :])
    state_ptrs = state_ptr + offs_h[:, None] * SEQUENCES + offs_b[None, :]
    state = tl.load(state_ptrs)
    begun_ns = globaltimer()
    begun = clocks()
    for _ in range(steps):
        z = tl.dot(matrix, state)
        state = tanh_approx(z).to(state.dtype)
    # Store before the clock is read: the compiler moves neither the store past the clock nor the
    # loop past the store.
    tl.store(state_ptrs, state)
    tl.store(ticks_ptr, clocks() - begun)
    tl.store(ticks_ptr + 1, globaltimer() - begun_ns)


@triton.jit
def ping_pong_kernel(counter_ptr, round_trips, max_spins, C: tl.constexpr):
    """Pass a counter between two programs, by the barrier of a CTA group: each way a handoff.

    The grid has two programs, which run at the same time on any GPU that is otherwise idle. At the
    end the counter is twice ``round_trips``, unless a program gave up after ``max_spins`` polls.
    """
    me = tl.program_id(0)
    for trip in range(round_trips):
        # Program 0 makes the counter odd, program 1 even again.
        max_spins = cta_barrier.wait(counter_ptr, 2 * trip + me, max_spins, C)
        if max_spins > 0:
            cta_barrier.arrive(counter_ptr)
