"""Triton kernels that measure a GPU rather than an RNN."""

from __future__ import annotations

import triton
import triton.language as tl

# The smallest tile that matrix instructions take.
CHAIN_TILE = 16


@triton.jit
def empty_kernel():
    """Do nothing: what is left is a launch."""


@triton.jit
def chain_kernel(matrix_ptr, state_ptr, steps, TILE: tl.constexpr):
    """Walk ``steps`` dependent products of one tile: the chain of a step without work or memory.

    Each product needs the one before as an operand, which therefore changes its layout by way of
    shared memory, as the state of a resident recurrence does.
    """
    offs = tl.arange(0, TILE)
    tile = offs[:, None] * TILE + offs[None, :]
    matrix = tl.load(matrix_ptr + tile)
    state = tl.load(state_ptr + tile)
    for _ in range(steps):
        state = tl.dot(matrix, state).to(state.dtype)
    tl.store(state_ptr + tile, state)


@triton.jit
def ping_pong_kernel(flag_ptr, round_trips):
    """Pass a flag between two programs, each way a release and an acquire at the scope of the GPU.

    The grid is of two programs, which run at the same time on any GPU that is otherwise idle.
    """
    me = tl.program_id(0)
    for trip in range(round_trips):
        # Program 0 makes the flag odd, program 1 even again.
        expected = 2 * trip + me
        while tl.atomic_cas(flag_ptr, expected, expected + 1, sem="acq_rel") != expected:
            pass
