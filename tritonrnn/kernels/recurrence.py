"""One recurrence kernel for every pass, direction, layout and plan.

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
                  whole walk; a program waits for nobody.
    cooperative   BLOCK_H does not. A program's BLOCK_H rows of M stay in shared memory for the
                  whole walk, in tiles of BLOCK_K columns; the state goes from step to step through
                  ``a``, and a program waits until all that share its sequences have stored the
                  step before (``gang.py``). A gang walks its batch blocks one after the other.
    stepwise      A launch walks one step. M and the previous state, which other programs wrote in
                  the launch before, come from global memory in tiles of BLOCK_K.

A step of a sequence that has not yet joined, or has ended, is dead: it loads nothing, stores
nothing, and its state is a true zero, chosen and never multiplied, so that a NaN stays in its own
sequence. Row offsets are 64-bit: rows times hidden units passes 2³¹ in real use.
"""

import triton
import triton.language as tl

from tritonrnn.kernels.arithmetic import apply_epilogue, multiply_add, narrow, operands, prepare_aux
from tritonrnn.kernels.gang import publish, wait


@triton.jit
def time_at(step, longest, is_reverse):
    """Give the time step that is walked as number ``step``: outside [0, T) before and after."""
    return tl.where(is_reverse, longest - 1 - step, step)


@triton.jit
def row_offset_at(step, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH: tl.constexpr):
    """Give the offset of time step ``time_at(step)`` in a row-major ``[N, WIDTH]`` matrix."""
    t = time_at(step, longest, is_reverse)
    if row_map_ptr is None:
        row = t.to(tl.int64) * stride_time
    else:
        row = tl.load(row_map_ptr + t, mask=(step >= 0) & (step < stop), other=0)
    return row * WIDTH


@triton.jit
def load_weights(
    m_ptrs,
    mask_h,
    stride_m_column,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load a program's rows of M for the whole walk: tuples of tiles, and of their small parts."""
    offs_k = tl.arange(0, BLOCK_K)
    tiles = ()
    tiles_small = ()
    for k in tl.static_range(0, H, BLOCK_K):
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
def prepare_step(
    step,
    a,
    aux,
    s,
    v_0,
    lengths,
    joins,
    longest,
    is_reverse,
    aux_ptr,
    v_0_ptr,
    row_map_ptr,
    EPILOGUE: tl.constexpr,
):
    """Turn the numbers loaded for a step into what its product starts from and its epilogue takes.

    They are filled up from the state where a sequence is dead, whose number does not count: a value
    that meets the state is carried in the accumulator's layout, so that the product need not wait
    for a change of layouts.
    """
    t = time_at(step, longest, is_reverse)
    live = (t < lengths)[None, :]
    drive = tl.where(live, a, s).to(tl.float32)
    if v_0_ptr is not None and row_map_ptr is not None:
        # Where every sequence has all T tokens, none joins later than the first step.
        drive = tl.where((t == joins)[None, :], drive + v_0, drive)
    prepared = drive
    if aux_ptr is not None:
        prepared = prepare_aux(tl.where(live, aux, s), EPILOGUE)
    return drive, prepared


@triton.jit
def walk(
    block,
    tiles,
    tiles_small,
    m_ptrs,
    counter_ptr,
    target,
    patience,
    a_ptr,
    v_0_ptr,
    aux_ptr,
    row_map_ptr,
    T,
    B,
    stride_time,
    stride_batch,
    stride_m_column,
    reverse_groups,
    first_step,
    last_step,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_READ: tl.constexpr,
):
    """Walk one batch block; the arguments are the kernel's and what it holds for all blocks.

    Gives what the counter of the gang will be once all of it have walked the block, and the
    patience left.
    """
    WIDTH: tl.constexpr = G * H
    GANG: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    # Steps from the load of the drive to its use. A wait is between them in the cooperative plan,
    # which has no registers to spare.
    AHEAD: tl.constexpr = 1 if PLAN == "cooperative" else 2
    dtype: tl.constexpr = a_ptr.dtype.element_ty

    group = tl.program_id(2)
    is_reverse = ((reverse_groups >> group) & 1) != 0
    offs_b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    mask_b = offs_b < B
    mask_h = (offs_h < H)[:, None]

    if row_map_ptr is None:
        lengths = tl.where(mask_b, T, 0)
        batch_base = offs_b.to(tl.int64) * stride_batch
    else:
        batch_base = tl.load(row_map_ptr + T + offs_b, mask=mask_b, other=0)
        lengths = tl.load(row_map_ptr + T + B + offs_b, mask=mask_b, other=0).to(tl.int32)
    longest = tl.max(lengths, axis=0)
    stop = tl.minimum(last_step, longest)
    # The time step at which a sequence joins the walk.
    joins = tl.where(is_reverse, lengths - 1, 0)

    # Offsets of the program's tile from column 0 of a time step's row, in a, aux and s.
    base = (batch_base * WIDTH + group * H)[None, :]
    tile = base + offs_h[:, None]
    s = tl.zeros([BLOCK_H, BLOCK_B], dtype)

    # The first two steps' drive is fetched before the walk, every other one two steps ahead of its
    # use, and a time step's row a step before that.
    row_before = tl.zeros([], tl.int64)
    row = row_offset_at(first_step, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH)
    row_1 = row_offset_at(
        first_step + 1, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH
    )
    row_2 = row_offset_at(
        first_step + 2, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH
    )
    if PLAN == "stepwise":
        row_before = row_offset_at(
            first_step - 1, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH
        )

    t = time_at(first_step, longest, is_reverse)
    mask = mask_h & ((t < lengths) & (first_step < stop))[None, :]
    drive = tl.load(a_ptr + row + tile, mask=mask, other=0.0).to(tl.float32)
    v_0 = 0.0
    if v_0_ptr is not None:
        v_0_tile = (group.to(tl.int64) * B + offs_b)[None, :] * H + offs_h[:, None]
        v_0 = tl.load(v_0_ptr + v_0_tile, mask=mask_h & mask_b[None, :], other=0.0)
        drive += tl.where((t == joins)[None, :], v_0, 0.0)
    aux = drive
    if aux_ptr is not None:
        aux = prepare_aux(tl.load(aux_ptr + row + tile, mask=mask, other=0.0), EPILOGUE)

    t_1 = time_at(first_step + 1, longest, is_reverse)
    mask_1 = mask_h & ((t_1 < lengths) & (first_step + 1 < stop))[None, :]
    a_1 = tl.load(a_ptr + row_1 + tile, mask=mask_1, other=0.0)
    aux_1 = a_1
    if aux_ptr is not None:
        aux_1 = tl.load(aux_ptr + row_1 + tile, mask=mask_1, other=0.0)

    # The pipeliner would move reads of the state above the stores that other programs wait for.
    # And LLVM would hoist the descriptor of every matrix instruction out of the loop, two registers
    # each, where a cooperative program has a hundred of them: 255 registers and spills become 128.
    for step in tl.range(first_step, stop, num_stages=1, disable_licm=PLAN == "cooperative"):
        row_3 = row_offset_at(step + 3, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH)
        row_ahead = row_2
        if AHEAD == 1:
            row_ahead = row_1
        t_2 = time_at(step + AHEAD, longest, is_reverse)
        mask_2 = mask_h & ((t_2 < lengths) & (step + AHEAD < stop))[None, :]
        a_2 = tl.load(a_ptr + row_ahead + tile, mask=mask_2, other=0.0)
        aux_2 = a_2
        if aux_ptr is not None:
            aux_2 = tl.load(aux_ptr + row_ahead + tile, mask=mask_2, other=0.0)

        t = time_at(step, longest, is_reverse)
        live = (t < lengths)[None, :]
        walking = live & (t != joins)[None, :]
        z = drive
        if PLAN == "resident":
            state, state_small = operands(s, PRECISION, INTERPRETED)
            z = multiply_add(tiles[0], tiles_small[0], state, state_small, z, PRECISION)
            # The store of the step before waits in the shadow of the product.
            t_before = time_at(step - 1, longest, is_reverse)
            was_live = ((t_before < lengths) & (step > first_step))[None, :]
            tl.store(a_ptr + row_before + tile, s, mask=mask_h & was_live)
        elif PLAN == "cooperative":
            patience = wait(counter_ptr, target, patience, INTERPRETED)
            target += GANG
            # One address and constant distances from it: an address a tile costs registers.
            state_ptrs = a_ptr + row_before + base + offs_k[:, None]
            # As many reads at once as shared memory has room for: each takes a round trip to L2.
            for first in tl.static_range(0, H, BLOCK_READ):
                states = ()
                for k in tl.static_range(first, first + BLOCK_READ, BLOCK_K):
                    if k < H:
                        mask_state = walking
                        if k + BLOCK_K > H:
                            mask_state = (k + offs_k < H)[:, None] & walking
                        state = tl.load(
                            state_ptrs + k, mask=mask_state, other=0.0, cache_modifier=".cg"
                        )
                        states = states + (state,)  # type: ignore[assignment]  # noqa: RUF005
                for k in tl.static_range(first, first + BLOCK_READ, BLOCK_K):
                    if k < H:
                        state = states[(k - first) // BLOCK_K]
                        state, state_small = operands(state, PRECISION, INTERPRETED)
                        m, m_small = tiles[k // BLOCK_K], tiles_small[k // BLOCK_K]
                        z = multiply_add(m, m_small, state, state_small, z, PRECISION)
        else:
            for k in tl.range(0, H, BLOCK_K, disable_licm=True):
                mask_k = k + offs_k < H
                m = tl.load(m_ptrs + k * stride_m_column, mask=mask_h & mask_k[None, :], other=0.0)
                state = tl.load(
                    a_ptr + row_before + base + (k + offs_k)[:, None],
                    mask=mask_k[:, None] & walking,
                    other=0.0,
                )
                m, m_small = operands(m, PRECISION, INTERPRETED)
                state, state_small = operands(state, PRECISION, INTERPRETED)
                z = multiply_add(m, m_small, state, state_small, z, PRECISION)

        aux_now = aux
        if PLAN != "cooperative":
            drive, aux = prepare_step(
                step + 1,
                a_1,
                aux_1,
                s,
                v_0,
                lengths,
                joins,
                longest,
                is_reverse,
                aux_ptr,
                v_0_ptr,
                row_map_ptr,
                EPILOGUE,
            )

        s = tl.where(live, apply_epilogue(z, aux_now, EPILOGUE), 0.0)
        s = narrow(s, dtype, INTERPRETED)
        if PLAN != "resident":
            tl.store(a_ptr + row + tile, s, mask=mask_h & live)
        if PLAN == "cooperative":
            publish(counter_ptr)
            # Here, while the others' slices are on their way.
            drive, aux = prepare_step(
                step + 1,
                a_2,
                aux_2,
                s,
                v_0,
                lengths,
                joins,
                longest,
                is_reverse,
                aux_ptr,
                v_0_ptr,
                row_map_ptr,
                EPILOGUE,
            )

        row_before = row
        row = row_1
        row_1 = row_2
        row_2 = row_3
        a_1 = a_2
        aux_1 = aux_2

    if PLAN == "resident":
        t = time_at(stop - 1, longest, is_reverse)
        was_live = ((t >= 0) & (t < lengths) & (first_step < stop))[None, :]
        tl.store(a_ptr + row_before + tile, s, mask=mask_h & was_live)
    return target, patience


@triton.jit(
    do_not_specialize=[
        "T",
        "B",
        "stride_time",
        "stride_batch",
        "reverse_groups",
        "first_step",
        "last_step",
    ]
)
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
    first_step,
    last_step,
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
):
    """Walk steps ``[first_step, last_step)`` of every sequence of a program's batch blocks.

    a_ptr           [N, G * H], overwritten by s
    v_0_ptr         [G, B, H] fp32, or None for zero
    m_ptr           [G, H, H] of any strides, in the dtype of a
    aux_ptr         [N, G * H], or None where the epilogue takes none
    row_map_ptr     int64 time_base[T], batch_base[B], lengths[B]; or None where token (t, b) is
                    in row t * stride_time + b * stride_batch and every length is T
    gang_ptr        int32 [1 + gangs, 32] of ones; row 0 turns 0 if a wait was in vain, the others
                    are the counters of the gangs. None where there are no gangs
    reverse_groups  bit g is set where group g walks from the last step to the first
    INTERPRETED     whether Triton's interpreter runs this, whose bf16 needs a hand
    BLOCK_READ      hidden units of the state before that a cooperative program reads at once
    PATIENCE        polls after which a program gives up waiting for its gang
    """
    group = tl.program_id(2)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    mask_h = (offs_h < H)[:, None]
    m_ptr += group.to(tl.int64) * stride_m_group
    rows_h = offs_h[:, None]
    if PLAN == "stepwise":
        # Elsewhere M fits multiprocessors, and so do its offsets 32 bits.
        rows_h = rows_h.to(tl.int64)
    m_ptrs = m_ptr + (rows_h * stride_m_row + offs_k[None, :] * stride_m_column)
    tiles = ()
    tiles_small = ()
    if PLAN != "stepwise":
        tiles, tiles_small = load_weights(
            m_ptrs, mask_h, stride_m_column, H, PRECISION, INTERPRETED, BLOCK_K
        )

    # Batch blocks that this program walks, one after the other.
    lane, lanes = tl.program_id(0), tl.num_programs(0)
    blocks = 1
    counter_ptr = gang_ptr
    if PLAN == "cooperative":
        blocks = tl.cdiv(tl.cdiv(B, BLOCK_B) - lane, lanes)
        # Counters 128 bytes apart, so that no two gangs meet in one cache line.
        counter_ptr += 32 * (1 + group * lanes + lane)
    target = 1
    patience = PATIENCE
    for i in tl.range(0, blocks, num_stages=1):
        target, patience = walk(
            lane + i * lanes,
            tiles,
            tiles_small,
            m_ptrs,
            counter_ptr,
            target,
            patience,
            a_ptr,
            v_0_ptr,
            aux_ptr,
            row_map_ptr,
            T,
            B,
            stride_time,
            stride_batch,
            stride_m_column,
            reverse_groups,
            first_step,
            last_step,
            G,
            H,
            EPILOGUE,
            PLAN,
            PRECISION,
            INTERPRETED,
            BLOCK_H,
            BLOCK_B,
            BLOCK_K,
            BLOCK_READ,
        )
    if PLAN == "cooperative":
        # By every thread, for each has polled for itself.
        in_time_ptrs = gang_ptr + tl.zeros([BLOCK_H, BLOCK_B], tl.int32)
        tl.store(in_time_ptrs, 0, mask=patience == 0)
