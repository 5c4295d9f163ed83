"""Define Triton kernels that measure a GPU rather than an RNN."""

from __future__ import annotations

import triton
import triton.language as tl

# The smallest tile that wgmma reads from shared memory, and as many sequences as a resident plan.
CHAIN_HIDDEN, CHAIN_SEQUENCES, CHAIN_WARPS = 64, 16, 4


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
def nanoseconds():
    """Read the GPU's clock."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
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
    begun_ns = nanoseconds()
    begun = clocks()
    for _ in range(steps):
        z = tl.dot(matrix, state)
        z = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
        state = z.to(state.dtype)
    # Store before the clock is read: the compiler moves neither the store past the clock nor the
    # loop past the store.
    tl.store(state_ptrs, state)
    tl.store(ticks_ptr, clocks() - begun)
    tl.store(ticks_ptr + 1, nanoseconds() - begun_ns)


@triton.jit
def ping_pong_kernel(flag_ptr, round_trips, max_spins):
    """Pass a flag between two programs: each way a release, and an acquire that spins on it.

    The grid has two programs, which run at the same time on any GPU that is otherwise idle. At the
    end the flag is twice ``round_trips``, unless a program gave up after ``max_spins`` in all.
    """
    me = tl.program_id(0)
    for trip in range(round_trips):
        # Program 0 makes the flag odd, program 1 even again.
        expected = 2 * trip + me
        while (load_acquire(flag_ptr) != expected) & (max_spins > 0):
            max_spins -= 1
        if max_spins > 0:
            tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def load_acquire(flag_ptr):
    """Load with acquire semantics a word that another program releases; ``tl.load`` has none."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];",
        "=r,l",
        [flag_ptr],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
