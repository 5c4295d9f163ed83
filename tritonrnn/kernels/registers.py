"""The resident walk with M in registers: for Hopper, in Gluon.

What ``recurrence.py`` computes, by a kernel that chooses its layouts itself. A program owns all
hidden units of BLOCK_B sequences of one group. M lies in registers, where the product takes it
from as its left operand, the state in shared memory as its right one, twice, by parity of the step.
So nothing of M is read in a step, and one barrier a step is enough. While a product is made, a
program stores the state that the product reads, turns the next step's numbers to the product's
layout, and sends for others. On the chain from product to product there is nothing but the
epilogue, the state's way to shared memory, a fence, a wait for what was sent for two steps before,
and a barrier.

What is sent for comes to shared memory by itself. Loads to registers would be waited for in the
step that sends them: values that go from one turn of a loop to the next are copied there, and ptxas
has a counter in common for most that are under way.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonrnn.kernels import hopper
from tritonrnn.kernels.arithmetic import keep_place, operands, prepare_aux
from tritonrnn.kernels.block import (
    Batch,
    block_of,
    clear_padding,
    load_step,
    row_at,
    state_of,
    tile_of,
    time_at,
)


class Moment(NamedTuple):
    """What a walk carries from step to step.

    drive, aux      what the step's product starts from and its epilogue takes
    s               the state of the step before, if fp32; else anything of its type
    row_before      offset of the row of the step before
    row_4           offset of the row four steps ahead
    """

    drive: Any
    aux: Any
    s: Any
    row_before: Any
    row_4: Any


@triton.jit
def tile_in_shared_memory(dtype: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Allocate a tile, hidden units next to each other as in memory."""
    LAYOUT: tl.constexpr = hopper.NVMMASharedLayout.get_default_for(
        [BLOCK_H, BLOCK_B], dtype, transposed=True
    )
    return hopper.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_B], LAYOUT)


@triton.jit
def send_for(step, row, a_tile, aux_tile, batch, in_memory):
    """Have a step's numbers come to shared memory."""
    mask = tile_of(step, in_memory)
    a_ptrs = batch.a_ptr + row + in_memory.tile
    hopper.async_copy_global_to_shared(a_tile, a_ptrs, mask)
    if batch.aux_ptr is not None:
        aux_ptrs = batch.aux_ptr + row + in_memory.tile
        hopper.async_copy_global_to_shared(aux_tile, aux_ptrs, mask)
    hopper.commit_group()


@triton.jit
def keep_state(s, state, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Put a state where the next step's product takes it, and let all see what has come."""
    operand, _ = operands(s, PRECISION, INTERPRETED)
    state.store(operand.to(s.dtype))
    hopper.fence_async_shared()
    # For all but what was sent for in this step and the one before. Not beside the product, for
    # Triton puts a barrier behind it.
    hopper.wait_group(2)
    hopper.barrier()


@triton.jit
def begin_product(m, state, drive):
    """Begin ``m s + drive``."""
    product = hopper.warpgroup_mma(m, state, drive, is_async=True)
    # Waits for nothing, with the product under way; but what follows stays behind it. Else ptxas
    # reads the state for its store, and waits for it, before it begins the product.
    return hopper.warpgroup_mma_wait(1, deps=[product])


@triton.jit
def store_state(step, row, s, state, batch, block, in_memory, MEMORY: tl.constexpr):
    """Overwrite a by the state of a step, if it is one of the walk."""
    if batch.a_ptr.dtype.element_ty == tl.float32:
        # As it lies: eight numbers of a sequence are a whole sector of memory.
        tl.store(batch.a_ptr + row + block.tile, s, mask=tile_of(step, block))
    else:
        s = state.load(MEMORY)
        tl.store(batch.a_ptr + row + in_memory.tile, s, mask=tile_of(step, in_memory))


@triton.jit
def prepare(step, a, aux, batch, block, EPILOGUE: tl.constexpr, MAY_JOIN: tl.constexpr):
    """Turn a step's numbers into what its product starts from and its epilogue takes."""
    drive = a.to(tl.float32)
    if batch.v_0_ptr is not None and MAY_JOIN:
        # A sum, not a choice between two: that becomes a branch, over which ptxas waits for every
        # single matrix instruction.
        joining = (time_at(step, block) == block.joins)[None, :]
        drive += tl.where(joining, block.v_0, 0.0)
    prepared = drive
    if batch.aux_ptr is not None:
        prepared = prepare_aux(aux, EPILOGUE)
    return drive, prepared


@triton.jit
def advance(
    step,
    moment,
    m,
    state,
    next_state,
    a_tile,
    aux_tile,
    next_a_tile,
    next_aux_tile,
    batch,
    block,
    in_memory,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRODUCT: tl.constexpr,
    MEMORY: tl.constexpr,
):
    """Walk one step. Gives the next moment.

    state, next_state       where the state of the step before is, and where that of this one goes
    a_tile, aux_tile        where the numbers of this step were, and those four steps on will be
    next_a_tile, next_aux_tile
                            where those of the next step are
    block, in_memory        the program's tile in the product's layout, and in that of whole rows
    """
    WIDTH: tl.constexpr = G * H
    MAY_JOIN: tl.constexpr = batch.row_map_ptr is not None
    product = begin_product(m, state, moment.drive)
    # From here on, beside the product. The first step has none before it to store.
    store_state(step - 1, moment.row_before, moment.s, state, batch, block, in_memory, MEMORY)
    send_for(step + 4, moment.row_4, a_tile, aux_tile, batch, in_memory)
    row = row_at(step, batch, in_memory, WIDTH)
    row_5 = row_at(step + 5, batch, in_memory, WIDTH)
    a_1 = next_a_tile.load(PRODUCT)
    aux_1 = a_1
    if batch.aux_ptr is not None:
        aux_1 = next_aux_tile.load(PRODUCT)
    drive, aux = prepare(step + 1, a_1, aux_1, batch, block, EPILOGUE, MAY_JOIN)
    # On the chain again.
    z = hopper.warpgroup_mma_wait(0, deps=[product])
    z = clear_padding(z, block, H, EPILOGUE)
    s = state_of(step, z, moment.aux, batch, block, EPILOGUE, INTERPRETED)
    keep_state(s, next_state, PRECISION, INTERPRETED)
    if s.dtype != tl.float32:
        # Which no longer has to be in registers.
        s = drive
    return Moment(drive=drive, aux=aux, s=s, row_before=row, row_4=row_5)


@hopper.jit(do_not_specialize=["T", "B", "stride_time", "stride_batch", "reverse_groups"])
def recurrence_in_registers_kernel(
    a_ptr,
    v_0_ptr,
    m_ptr,
    aux_ptr,
    row_map_ptr,
    T,
    B,
    stride_time,
    stride_batch,
    reverse_groups,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Walk every step of every sequence of a batch block.

    Arguments as ``recurrence_kernel``'s; m_ptr [G, H, H], contiguous.
    """
    # Operands here have no small part.
    tl.static_assert(PRECISION != "tf32x3")
    WIDTH: tl.constexpr = G * H
    # In the product a warp has 16 hidden units of all sequences; in memory, which is read and
    # written in whole rows, a thread has four neighbours of one sequence.
    WARPS: tl.constexpr = BLOCK_H // 16
    LANES: tl.constexpr = min(32, BLOCK_H // 4)
    WARPS_A_ROW: tl.constexpr = BLOCK_H // (4 * LANES)
    BITS: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth
    PRODUCT: tl.constexpr = hopper.NVMMADistributedLayout(
        [3, 0], [WARPS, 1], [16, BLOCK_B, 256 // BITS]
    )
    OPERAND: tl.constexpr = hopper.DotOperandLayout(0, PRODUCT, 32 // BITS)
    MEMORY: tl.constexpr = hopper.BlockedLayout(
        [4, 1], [LANES, 32 // LANES], [WARPS_A_ROW, WARPS // WARPS_A_ROW], [0, 1]
    )
    batch = Batch(
        a_ptr=a_ptr,
        v_0_ptr=v_0_ptr,
        aux_ptr=aux_ptr,
        row_map_ptr=row_map_ptr,
        T=T,
        B=B,
        stride_time=stride_time,
        stride_batch=stride_batch,
        reverse_groups=reverse_groups,
    )
    block = block_of(
        tl.program_id(0),
        hopper.arange(0, BLOCK_H, hopper.SliceLayout(1, PRODUCT)),
        hopper.arange(0, BLOCK_B, hopper.SliceLayout(0, PRODUCT)),
        batch,
        G,
        H,
    )
    in_memory = block_of(
        tl.program_id(0),
        hopper.arange(0, BLOCK_H, hopper.SliceLayout(1, MEMORY)),
        hopper.arange(0, BLOCK_B, hopper.SliceLayout(0, MEMORY)),
        batch,
        G,
        H,
    )
    rows = hopper.arange(0, BLOCK_H, hopper.SliceLayout(1, OPERAND))[:, None]
    columns = hopper.arange(0, BLOCK_H, hopper.SliceLayout(0, OPERAND))[None, :]
    m_ptrs = m_ptr + tl.program_id(2) * H * H + rows * H + columns
    m = tl.load(m_ptrs, mask=(rows < H) & (columns < H), other=0.0)
    if BITS == 16:
        # Two numbers to a register here, not again in every step.
        m = keep_place(m, INTERPRETED)
    m, _ = operands(m, PRECISION, INTERPRETED)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    even = tile_in_shared_memory(dtype, BLOCK_H, BLOCK_B)
    odd = tile_in_shared_memory(dtype, BLOCK_H, BLOCK_B)
    a_tiles = ()
    aux_tiles = ()
    for _ in tl.static_range(4):
        a_tile = tile_in_shared_memory(dtype, BLOCK_H, BLOCK_B)
        aux_tile = a_tile
        if aux_ptr is not None:
            aux_tile = tile_in_shared_memory(dtype, BLOCK_H, BLOCK_B)
        a_tiles = a_tiles + (a_tile,)  # type: ignore[assignment]  # noqa: RUF005
        aux_tiles = aux_tiles + (aux_tile,)  # type: ignore[assignment]  # noqa: RUF005

    for step in tl.static_range(1, 4):
        row = row_at(step, batch, in_memory, WIDTH)
        send_for(step, row, a_tiles[step], aux_tiles[step], batch, in_memory)
    a, aux = load_step(0, row_at(0, batch, block, WIDTH), batch, block)
    drive, aux = prepare(0, a, aux, batch, block, EPILOGUE, True)
    s = hopper.full([BLOCK_H, BLOCK_B], 0.0, dtype, PRODUCT)
    keep_state(s, even, PRECISION, INTERPRETED)
    moment = Moment(
        drive=drive,
        aux=aux,
        s=s.to(tl.float32),
        row_before=row_at(0, batch, in_memory, WIDTH),
        row_4=row_at(4, batch, in_memory, WIDTH),
    )
    # A step stores the state before it: so one step more, and as many as make it whole turns. Of
    # H 256, LLVM would keep the descriptors of all matrix instructions in registers, and spill.
    for first in tl.range(0, block.longest + 1, 4, disable_licm=BLOCK_H > 128):
        for i in tl.static_range(4):
            moment = advance(
                first + i,
                moment,
                m,
                even if i % 2 == 0 else odd,
                odd if i % 2 == 0 else even,
                a_tiles[i],
                aux_tiles[i],
                a_tiles[(i + 1) % 4],
                aux_tiles[(i + 1) % 4],
                batch,
                block,
                in_memory,
                G,
                H,
                EPILOGUE,
                PRECISION,
                INTERPRETED,
                PRODUCT,
                MEMORY,
            )
    # Of steps past the walk, which nobody reads.
    hopper.wait_group(0)
