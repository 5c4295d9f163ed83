"""The whole walk in one launch: M in the registers of one multiprocessor, on Hopper, in Gluon.

The tile picture (``common.py`` has the formula and the names). BLOCK_H covers H, as in
``resident.py``, but this kernel chooses its layouts itself (▒ stays, ░ is read, ▓ is made in a
step):

                  M [H, H]            s_{t-1} [H, B]            s_t [H, B]
                                        BLOCK_B
                ┌───────────┐         ┌──┬──┬──┐               ┌──┬──┬──┐
        warp 0  │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
        warp 1  │▒▒▒▒▒▒▒▒▒▒▒│    x    │░░│  │  │       =       │▓▓│  │  │  = E(a + M s, aux)
        ...     │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
                └───────────┘         └──┴──┴──┘               └──┴──┴──┘
                in registers          in shared memory,        goes to the other
                                      double-buffered          buffer

M is the left operand of ``wgmma``, which takes it from registers, 16 rows a warp; the state is the
right one, which it takes from shared memory, double-buffered by parity of the step. So a step reads
nothing of M, and needs one block barrier. While a product is made, the program stores the state
that the product reads, converts the next step's tiles to the product's layout, and issues the async
copies of the step four ahead. From product to product there is nothing but the epilogue, the
state's way to shared memory, a fence, a wait for copies of two steps before, and the barrier.

Loads to registers would be waited for in the iteration that sends them; see ``resident.py``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tritonrnn.kernels.common import (
    UNSPECIALIZED,
    Batch,
    Constants,
    clear_padding,
    compute_state,
    is_first,
    load_step,
    make_block,
    optimization_barrier,
    prepare_aux,
    row_offset,
    split_tf32,
    store_ends,
    tile_mask,
    zero_padding,
)

# Steps in flight: an iteration of the time loop walks as many.
NUM_STAGES = tl.constexpr(4)


@dataclass(frozen=True)
class RegistersConstants(Constants):
    """ITEM_BITS: of an element of the state. The layouts follow from it and the tile."""

    ITEM_BITS: int

    @property
    def NUM_WARPS(self) -> int:
        """Return the warps of a program: four to the 64 rows of a product."""
        return self.BLOCK_H // 16

    @property
    def MMA(self) -> gl.NVMMADistributedLayout:
        """Return the layout of products: a warp has 16 hidden units of all sequences."""
        return gl.NVMMADistributedLayout(
            [3, 0], [self.NUM_WARPS, 1], [16, self.BLOCK_B, 256 // self.ITEM_BITS]
        )

    @property
    def MEMORY(self) -> gl.BlockedLayout:
        """Return the layout of whole rows: a thread has four neighbouring units of one sequence."""
        lanes = min(32, self.BLOCK_H // 4)
        warps_a_row = self.BLOCK_H // (4 * lanes)
        return gl.BlockedLayout(
            [4, 1], [lanes, 32 // lanes], [warps_a_row, self.NUM_WARPS // warps_a_row], [0, 1]
        )


class Shared(NamedTuple):
    """The program's tiles in shared memory.

    states      the state that even steps read, and the one that odd steps read
    a, aux      NUM_STAGES tiles each, of one step in NUM_STAGES; a twice where there is no aux
    """

    states: Any
    a: Any
    aux: Any


class PipelineState(NamedTuple):
    """What a walk carries from step to step.

    drive, aux      what the step's product starts from, and what its epilogue takes
    s               the previous state, if fp32; else any tile of its type
    previous_row    offset of the row of the previous step
    prefetch_row    offset of the row NUM_STAGES steps ahead
    """

    drive: Any
    aux: Any
    s: Any
    previous_row: Any
    prefetch_row: Any


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def registers_kernel(
    a_ptr,
    v_0_ptr,
    m_ptr,
    aux_ptr,
    ends_ptr,
    time_base_ptr,
    batch_base_ptr,
    lengths_ptr,
    T,
    B,
    stride_time,
    stride_batch,
    reverse_groups,
    C: gl.constexpr,
):
    """Walk every step of every sequence of a batch block.

    Arguments as ``common.Batch`` has them; m_ptr is [G, H, H], contiguous, in the dtype of a.
    """
    # Operands here have no small part.
    gl.static_assert(C.PRECISION != "tf32x3")
    batch = Batch(
        a_ptr=a_ptr,
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
    m = load_operand(m_ptr, C)
    MMA: gl.constexpr = C.MMA
    MEMORY: gl.constexpr = C.MEMORY
    block = make_block_in(MMA, batch, C)
    in_rows = make_block_in(MEMORY, batch, C)
    range_h = gl.arange(0, C.BLOCK_H, gl.SliceLayout(1, MEMORY))
    range_b = gl.arange(0, C.BLOCK_B, gl.SliceLayout(0, MEMORY))
    clear_padding(tl.program_id(0), range_b, in_rows, batch, C)
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    states = (allocate_tile(dtype, C), allocate_tile(dtype, C))
    a_tiles = ()
    aux_tiles = ()
    for _ in gl.static_range(NUM_STAGES):
        a_tile = allocate_tile(dtype, C)
        aux_tile = a_tile
        if aux_ptr is not None:
            aux_tile = allocate_tile(dtype, C)
        a_tiles = a_tiles + (a_tile,)  # type: ignore[assignment]  # noqa: RUF005
        aux_tiles = aux_tiles + (aux_tile,)  # type: ignore[assignment]  # noqa: RUF005
    shared = Shared(states=states, a=a_tiles, aux=aux_tiles)
    for step in gl.static_range(1, NUM_STAGES):
        row = row_offset(step, batch, in_rows, C)
        prefetch_step(step, row, shared, step, batch, in_rows)
    a, aux = load_step(0, row_offset(0, batch, block, C), batch, block)
    drive, aux = prepare_step_by_sum(0, a, aux, batch, block, C, True)
    s = gl.full([C.BLOCK_H, C.BLOCK_B], 0.0, dtype, C.MMA)
    share_state(s, shared.states[0], C)
    pipeline = PipelineState(
        drive=drive,
        aux=aux,
        s=s.to(gl.float32),
        previous_row=row_offset(0, batch, in_rows, C),
        prefetch_row=row_offset(NUM_STAGES, batch, in_rows, C),
    )
    # A step stores the state before it: so one step more, and as many as make whole iterations.
    # LLVM would hoist the descriptor of every wgmma out of the loop, where it takes registers, as
    # the loop is not the kernel's end.
    for first in tl.range(0, block.num_steps + 1, NUM_STAGES, disable_licm=True):
        for i in gl.static_range(NUM_STAGES):
            pipeline = walk_step(first + i, i, pipeline, m, shared, batch, block, in_rows, C)
    # No copy may land in shared memory that is another program's by then.
    async_copy.wait_group(0)
    store_ends(tl.program_id(0), range_h, range_b, in_rows, batch, C)


@gluon.jit
def walk_step(
    step, STAGE: gl.constexpr, pipeline, m, shared, batch, block, in_rows, C: gl.constexpr
):
    """Walk one step, which is prefetched to stage STAGE. Return the next pipeline state.

    block, in_rows  the program's tile in the product's layout, and in that of whole rows
    """
    MAY_BEGIN: gl.constexpr = batch.lengths_ptr is not None
    previous, current = shared.states[STAGE % 2], shared.states[(STAGE + 1) % 2]
    product = begin_product(m, previous, pipeline.drive)
    # From here on, beside the product. The first step has none before it to store.
    store_state(step - 1, pipeline.previous_row, pipeline.s, previous, batch, block, in_rows, C)
    prefetch_step(step + NUM_STAGES, pipeline.prefetch_row, shared, STAGE, batch, in_rows)
    row = row_offset(step, batch, in_rows, C)
    next_row = row_offset(step + NUM_STAGES + 1, batch, in_rows, C)
    next_a = shared.a[(STAGE + 1) % NUM_STAGES].load(C.MMA)
    next_aux = next_a
    if batch.aux_ptr is not None:
        next_aux = shared.aux[(STAGE + 1) % NUM_STAGES].load(C.MMA)
    drive, aux = prepare_step_by_sum(step + 1, next_a, next_aux, batch, block, C, MAY_BEGIN)
    # From here on, on the chain of dependent latencies again.
    z = warpgroup_mma_wait(0, deps=[product])
    z = zero_padding(z, block, C)
    s = compute_state(step, z, pipeline.aux, batch, block, C)
    share_state(s, current, C)
    if C.ITEM_BITS == 16:
        # It is stored from shared memory. Any fp32 tile of this type keeps the pipeline state's.
        s = drive
    return PipelineState(drive=drive, aux=aux, s=s, previous_row=row, prefetch_row=next_row)


@gluon.jit
def begin_product(m, state, drive):
    """Begin ``m s + drive``."""
    product = warpgroup_mma(m, state, drive, is_async=True)
    # This waits for nothing, as one product may be in flight; but what follows stays after it.
    # Otherwise ptxas reads the state for its store, and waits for it, before it begins the product.
    return warpgroup_mma_wait(1, deps=[product])


@gluon.jit
def share_state(s, tile, C: gl.constexpr):
    """Put a state where the next step's product reads it, and let all see what has landed."""
    tile.store(split_tf32(s, C).large.to(s.dtype))
    fence_async_shared()
    # Two groups may stay in flight: those of the last two steps. Not beside the product, as Triton
    # puts a barrier after it.
    async_copy.wait_group(NUM_STAGES - 2)
    # Gluon's own name for it changes from Triton 3.6 to 3.7.
    tl.debug_barrier()


@gluon.jit
def prefetch_step(step, row, shared, STAGE: gl.constexpr, batch, in_rows):
    """Issue the async copies of a step to its stage, one commit group."""
    mask = tile_mask(step, in_rows)
    async_copy.async_copy_global_to_shared(
        shared.a[STAGE], batch.a_ptr + row + in_rows.offs_tile, mask
    )
    if batch.aux_ptr is not None:
        aux_ptrs = batch.aux_ptr + row + in_rows.offs_tile
        async_copy.async_copy_global_to_shared(shared.aux[STAGE], aux_ptrs, mask)
    async_copy.commit_group()


@gluon.jit
def store_state(step, row, s, tile, batch, block, in_rows, C: gl.constexpr):
    """Overwrite a by the state of a step, if the walk has that step."""
    if C.ITEM_BITS == 32:
        # From registers: eight elements of a sequence are a whole sector of memory.
        tl.store(batch.a_ptr + row + block.offs_tile, s, mask=tile_mask(step, block))
    else:
        s = tile.load(C.MEMORY)
        tl.store(batch.a_ptr + row + in_rows.offs_tile, s, mask=tile_mask(step, in_rows))


@gluon.jit
def prepare_step_by_sum(step, a, aux, batch, block, C: gl.constexpr, MAY_BEGIN: gl.constexpr):
    """Return the accumulator that a step's product starts from, and what its epilogue takes."""
    drive = a.to(gl.float32)
    if batch.v_0_ptr is not None and MAY_BEGIN:
        # A sum, not a choice between two: that becomes a branch, over which ptxas waits for every
        # single wgmma.
        drive += tl.where(is_first(step, block), block.v_0, 0.0)
    prepared = drive
    if batch.aux_ptr is not None:
        prepared = prepare_aux(aux, C)
    return drive, prepared


@gluon.jit
def load_operand(m_ptr, C: gl.constexpr):
    """Load M to registers, as ``wgmma`` takes its left operand."""
    H: gl.constexpr = C.H
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, C.MMA, 32 // C.ITEM_BITS)
    offs_h = gl.arange(0, C.BLOCK_H, gl.SliceLayout(1, LAYOUT))[:, None]
    offs_k = gl.arange(0, C.BLOCK_H, gl.SliceLayout(0, LAYOUT))[None, :]
    m_ptrs = m_ptr + tl.program_id(2) * H * H + offs_h * H + offs_k
    m = tl.load(m_ptrs, mask=(offs_h < H) & (offs_k < H), other=0.0)
    if C.ITEM_BITS == 16:
        # Two elements are packed in a register here, not again in every step.
        m = optimization_barrier(m, C)
    return split_tf32(m, C).large


@gluon.jit
def make_block_in(LAYOUT: gl.constexpr, batch, C: gl.constexpr):
    """Return the program's tile in a layout."""
    range_h = gl.arange(0, C.BLOCK_H, gl.SliceLayout(1, LAYOUT))
    range_b = gl.arange(0, C.BLOCK_B, gl.SliceLayout(0, LAYOUT))
    return make_block(tl.program_id(0), range_h, range_b, batch, C)


@gluon.jit
def allocate_tile(dtype: gl.constexpr, C: gl.constexpr):
    """Allocate a tile in shared memory, hidden units next to each other as in global memory."""
    SHAPE: gl.constexpr = [C.BLOCK_H, C.BLOCK_B]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, dtype, transposed=True)
    return gl.allocate_shared_memory(dtype, SHAPE, LAYOUT)
