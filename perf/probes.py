"""Triton kernels that measure a GPU rather than an RNN."""

from __future__ import annotations

import triton
import triton.language as tl

# The least that wgmma takes from shared memory, and as many sequences as a resident plan does.
CHAIN_HIDDEN, CHAIN_SEQUENCES, CHAIN_WARPS = 64, 16, 4


@triton.jit
def empty_kernel():
    """Do nothing: what is left is a launch."""


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
    """Walk ``steps`` of the smallest resident recurrence, with neither drive nor output.

    A step is what the model of the limit calls the chain: the state goes to shared memory, a
    barrier, matrix instructions, the cheapest tanh there is. What ``steps`` of it took is left in
    ``ticks_ptr``: clock cycles, and nanoseconds.
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
    # Before the clock is read, for a store can't be moved past that, nor the walk past the store.
    tl.store(state_ptrs, state)
    tl.store(ticks_ptr, clocks() - begun)
    tl.store(ticks_ptr + 1, nanoseconds() - begun_ns)


@triton.jit
def ping_pong_kernel(flag_ptr, round_trips, patience):
    """Pass a flag between two programs: each way a release, and an acquire that polls for it.

    The grid is of two programs, which run at the same time on any GPU that is otherwise idle. In
    the end the flag is at twice ``round_trips``; who has polled ``patience`` times in all gives up,
    and leaves it anywhere else.
    """
    me = tl.program_id(0)
    for trip in range(round_trips):
        # Program 0 makes the flag odd, program 1 even again.
        expected = 2 * trip + me
        while (load_acquire(flag_ptr) != expected) & (patience > 0):
            patience -= 1
        if patience > 0:
            tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def load_acquire(flag_ptr):
    """Read a number that another program releases; Triton has no load that does."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];",
        "=r,l",
        [flag_ptr],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
