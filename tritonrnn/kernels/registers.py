"""The whole walk in one launch: M in the registers of one multiprocessor, in Gluon.

The tile picture (``common.py`` has the formula and the names). BLOCK_H covers H, as in
``resident.py``, but this kernel chooses its layouts itself (▒ stays, ░ is read, ▓ is made in a
step):

                  M [H, H]            s_{t-1} [H, B]            s_t [H, B]
                                        BLOCK_B
                ┌───────────┐         ┌──┬──┬──┐               ┌──┬──┬──┐
        warp 0  │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
        warp 1  │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
        ...     │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
                └───────────┘         └──┴──┴──┘               └──┴──┴──┘
                in registers          in shared memory,        goes to the other
                                      double-buffered          buffer

M is the left operand, and never in shared memory. Each warp has 16 of its rows, or 32 of the 256 of
``mma.sync``; the state is the right operand, double-buffered by parity of the step. So a step reads
nothing of M, and needs one block barrier. Beside a product the program stores the state that the
product reads, converts the next step's tiles to the product's layout, and issues the async copies
of the step four ahead. From product to product there is nothing but the epilogue, the state's way
to shared memory, a wait for copies of two steps before, and the barrier.

Two instructions make the product; ``plan.uses_wgmma`` says which. ``wgmma`` (Hopper's) reads the
state in shared memory, runs beside all else until it is waited for, and wants a fence before it.
``mma.sync`` (NVIDIA's since sm_80) takes the state from registers, where each warp loads the whole
of it by ``ldmatrix``; ptxas puts the rest between its instructions. By ``mma.sync`` there are
products of fp32 accuracy, too, of M and state in two parts each, and rows that are no whole number
of 32-bit words: no async copy takes them, so they are loaded to registers, two or three steps
ahead.

Elsewhere such loads would be waited for in the iteration that sends them; see ``resident.py``. Here
an iteration is four steps, in which a tile keeps its registers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tritonrnn.kernels.common import (
    UNSPECIALIZED,
    Batch,
    Constants,
    Operand,
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
    """What the registers kernel is compiled for, too. The layouts follow from it and the tile.

    ITEM_BITS       of an element of the state
    BLOCK_K         columns of M, and hidden units of the state, of one product
    NUM_WARPS       warps of a program
    USES_WGMMA      whether the product is Hopper's ``wgmma``, or else ``mma.sync``
    HAS_ODD_WORDS   whether rows are no whole number of 32-bit words, so that loads go to registers
    """

    ITEM_BITS: int
    BLOCK_K: int
    NUM_WARPS: int
    USES_WGMMA: bool
    HAS_ODD_WORDS: bool

    @property
    def NUM_SUMS(self) -> int:
        """Return how many sums the tiles' products are added to."""
        return 2 if self.NUM_TILES == 2 else 1

    @property
    def STEPS_AHEAD(self) -> int:
        """Return how many steps ahead loads are issued: fewer where registers are full."""
        if self.HAS_ODD_WORDS:
            return 2 if self.BLOCK_H == 256 else 3
        return NUM_STAGES.value

    @property
    def NUM_TILES(self) -> int:
        """Return the number of tiles of M."""
        return self.BLOCK_H // self.BLOCK_K

    @property
    def MMA(self) -> gl.NVMMADistributedLayout:
        """Return the layout of products: a warp has 16 hidden units of all sequences, or more."""
        warps = [self.NUM_WARPS, 1]
        if self.USES_WGMMA:
            return gl.NVMMADistributedLayout([3, 0], warps, [16, self.BLOCK_B, 16])
        return gl.NVMMADistributedLayout([2, 0], warps, [16, 8])

    @property
    def LEFT(self) -> gl.DotOperandLayout:
        """Return the layout of M."""
        return gl.DotOperandLayout(0, self.MMA, 32 // self.ITEM_BITS)

    @property
    def RIGHT(self) -> gl.DotOperandLayout:
        """Return the layout of the state, where the product takes it from registers."""
        return gl.DotOperandLayout(1, self.MMA, 32 // self.ITEM_BITS)

    @property
    def MEMORY(self) -> gl.BlockedLayout:
        """Return the layout of whole rows: a thread has four neighbouring units of one sequence."""
        lanes = min(32, self.BLOCK_H // 4)
        warps_a_row = max(1, min(self.NUM_WARPS, self.BLOCK_H // (4 * lanes)))
        return gl.BlockedLayout(
            [4, 1], [lanes, 32 // lanes], [warps_a_row, self.NUM_WARPS // warps_a_row], [0, 1]
        )

    @property
    def ROWS(self) -> gl.NVMMASharedLayout:
        """Return the layout of shared memory that has whole rows, as global memory."""
        shape, dtype = [self.BLOCK_H, self.BLOCK_B], gl.int16 if self.ITEM_BITS == 16 else gl.int32
        return gl.NVMMASharedLayout.get_default_for(shape, dtype, transposed=True)

    @property
    def STATE(self) -> Any:
        """Return the layout of shared memory from which the product reads the state."""
        if self.USES_WGMMA or self.ITEM_BITS == 32:
            return self.ROWS
        # The eight sequences of a unit are next to each other: so what a warp's stores access at
        # once, and then its ldmatrix, are 128 bytes in a row.
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    @property
    def PAIRS(self) -> Any:
        """Return the layout in which a 16-bit state is stored: ``ldmatrix`` makes it.

        A thread has pairs of neighbouring units of one sequence; a warp, of its own units.
        """
        if self.USES_WGMMA:
            return self.MEMORY
        units = self.BLOCK_H // self.NUM_WARPS
        columns = [[0, 1 << i] for i in range(3)]
        return gl.DistributedLinearLayout(
            [[1, 0]] + [[n, 0] for n in (8, 16, 32) if n < units],
            [[2, 0], [4, 0], *columns],
            [[units << i, 0] for i in range(self.NUM_WARPS.bit_length() - 1)],
            [],
            [self.BLOCK_H, self.BLOCK_B],
        )


class Shared(NamedTuple):
    """The program's tiles in shared memory.

    states, small
                the state that even steps read, and the one that odd steps read; and its small part,
                where it has one
    a, aux      NUM_STAGES tiles each, of one step in NUM_STAGES; a twice where there is no aux
    """

    states: Any
    small: Any
    a: Any
    aux: Any


class PipelineState(NamedTuple):
    """What a walk carries from step to step.

    drive, aux      what the step's product starts from, and what its epilogue takes
    s               the previous state, if fp32; else any tile of its type
    previous_row    offset of the row of the previous step
    prefetch_row    offset of the row that is loaded next, NUM_STAGES steps ahead or fewer
    loaded          tiles of the next steps, a and aux in turn, where loads go to registers
    """

    drive: Any
    aux: Any
    s: Any
    previous_row: Any
    prefetch_row: Any
    loaded: Any


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def registers_kernel(
    a_ptr,
    s_ptr,
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
    stride_m_group,
    stride_m_row,
    stride_m_column,
    reverse_groups,
    C: gl.constexpr,
):
    """Walk every step of every sequence of a batch block.

    Arguments as ``common.Batch`` has them; m_ptr is [G, H, H] in the dtype of a, with offsets of 32
    bits in a matrix.
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
    m_ptr += tl.program_id(2).to(tl.int64) * stride_m_group
    tiles = load_operand(m_ptr, stride_m_row, stride_m_column, C)
    MMA: gl.constexpr = C.MMA
    MEMORY: gl.constexpr = C.MEMORY
    PAIRS: gl.constexpr = C.PAIRS
    block = make_block_in(MMA, batch, C)
    in_rows = make_block_in(MEMORY, batch, C)
    in_pairs = make_block_in(PAIRS, batch, C)
    range_h = gl.arange(0, C.BLOCK_H, gl.SliceLayout(1, MEMORY))
    range_b = gl.arange(0, C.BLOCK_B, gl.SliceLayout(0, MEMORY))
    clear_padding(tl.program_id(0), range_b, in_rows, batch, C)
    shared = allocate_tiles(batch, C)
    a, aux = load_step(0, row_offset(0, batch, block, C), batch, block)
    drive, aux = prepare_step_by_sum(0, a, aux, batch, block, C, True)
    loaded = ()
    STEPS_AHEAD: gl.constexpr = C.STEPS_AHEAD
    if C.HAS_ODD_WORDS:
        for step in gl.static_range(1, STEPS_AHEAD):
            loaded = loaded + load_step(step, row_offset(step, batch, block, C), batch, block)  # type: ignore[assignment]
    else:
        for step in gl.static_range(1, NUM_STAGES):
            row = row_offset(step, batch, in_rows, C)
            prefetch_step(step, row, shared, step, batch, in_rows)
    s = gl.full([C.BLOCK_H, C.BLOCK_B], 0.0, a_ptr.dtype.element_ty, C.MMA)
    share_state(s, shared, 0, C)
    pipeline = PipelineState(
        drive=drive,
        aux=aux,
        s=s.to(gl.float32),
        previous_row=row_offset(0, batch, in_rows, C),
        prefetch_row=row_offset(C.STEPS_AHEAD, batch, in_rows, C),
        loaded=loaded,
    )
    # A step stores the state before it: so one step more, and as many as make whole iterations.
    # LLVM would hoist the descriptor of every wgmma out of the loop, where it takes registers, as
    # the loop is not the kernel's end.
    for first in tl.range(0, block.num_steps + 1, NUM_STAGES, disable_licm=True):
        for i in gl.static_range(NUM_STAGES):
            pipeline = walk_step(
                first + i, i, pipeline, tiles, shared, batch, block, in_rows, in_pairs, C
            )
    # No copy may land in shared memory that is another program's by then.
    if not C.HAS_ODD_WORDS:
        async_copy.wait_group(0)
    store_ends(tl.program_id(0), range_h, range_b, in_rows, batch, C)


@gluon.jit
def walk_step(
    step,
    STAGE: gl.constexpr,
    pipeline,
    tiles,
    shared,
    batch,
    block,
    in_rows,
    in_pairs,
    C: gl.constexpr,
):
    """Walk one step, which is prefetched to stage STAGE. Return the next pipeline state.

    block, in_rows, in_pairs
        the program's tile in the layouts of the product, of async copies, and of stores
    """
    MAY_BEGIN: gl.constexpr = batch.lengths_ptr is not None
    if C.USES_WGMMA:
        product = begin_wgmma(tiles, shared, STAGE % 2, pipeline.drive)
    else:
        product = dot_mma_sync(tiles, shared, STAGE % 2, pipeline.drive, C)
    # From here on, beside the product. The first step has none before it to store.
    store_state(
        step - 1,
        pipeline.previous_row,
        pipeline.s,
        shared.states[STAGE % 2],
        batch,
        block,
        in_pairs,
        C,
    )
    row = row_offset(step, batch, in_rows, C)
    next_row = row_offset(step + C.STEPS_AHEAD + 1, batch, in_rows, C)
    loaded = pipeline.loaded
    if C.HAS_ODD_WORDS:
        loaded = loaded + load_step(step + C.STEPS_AHEAD, pipeline.prefetch_row, batch, block)
        next_a, next_aux = loaded[0], loaded[1]
        loaded = loaded[2:]
    else:
        prefetch_step(step + NUM_STAGES, pipeline.prefetch_row, shared, STAGE, batch, in_rows)
        next_a = shared.a[(STAGE + 1) % NUM_STAGES].load(C.MMA)
        next_aux = next_a
        if batch.aux_ptr is not None:
            next_aux = shared.aux[(STAGE + 1) % NUM_STAGES].load(C.MMA)
    drive, aux = prepare_step_by_sum(step + 1, next_a, next_aux, batch, block, C, MAY_BEGIN)
    # From here on, on the chain of dependent latencies again.
    z = product
    if C.USES_WGMMA:
        z = warpgroup_mma_wait(0, deps=[product])
    z = zero_padding(z, block, C)
    s = compute_state(step, z, pipeline.aux, batch, block, C)
    share_state(s, shared, (STAGE + 1) % 2, C)
    if C.ITEM_BITS == 16:
        # It is stored from shared memory. Any fp32 tile of this type keeps the pipeline state's.
        s = drive
    return PipelineState(
        drive=drive,
        aux=aux,
        s=s,
        previous_row=row,
        prefetch_row=next_row,
        loaded=loaded,
    )


@gluon.jit
def begin_wgmma(tiles, shared, PARITY: gl.constexpr, drive):
    """Begin ``M s + drive``, of one tile."""
    product = warpgroup_mma(tiles.large[0], shared.states[PARITY], drive, is_async=True)
    # This waits for nothing, as one product may be in flight; but what follows stays after it.
    # Otherwise ptxas reads the state for its store, and waits for it, before it begins the product.
    return warpgroup_mma_wait(1, deps=[product])


@gluon.jit
def dot_mma_sync(tiles, shared, PARITY: gl.constexpr, drive, C: gl.constexpr):
    """Return ``M s + drive``: one product for each tile of M."""
    state = shared.states[PARITY]
    z = drive
    # Each MMA waits for the one whose sum it adds to. So where a warp has few of them, every other
    # tile has a sum of its own.
    other = gl.full(drive.shape, 0.0, gl.float32, C.MMA)
    NUM_TILES: gl.constexpr = C.NUM_TILES
    for i in gl.static_range(NUM_TILES):
        large = state.slice(i * C.BLOCK_K, C.BLOCK_K).load(C.RIGHT)
        m = tiles.large[i]
        if C.PRECISION == "tf32x3":
            # As in common.dot_acc.
            small = shared.small[PARITY].slice(i * C.BLOCK_K, C.BLOCK_K).load(C.RIGHT)
            product = gl.full(drive.shape, 0.0, gl.float32, C.MMA)
            product = mma_v2(tiles.small[i], large, product, input_precision="tf32")
            product = mma_v2(m, small, product, input_precision="tf32")
            z += mma_v2(m, large, product, input_precision="tf32")
        elif i % C.NUM_SUMS == 0:
            z = mma_v2(m, large, z, input_precision=C.PRECISION)
        else:
            other = mma_v2(m, large, other, input_precision=C.PRECISION)
    if C.NUM_SUMS == 2:
        z += other
    return z


@gluon.jit
def share_state(s, shared, PARITY: gl.constexpr, C: gl.constexpr):
    """Put a state where the next step's product reads it, and let all see what has landed."""
    operand = split_tf32(s, C)
    shared.states[PARITY].store(operand.large.to(s.dtype))
    if C.PRECISION == "tf32x3":
        shared.small[PARITY].store(operand.small)
    if C.USES_WGMMA:
        fence_async_shared()
    if not C.HAS_ODD_WORDS:
        # Two groups may stay in flight: those of the last two steps. Not beside the product, as
        # Triton puts a barrier after it.
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
def store_state(step, row, s, tile, batch, block, in_pairs, C: gl.constexpr):
    """Store the state of a step, if the walk has that step."""
    if C.ITEM_BITS == 32:
        # From registers: eight elements of a sequence are a whole sector of memory.
        tl.store(batch.s_ptr + row + block.offs_tile, s, mask=tile_mask(step, block))
    else:
        s = tile.load(C.PAIRS)
        tl.store(batch.s_ptr + row + in_pairs.offs_tile, s, mask=tile_mask(step, in_pairs))


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
def load_operand(m_ptr, stride_m_row, stride_m_column, C: gl.constexpr):
    """Load M to registers, as the product takes its left operand: in NUM_TILES tiles."""
    H: gl.constexpr = C.H
    LEFT: gl.constexpr = C.LEFT
    offs_h = gl.arange(0, C.BLOCK_H, gl.SliceLayout(1, LEFT))[:, None]
    offs_k = gl.arange(0, C.BLOCK_K, gl.SliceLayout(0, LEFT))[None, :]
    m_ptrs = m_ptr + offs_h * stride_m_row + offs_k * stride_m_column
    large = ()
    small = ()
    NUM_TILES: gl.constexpr = C.NUM_TILES
    for i in gl.static_range(NUM_TILES):
        k = i * C.BLOCK_K
        mask = (offs_h < H) & (k + offs_k < H)
        m = tl.load(m_ptrs + k * stride_m_column, mask=mask, other=0.0)
        if C.ITEM_BITS == 16:
            # Two elements are packed in a register here, not again in every step.
            m = optimization_barrier(m, C)
        tile = split_tf32(m, C)
        large = large + (tile.large,)  # type: ignore[assignment]  # noqa: RUF005
        small = small + (tile.small,)  # type: ignore[assignment]  # noqa: RUF005
    return Operand(large=large, small=small)


@gluon.jit
def make_block_in(LAYOUT: gl.constexpr, batch, C: gl.constexpr):
    """Return the program's tile in a layout."""
    range_h = gl.arange(0, C.BLOCK_H, gl.SliceLayout(1, LAYOUT))
    range_b = gl.arange(0, C.BLOCK_B, gl.SliceLayout(0, LAYOUT))
    return make_block(tl.program_id(0), range_h, range_b, batch, C)


@gluon.jit
def allocate_tiles(batch, C: gl.constexpr):
    """Allocate the program's tiles in shared memory."""
    dtype: gl.constexpr = batch.a_ptr.dtype.element_ty
    SHAPE: gl.constexpr = [C.BLOCK_H, C.BLOCK_B]
    ROWS: gl.constexpr = C.ROWS
    STATE: gl.constexpr = C.STATE
    states = ()
    small = ()
    for _ in gl.static_range(2):
        tile = gl.allocate_shared_memory(dtype, SHAPE, STATE)
        small_tile = tile
        if C.PRECISION == "tf32x3":
            small_tile = gl.allocate_shared_memory(dtype, SHAPE, STATE)
        states = states + (tile,)  # type: ignore[assignment]  # noqa: RUF005
        small = small + (small_tile,)  # type: ignore[assignment]  # noqa: RUF005
    a_tiles = ()
    aux_tiles = ()
    if not C.HAS_ODD_WORDS:
        for _ in gl.static_range(NUM_STAGES):
            a_tile = gl.allocate_shared_memory(dtype, SHAPE, ROWS)
            aux_tile = a_tile
            if batch.aux_ptr is not None:
                aux_tile = gl.allocate_shared_memory(dtype, SHAPE, ROWS)
            a_tiles = a_tiles + (a_tile,)  # type: ignore[assignment]  # noqa: RUF005
            aux_tiles = aux_tiles + (aux_tile,)  # type: ignore[assignment]  # noqa: RUF005
    return Shared(states=states, small=small, a=a_tiles, aux=aux_tiles)
