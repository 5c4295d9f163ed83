"""The whole walk in one launch: the rows of M spread over a CTA group of programs.

The tile picture (``common.py`` has the formula and the names). A program's BLOCK_H rows of M stay
in shared memory for the whole walk, in tiles of BLOCK_K columns. The state travels from step to
step through ``s``, and a program waits until all programs of its CTA group, those that share its
sequences, have stored the step before (``cta_barrier.py``). ▒ stays, ░ is read, ▓ is made in a
step:

                    M [H, H]            s_{t-1} [H, B]            s_t [H, B]
                  BLOCK_K                 BLOCK_B
                ┌──┬──┬──┬──┐           ┌──┬──┐                  ┌──┬──┐
     program 0  │  │  │  │  │           │░░│  │ BLOCK_K          │  │  │
                ├──┼──┼──┼──┤           ├──┼──┤                  ├──┼──┤
     program 1  │▒▒│▒▒│▒▒│▒▒│     x     │░░│  │          =       │▓▓│  │  = E(a + M s, aux)
                ├──┼──┼──┼──┤           ├──┼──┤                  ├──┼──┤
     program 2  │  │  │  │  │           │░░│  │                  │  │  │
                └──┴──┴──┴──┘           └──┴──┘                  └──┴──┘
                stays in shared         read through L2,         stored to s,
                memory                  BLOCK_READ at once       then arrive

Where registers allow, a CTA group walks INTERLEAVE = 2 of its batch blocks at the same time: the
slices of one are on their way while the product of the other is made. Then it walks the next two.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonrnn.kernels.common import (
    UNSPECIALIZED,
    Batch,
    Constants,
    Operand,
    clear_padding,
    compute_state,
    convert_layout_like,
    dot_tile,
    has_previous,
    load_step,
    load_weights,
    make_block,
    optimization_barrier,
    prepare_step,
    row_offset,
    split_tf32,
    store_ends,
    store_step,
)
from tritonrnn.kernels.cta_barrier import arrive, wait


@dataclass(frozen=True)
class CooperativeConstants(Constants):
    """What the cooperative kernel is compiled for, too.

    BLOCK_K         columns of M, and hidden units of the previous state, of one product
    BLOCK_READ      hidden units of the previous state that a program reads at once
    NUM_SUMS        sums to which tiles' products are added in turn: 1 or 2
    INTERLEAVE      batch blocks that a program walks at the same time: 1 or 2
    """

    BLOCK_K: int
    BLOCK_READ: int
    NUM_SUMS: int
    INTERLEAVE: int

    # Tiles of M are consecutive columns.
    STRIDE_K = 1

    @property
    def NUM_TILES(self) -> int:
        """Return the number of tiles of M."""
        return -(-self.H // self.BLOCK_K)

    @property
    def NUM_PROGRAMS(self) -> int:
        """Return the number of programs of a CTA group."""
        return -(-self.H // self.BLOCK_H)


class PipelineState(NamedTuple):
    """What the walk of a batch block carries from step to step.

    s           the previous state
    a, aux      this step's tiles, as they were loaded
    previous_row, row, next_row
                offsets of the rows of the previous step, this one and the next one
    """

    s: Any
    a: Any
    aux: Any
    previous_row: Any
    row: Any
    next_row: Any


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "max_spins"])
def cooperative_kernel(
    a_ptr,
    s_ptr,
    v_0_ptr,
    m_ptr,
    aux_ptr,
    ends_ptr,
    time_base_ptr,
    batch_base_ptr,
    lengths_ptr,
    counters_ptr,
    max_spins,
    T,
    B,
    stride_time,
    stride_batch,
    stride_m_group,
    stride_m_row,
    stride_m_column,
    reverse_groups,
    C: tl.constexpr,
):
    """Walk every step of every sequence of the batch blocks of a CTA group.

    Arguments as ``common.Batch`` has them; m_ptr is [G, H, H] in the dtype of a, with offsets of 32
    bits at most.

    counters_ptr    int32 [1 + INTERLEAVE * CTA groups, 32] of ones. The first word becomes 0 if a
                    wait timed out; each other row begins with a counter, 128 bytes apart so that
                    no two share a cache line.
    max_spins       polls after which a program gives up waiting for its CTA group.
    """
    batch = Batch(
        a_ptr=a_ptr,
        s_ptr=s_ptr,
        v_0_ptr=v_0_ptr,
        aux_ptr=aux_ptr,
        ends_ptr=ends_ptr,
        time_base_ptr=time_base_ptr,
        batch_base_ptr=batch_base_ptr,
        lengths_ptr=lengths_ptr,
        T=T,
        B=B,
        stride_time=stride_time,
        stride_batch=stride_batch,
        reverse_groups=reverse_groups,
    )
    range_h, range_b = tl.arange(0, C.BLOCK_H), tl.arange(0, C.BLOCK_B)
    offs_h = tl.program_id(1) * C.BLOCK_H + range_h
    offs_k = tl.arange(0, C.BLOCK_K)
    m_ptr += tl.program_id(2).to(tl.int64) * stride_m_group
    m_ptrs = m_ptr + (offs_h[:, None] * stride_m_row + offs_k[None, :] * stride_m_column)
    tiles = load_weights(m_ptrs, (offs_h < C.H)[:, None], stride_m_column, C)

    # Every num_cta_groups-th batch block is this CTA group's.
    cta_group, num_cta_groups = tl.program_id(0), tl.num_programs(0)
    counter = C.INTERLEAVE * (tl.program_id(2) * num_cta_groups + cta_group)
    counter_ptr = counters_ptr + 32 * (1 + counter)
    target = 1
    other_target = 1
    num_blocks = tl.cdiv(B, C.BLOCK_B)
    for index in tl.range(cta_group, num_blocks, C.INTERLEAVE * num_cta_groups, num_stages=1):
        block = make_block(index, range_h, range_b, batch, C)
        clear_padding(index, range_b, block, batch, C)
        pipeline = first_pipeline(batch, block, C)
        num_steps = block.num_steps
        if C.INTERLEAVE == 2:
            # Past the last block it has no steps.
            other_index = index + num_cta_groups
            other_block = make_block(other_index, range_h, range_b, batch, C)
            clear_padding(other_index, range_b, other_block, batch, C)
            other_pipeline = first_pipeline(batch, other_block, C)
            num_steps = tl.maximum(num_steps, other_block.num_steps)
        # The pipeliner would hoist reads of the state above the stores that other programs wait
        # for. And LLVM would hoist the descriptor of every wgmma out of the loop, two registers
        # each, where a program has a hundred of them.
        for step in tl.range(0, num_steps, num_stages=1, disable_licm=True):
            if step < block.num_steps:
                pipeline, target, max_spins = walk_step(
                    step, batch, block, pipeline, tiles, counter_ptr, target, max_spins, C
                )
            if C.INTERLEAVE == 2:  # noqa: SIM102 (Triton evaluates both sides of an "and")
                if step < other_block.num_steps:
                    other_pipeline, other_target, max_spins = walk_step(
                        step,
                        batch,
                        other_block,
                        other_pipeline,
                        tiles,
                        counter_ptr + 32,
                        other_target,
                        max_spins,
                        C,
                    )
        store_ends(index, range_h, range_b, block, batch, C)
        if C.INTERLEAVE == 2:
            store_ends(other_index, range_h, range_b, other_block, batch, C)
    # By every thread, as each has polled for itself.
    in_time_ptrs = counters_ptr + tl.full([C.BLOCK_H, C.BLOCK_B], 0, tl.int32)
    tl.store(in_time_ptrs, 0, mask=max_spins == 0)


@triton.jit
def first_pipeline(batch, block, C: tl.constexpr):
    """Return the pipeline state with which the walk of a batch block begins."""
    row = row_offset(0, batch, block, C)
    a, aux = load_step(0, row, batch, block)
    return PipelineState(
        s=tl.zeros(block.offs_tile.shape, a.dtype),
        a=a,
        aux=aux,
        previous_row=tl.zeros([], tl.int64),
        row=row,
        next_row=row_offset(1, batch, block, C),
    )


@triton.jit
def walk_step(step, batch, block, pipeline, tiles, counter_ptr, target, max_spins, C: tl.constexpr):
    """Walk one step of a batch block.

    Returns the next pipeline state, what the counter will be once the whole CTA group has walked
    the step, and max_spins for the next wait.
    """
    # Before the wait: this step's tiles, loaded in the step before, go where the product takes
    # them, and the next step's are loaded.
    a = convert_layout_like(pipeline.s, pipeline.a, step, block)
    aux = convert_layout_like(pipeline.s, pipeline.aux, step, block)
    # The first step is walked here, too, so a sequence may always begin.
    z, aux = prepare_step(step, a, aux, batch, block, C, True)
    row_2 = row_offset(step + 2, batch, block, C)
    next_a, next_aux = load_step(step + 1, pipeline.next_row, batch, block)

    max_spins = wait(counter_ptr, target, max_spins, C)
    z = dot_previous(step, batch, block, pipeline.previous_row, tiles, z, C)
    s = compute_state(step, z, aux, batch, block, C)
    store_step(step, pipeline.row, s, batch, block)
    arrive(counter_ptr)
    next_pipeline = PipelineState(
        s=s,
        a=next_a,
        aux=next_aux,
        previous_row=pipeline.row,
        row=pipeline.next_row,
        next_row=row_2,
    )
    return next_pipeline, target + C.NUM_PROGRAMS, max_spins


@triton.jit
def dot_previous(step, batch, block, row, tiles, z, C: tl.constexpr):
    """Return ``M s + z`` of the previous state, read from its row past L1."""
    H: tl.constexpr = C.H
    BLOCK_K: tl.constexpr = C.BLOCK_K
    BLOCK_READ: tl.constexpr = C.BLOCK_READ
    # One address and constant distances from it: an address a tile costs registers.
    offs_k = tl.arange(0, BLOCK_K)
    state_ptrs = batch.s_ptr + row + block.base + offs_k[:, None]
    previous = has_previous(step, block)
    # A product of mma.sync waits for the one whose sum it adds to: so every other tile may have a
    # sum of its own. Those of fp32 accuracy are added up apart from z (common.dot_acc).
    IS_APART: tl.constexpr = C.PRECISION == "tf32x3"
    other = tl.zeros(z.shape, tl.float32)
    # As many reads at once as shared memory has room for: each takes a round trip to L2.
    for first in tl.static_range(0, H, BLOCK_READ):
        loaded = ()
        for k in tl.static_range(first, first + BLOCK_READ, BLOCK_K):
            if k < H:
                mask = previous
                if k + BLOCK_K > H:
                    mask = (k + offs_k < H)[:, None] & previous
                s = tl.load(state_ptrs + k, mask=mask, other=0.0, cache_modifier=".cg")
                loaded = loaded + (s,)  # type: ignore[assignment]  # noqa: RUF005
        # All reads are issued before any is waited for. Otherwise ptxas, though it has registers
        # enough, uses a few of them in turn, and a step takes several round trips.
        tl.debug_barrier()
        # And all are in shared memory before the first product: with one barrier for all of them.
        large = ()
        small = ()
        for i in tl.static_range(len(loaded)):
            s = split_tf32(optimization_barrier(loaded[i], C), C)
            large = large + (s.large,)  # type: ignore[assignment]  # noqa: RUF005
            small = small + (s.small,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(len(loaded)):
            s = Operand(large=large[i], small=small[i])
            if i % C.NUM_SUMS == 0 and not IS_APART:
                z = dot_tile(tiles, first // BLOCK_K + i, s, z, C)
            else:
                other = dot_tile(tiles, first // BLOCK_K + i, s, other, C)
    if C.NUM_SUMS == 2 or IS_APART:
        z += other
    return z
