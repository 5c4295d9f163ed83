"""The resident walk with M in registers: for Hopper, in Gluon.

What ``recurrence.py`` computes, by a kernel that chooses its layouts itself. A program owns all
hidden units of BLOCK_B sequences of one group. M lies in registers, where the product takes it
from as its left operand, the state in shared memory as its right one, twice, by parity of the step.
So nothing of M is read in a step, and one barrier a step is enough. While a product is made, a
program stores the state that the product reads, turns the next step's numbers to the product's
layout, and sends for others. On the chain from product to product there is nothing but the
epilogue, the state's way to shared memory, a fence and a barrier.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonrnn.kernels import hopper
from tritonrnn.kernels.arithmetic import operands, prepare_aux
from tritonrnn.kernels.block import (
    Batch,
    block_of,
    load_step,
    row_at,
    state_of,
    tile_of,
    time_at,
)


class Shared(NamedTuple):
    """Shared memory of the steps of one parity.

    state, state_small
            the state before the step, as the product takes it
    a, aux  the step's numbers, as they were loaded
    """

    state: Any
    state_small: Any
    a: Any
    aux: Any


class Moment(NamedTuple):
    """What a walk carries from step to step.

    drive, aux      what the step's product starts from and its epilogue takes
    a_2, aux_2, a_3, aux_3
                    numbers of the steps two and three ahead, maybe still on their way
    s               the state of the step before, if fp32
    row_before      offset of the row of the step before
    row_4           offset of the row four steps ahead
    """

    drive: Any
    aux: Any
    a_2: Any
    aux_2: Any
    a_3: Any
    aux_3: Any
    s: Any
    row_before: Any
    row_4: Any


@triton.jit
def share(
    dtype: tl.constexpr,
    batch,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Allocate the shared memory of one parity."""
    # Hidden units next to each other, as in memory.
    LAYOUT: tl.constexpr = hopper.NVMMASharedLayout.get_default_for(
        [BLOCK_H, BLOCK_B], dtype, transposed=True
    )
    state = hopper.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_B], LAYOUT)
    state_small = state
    if PRECISION == "tf32x3":
        state_small = hopper.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_B], LAYOUT)
    a = hopper.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_B], LAYOUT)
    aux = a
    if batch.aux_ptr is not None:
        aux = hopper.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_B], LAYOUT)
    return Shared(state=state, state_small=state_small, a=a, aux=aux)


@triton.jit
def keep_state(s, shared, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Put a state where the next step's product takes it."""
    state, state_small = operands(s, PRECISION, INTERPRETED)
    shared.state.store(state.to(s.dtype))
    if PRECISION == "tf32x3":
        shared.state_small.store(state_small)
    hopper.fence_async_shared()
    hopper.barrier()


@triton.jit
def begin_product(m, m_small, shared, drive, PRECISION: tl.constexpr):
    """Begin ``m s + drive``, the smallest products first."""
    z = drive
    if PRECISION == "tf32x3":
        z = hopper.warpgroup_mma(m_small, shared.state, z, is_async=True)
        z = hopper.warpgroup_mma(m, shared.state_small, z, is_async=True)
    product = hopper.warpgroup_mma(m, shared.state, z, is_async=True)
    # Waits for nothing, with the products under way; but what follows stays behind it. Else ptxas
    # reads the state for its store, and waits for it, before it begins the product.
    return hopper.warpgroup_mma_wait(3 if PRECISION == "tf32x3" else 1, deps=[product])


@triton.jit
def store_state(step, row, s, shared, batch, block, memory, MEMORY: tl.constexpr):
    """Overwrite a by the state of a step, if it is one of the walk."""
    if batch.a_ptr.dtype.element_ty == tl.float32:
        # As it lies: eight numbers of a sequence are a whole sector of memory.
        tl.store(batch.a_ptr + row + block.tile, s, mask=tile_of(step, block))
    else:
        s = shared.state.load(MEMORY)
        tl.store(batch.a_ptr + row + memory.tile, s, mask=tile_of(step, memory))


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
    m_small,
    here,
    there,
    batch,
    block,
    memory,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRODUCT: tl.constexpr,
    MEMORY: tl.constexpr,
):
    """Walk one step, whose parity is that of ``here``. Gives the next moment.

    block, memory   the program's tile in the product's layout and in that of loads and stores
    """
    WIDTH: tl.constexpr = G * H
    MAY_JOIN: tl.constexpr = batch.row_map_ptr is not None
    product = begin_product(m, m_small, here, moment.drive, PRECISION)
    # From here on, beside the product. The first step has none before it to store.
    store_state(step - 1, moment.row_before, moment.s, here, batch, block, memory, MEMORY)
    row = row_at(step, batch, memory, WIDTH)
    row_5 = row_at(step + 5, batch, memory, WIDTH)
    a_4, aux_4 = load_step(step + 4, moment.row_4, batch, memory)
    here.a.store(moment.a_2)
    a_1 = there.a.load(PRODUCT)
    aux_1 = a_1
    if batch.aux_ptr is not None:
        here.aux.store(moment.aux_2)
        aux_1 = there.aux.load(PRODUCT)
    drive, aux = prepare(step + 1, a_1, aux_1, batch, block, EPILOGUE, MAY_JOIN)
    # On the chain again.
    z = hopper.warpgroup_mma_wait(0, deps=[product])
    s = state_of(step, z, moment.aux, batch, block, EPILOGUE, INTERPRETED)
    keep_state(s, there, PRECISION, INTERPRETED)
    if s.dtype != tl.float32:
        # Which no longer has to be in registers.
        s = drive
    return Moment(
        drive=drive,
        aux=aux,
        a_2=moment.a_3,
        aux_2=moment.aux_3,
        a_3=a_4,
        aux_3=aux_4,
        s=s,
        row_before=row,
        row_4=row_5,
    )


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
    stride_m_group,
    stride_m_row,
    stride_m_column,
    reverse_groups,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Walk every step of every sequence of a batch block; arguments as ``recurrence_kernel``'s."""
    WIDTH: tl.constexpr = G * H
    # A warp has 16 hidden units, four neighbours of them a thread; memory is read and written in
    # whole rows of one sequence.
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
    memory = block_of(
        tl.program_id(0),
        hopper.arange(0, BLOCK_H, hopper.SliceLayout(1, MEMORY)),
        hopper.arange(0, BLOCK_B, hopper.SliceLayout(0, MEMORY)),
        batch,
        G,
        H,
    )
    rows = hopper.arange(0, BLOCK_H, hopper.SliceLayout(1, OPERAND))[:, None]
    columns = hopper.arange(0, BLOCK_H, hopper.SliceLayout(0, OPERAND))[None, :]
    m_ptrs = m_ptr + tl.program_id(2).to(tl.int64) * stride_m_group
    m_ptrs += rows * stride_m_row + columns * stride_m_column
    m = tl.load(m_ptrs, mask=(rows < H) & (columns < H), other=0.0)
    if BITS == 16 and not INTERPRETED:
        # Two numbers to a register here, not again in every step.
        m = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [m], dtype=m.dtype, is_pure=False, pack=2
        )
    s = hopper.full([BLOCK_H, BLOCK_B], 0.0, m.dtype, PRODUCT)
    even = share(s.dtype, batch, PRECISION, BLOCK_H, BLOCK_B)
    odd = share(s.dtype, batch, PRECISION, BLOCK_H, BLOCK_B)
    m, m_small = operands(m, PRECISION, INTERPRETED)

    a, aux = load_step(0, row_at(0, batch, block, WIDTH), batch, block)
    drive, aux = prepare(0, a, aux, batch, block, EPILOGUE, True)
    a_1, aux_1 = load_step(1, row_at(1, batch, memory, WIDTH), batch, memory)
    odd.a.store(a_1)
    if aux_ptr is not None:
        odd.aux.store(aux_1)
    a_2, aux_2 = load_step(2, row_at(2, batch, memory, WIDTH), batch, memory)
    a_3, aux_3 = load_step(3, row_at(3, batch, memory, WIDTH), batch, memory)
    row, row_4 = row_at(0, batch, memory, WIDTH), row_at(4, batch, memory, WIDTH)
    keep_state(s, even, PRECISION, INTERPRETED)
    moment = Moment(drive, aux, a_2, aux_2, a_3, aux_3, s.to(tl.float32), row, row_4)
    # A step stores the state before it: so one step more, or two to make their number even. Of
    # H 256, LLVM would keep the descriptors of all matrix instructions in registers, and spill.
    for step in tl.range(0, block.longest + 1, 2, disable_licm=BLOCK_H > 128):
        moment = advance(
            step,
            moment,
            m,
            m_small,
            even,
            odd,
            batch,
            block,
            memory,
            G,
            H,
            EPILOGUE,
            PRECISION,
            INTERPRETED,
            PRODUCT,
            MEMORY,
        )
        moment = advance(
            step + 1,
            moment,
            m,
            m_small,
            odd,
            even,
            batch,
            block,
            memory,
            G,
            H,
            EPILOGUE,
            PRECISION,
            INTERPRETED,
            PRODUCT,
            MEMORY,
        )
