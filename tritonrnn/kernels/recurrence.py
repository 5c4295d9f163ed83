"""One recurrence kernel for every pass, direction and layout, and for three plans.

    s_t = E(a_t + v_t, aux_t)      v_t = M s_{t-1},  v_0 given at a sequence's own first step

              a          v_0          M         aux     E(z)
    forward   drive      h_0 W_hhᵀ    W_hh      -       tanh z, relu z
    backward  d output   d h_n        W_hhᵀ     output  z (1 - y²), z [y > 0]

The tile picture. A program owns BLOCK_H hidden units of BLOCK_B sequences of one group, and keeps
hidden units on the M side of the product,

    v[BLOCK_H, BLOCK_B] = M[BLOCK_H, H] s[H, BLOCK_B],

because Hopper's matrix instruction needs 64 rows or more there and is content with 8 columns. The
result overwrites ``a`` row by row: nobody else reads a program's slice of a row before the program
has replaced it.

    resident      BLOCK_H covers H. M stays in shared memory and the state in registers for the
                  whole walk; a program waits for nobody (``resident.py``).
    cooperative   BLOCK_H does not. A program's BLOCK_H rows of M stay in shared memory for the
                  whole walk, in tiles of BLOCK_K columns; the state goes from step to step through
                  ``a``, and a program waits until all that share its sequences have stored the
                  step before (``gang.py``). Where registers allow, a gang walks two of its batch
                  blocks at the same time, one's slices on their way while the other's product is
                  made, and then the next two.
    stepwise      A launch walks one step. M and the previous state, which other programs wrote in
                  the launch before, come from global memory in tiles of BLOCK_K.

A fourth, for Hopper, has a kernel of its own: ``registers.py``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonrnn.kernels.arithmetic import keep_place, multiply_add, operands
from tritonrnn.kernels.block import (
    Batch,
    block_of,
    has_state_before,
    in_layout_of,
    load_and_prepare_step,
    load_step,
    prepare_step,
    row_at,
    state_of,
    store_step,
)
from tritonrnn.kernels.gang import publish, wait
from tritonrnn.kernels.resident import walk_resident, walk_resident_by_loads


class Moment(NamedTuple):
    """What a cooperative walk carries from step to step of a batch block.

    s           the state of the step before
    a, aux      the step's numbers as they were loaded
    row_before, row, row_1
                offsets of the rows of the step before, the step, and the one after it
    """

    s: Any
    a: Any
    aux: Any
    row_before: Any
    row: Any
    row_1: Any


@triton.jit
def load_weights(
    m_ptrs,
    mask_h,
    stride_m_column,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    STRIDE_K: tl.constexpr,
):
    """Load a program's rows of M for the whole walk: tuples of tiles, and of their small parts.

    TILES       tiles of BLOCK_K columns
    STRIDE_K    columns from one of a tile to the next; what is between them other tiles have
    """
    offs_k = STRIDE_K * tl.arange(0, BLOCK_K)
    tiles = ()
    tiles_small = ()
    for i in tl.static_range(TILES):
        k = i if STRIDE_K > 1 else i * BLOCK_K
        mask = mask_h & (k + offs_k < H)[None, :]
        m = tl.load(m_ptrs + k * stride_m_column, mask=mask, other=0.0)
        m, m_small = operands(m, PRECISION, INTERPRETED)
        # Triton knows no starred expressions.
        tiles = tiles + (m,)  # type: ignore[assignment]  # noqa: RUF005
        tiles_small = tiles_small + (m_small,)  # type: ignore[assignment]  # noqa: RUF005
        # One tile after the other, lest the numbers of all of them be in registers at once.
        tl.debug_barrier()
    return tiles, tiles_small


@triton.jit
def walk_gang(
    batch,
    tiles,
    tiles_small,
    gang_ptr,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PATIENCE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_READ: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Walk every ``lanes``-th batch block, TURNS of them at the same time, by turns in each step.

    All programs of a gang do so in the same order.
    """
    WIDTH: tl.constexpr = G * H
    units, sequences = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_B)
    lane, lanes = tl.program_id(0), tl.num_programs(0)
    # Counters 128 bytes apart, so that no two meet in one cache line: one for each turn.
    counter_ptr = gang_ptr + 32 * (1 + TURNS * (tl.program_id(2) * lanes + lane))
    target = 1
    other_target = 1
    patience = PATIENCE
    for number in tl.range(lane, tl.cdiv(batch.B, BLOCK_B), TURNS * lanes, num_stages=1):
        block = block_of(number, units, sequences, batch, G, H)
        moment = before_first_step(batch, block, WIDTH, BLOCK_H, BLOCK_B)
        steps = block.longest
        if TURNS == 2:
            # There may be none of this number: then it has no steps.
            other_block = block_of(number + lanes, units, sequences, batch, G, H)
            other_moment = before_first_step(batch, other_block, WIDTH, BLOCK_H, BLOCK_B)
            steps = tl.maximum(steps, other_block.longest)
        # The pipeliner would move reads of the state above the stores that other programs wait for.
        # And LLVM would hoist the descriptor of every matrix instruction out of the loop, two
        # registers each, where a program has a hundred of them.
        for step in tl.range(0, steps, num_stages=1, disable_licm=True):
            if step < block.longest:
                moment, target, patience = advance(
                    step,
                    batch,
                    block,
                    moment,
                    tiles,
                    tiles_small,
                    counter_ptr,
                    target,
                    patience,
                    G,
                    H,
                    EPILOGUE,
                    PRECISION,
                    INTERPRETED,
                    BLOCK_H,
                    BLOCK_K,
                    BLOCK_READ,
                )
            if TURNS == 2:  # noqa: SIM102 (Triton evaluates both sides of an "and")
                if step < other_block.longest:
                    other_moment, other_target, patience = advance(
                        step,
                        batch,
                        other_block,
                        other_moment,
                        tiles,
                        tiles_small,
                        counter_ptr + 32,
                        other_target,
                        patience,
                        G,
                        H,
                        EPILOGUE,
                        PRECISION,
                        INTERPRETED,
                        BLOCK_H,
                        BLOCK_K,
                        BLOCK_READ,
                    )
    # By every thread, for each has polled for itself.
    in_time_ptrs = gang_ptr + tl.zeros([BLOCK_H, BLOCK_B], tl.int32)
    tl.store(in_time_ptrs, 0, mask=patience == 0)


@triton.jit
def before_first_step(
    batch, block, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Give the moment at which a gang's walk of a batch block begins."""
    row = row_at(0, batch, block, WIDTH)
    a, aux = load_step(0, row, batch, block)
    return Moment(
        s=tl.zeros([BLOCK_H, BLOCK_B], a.dtype),
        a=a,
        aux=aux,
        row_before=tl.zeros([], tl.int64),
        row=row,
        row_1=row_at(1, batch, block, WIDTH),
    )


@triton.jit
def advance(
    step,
    batch,
    block,
    moment,
    tiles,
    tiles_small,
    counter_ptr,
    target,
    patience,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_READ: tl.constexpr,
):
    """Walk one step of a batch block as one of a gang.

    Gives the next moment, what the counter will be once all of the gang have walked the step, and
    the patience left.
    """
    GANG: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    # Before the wait: the step's numbers, loaded in the step before, go where the product takes
    # them, and the next step's are asked for.
    a = in_layout_of(moment.s, moment.a, step, block)
    aux = in_layout_of(moment.s, moment.aux, step, block)
    drive, aux = prepare_step(step, a, aux, batch, block, EPILOGUE, True)
    row_2 = row_at(step + 2, batch, block, G * H)
    a_1, aux_1 = load_step(step + 1, moment.row_1, batch, block)

    patience = wait(counter_ptr, target, patience, INTERPRETED)
    # One address and constant distances from it: an address a tile costs registers.
    offs_k = tl.arange(0, BLOCK_K)
    state_ptrs = batch.a_ptr + moment.row_before + block.base + offs_k[:, None]
    mask_b = has_state_before(step, block)
    z = drive
    # As many reads at once as shared memory has room for: each takes a round trip to L2.
    for first in tl.static_range(0, H, BLOCK_READ):
        states = ()
        for k in tl.static_range(first, first + BLOCK_READ, BLOCK_K):
            if k < H:
                mask = mask_b
                if k + BLOCK_K > H:
                    mask = (k + offs_k < H)[:, None] & mask_b
                state = tl.load(state_ptrs + k, mask=mask, other=0.0, cache_modifier=".cg")
                states = states + (state,)  # type: ignore[assignment]  # noqa: RUF005
        # All have been sent before any is waited for: else ptxas, short of nothing, takes a few
        # registers in turn, and a step several round trips.
        tl.debug_barrier()
        arrived = ()
        for i in tl.static_range(len(states)):
            state = keep_place(states[i], INTERPRETED)
            arrived = arrived + (state,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(len(arrived)):
            state, state_small = operands(arrived[i], PRECISION, INTERPRETED)
            m, m_small = tiles[first // BLOCK_K + i], tiles_small[first // BLOCK_K + i]
            z = multiply_add(m, m_small, state, state_small, z, PRECISION)

    s = state_of(step, z, aux, batch, block, EPILOGUE, INTERPRETED)
    store_step(step, moment.row, s, batch, block)
    publish(counter_ptr)
    next_moment = Moment(
        s=s, a=a_1, aux=aux_1, row_before=moment.row, row=moment.row_1, row_1=row_2
    )
    return next_moment, target + GANG, patience


@triton.jit
def walk_step(
    step,
    batch,
    block,
    m_ptrs,
    stride_m_column,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Walk one step of a batch block, M and the state before in global memory."""
    WIDTH: tl.constexpr = G * H
    row = row_at(step, batch, block, WIDTH)
    z, aux = load_and_prepare_step(step, row, batch, block, EPILOGUE)
    offs_k = tl.arange(0, BLOCK_K)
    state_ptrs = batch.a_ptr + row_at(step - 1, batch, block, WIDTH) + block.base + offs_k[:, None]
    mask_b = has_state_before(step, block)
    for k in tl.range(0, H, BLOCK_K, disable_licm=True):
        mask_k = k + offs_k < H
        m_k_ptrs = m_ptrs + tl.cast(k, tl.int64) * stride_m_column
        m = tl.load(m_k_ptrs, mask=block.mask_h & mask_k[None, :], other=0.0)
        state = tl.load(state_ptrs + k, mask=mask_k[:, None] & mask_b, other=0.0)
        m, m_small = operands(m, PRECISION, INTERPRETED)
        state, state_small = operands(state, PRECISION, INTERPRETED)
        z = multiply_add(m, m_small, state, state_small, z, PRECISION)
    s = state_of(step, z, aux, batch, block, EPILOGUE, INTERPRETED)
    store_step(step, row, s, batch, block)


@triton.jit(do_not_specialize=["T", "B", "stride_time", "stride_batch", "reverse_groups", "step"])
def recurrence_kernel(
    a_ptr,
    v_0_ptr,
    m_ptr,
    aux_ptr,
    row_map_ptr,
    gang_ptr,
    T,
    B,
    stride_time,
    stride_batch,
    stride_m_group,
    stride_m_row,
    stride_m_column,
    reverse_groups,
    step,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PATIENCE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_READ: tl.constexpr,
    TURNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Walk every step, or by the stepwise plan one, of every sequence of a program's batch blocks.

    a_ptr           [N, G * H], overwritten by s
    v_0_ptr         [G, B, H] fp32, or None for zero
    m_ptr           [G, H, H] of any strides, in the dtype of a
    aux_ptr         [N, G * H], or None where the epilogue takes none
    row_map_ptr     int64 time_base[T], batch_base[B], lengths[B]; or None where token (t, b) is
                    in row t * stride_time + b * stride_batch and every length is T
    gang_ptr        int32 [1 + TURNS * gangs, 32] of ones; the first word turns 0 if a wait was in
                    vain, the other rows' are the counters of the gangs. None where there are none
    reverse_groups  bit g is set where group g walks from the last step to the first
    step            what a stepwise launch walks
    INTERPRETED     whether Triton's interpreter runs this, whose bf16 needs a hand
    PATIENCE        polls after which a program gives up waiting for its gang
    BLOCK_READ      hidden units of the state before that a cooperative program reads at once
    TURNS           batch blocks, one or two, that a cooperative program walks at the same time
    NUM_STAGES      steps of a resident walk that are under way at the same time: one is walked, the
                    others' numbers are on their way; 1 where numbers are loaded to registers
    """
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
    units, sequences = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(1) * BLOCK_H + units
    # A resident program's tiles take turns, column by column (resident.parts_of).
    STRIDE_K: tl.constexpr = BLOCK_H // BLOCK_K if PLAN == "resident" else 1
    TILES: tl.constexpr = STRIDE_K if PLAN == "resident" else (H + BLOCK_K - 1) // BLOCK_K
    offs_k = STRIDE_K * tl.arange(0, BLOCK_K)
    m_ptr += tl.program_id(2).to(tl.int64) * stride_m_group
    rows_h, columns_k = offs_h[:, None], offs_k[None, :]
    if PLAN == "stepwise":
        # Elsewhere M fits multiprocessors, and so do its offsets 32 bits.
        rows_h, columns_k = rows_h.to(tl.int64), columns_k.to(tl.int64)
    m_ptrs = m_ptr + (rows_h * stride_m_row + columns_k * stride_m_column)
    if PLAN == "stepwise":
        block = block_of(tl.program_id(0), units, sequences, batch, G, H)
        if step < block.longest:
            walk_step(
                step,
                batch,
                block,
                m_ptrs,
                stride_m_column,
                G,
                H,
                EPILOGUE,
                PRECISION,
                INTERPRETED,
                BLOCK_K,
            )
    else:
        mask_h = (offs_h < H)[:, None]
        tiles, tiles_small = load_weights(
            m_ptrs,
            mask_h,
            stride_m_column,
            H,
            PRECISION,
            INTERPRETED,
            BLOCK_K,
            TILES,
            STRIDE_K,
        )
        if PLAN == "resident":
            block = block_of(tl.program_id(0), units, sequences, batch, G, H)
            if NUM_STAGES > 1:
                walk_resident(
                    batch,
                    block,
                    tiles,
                    tiles_small,
                    G,
                    H,
                    EPILOGUE,
                    PRECISION,
                    INTERPRETED,
                    NUM_STAGES,
                )
            else:
                walk_resident_by_loads(
                    batch, block, tiles, tiles_small, G, H, EPILOGUE, PRECISION, INTERPRETED
                )
        else:
            walk_gang(
                batch,
                tiles,
                tiles_small,
                gang_ptr,
                G,
                H,
                EPILOGUE,
                PRECISION,
                INTERPRETED,
                PATIENCE,
                BLOCK_H,
                BLOCK_B,
                BLOCK_K,
                BLOCK_READ,
                TURNS,
            )
