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

    resident    BLOCK_H covers H. M stays in shared memory and the state in registers for the
                whole walk; a program waits for nobody.
    stepwise    A launch walks one step. M and the previous state, which other programs wrote in
                the launch before, come from global memory in tiles of BLOCK_K.

A step of a sequence that has not yet joined, or has ended, is dead: it loads nothing, stores
nothing, and its state is a true zero, chosen and never multiplied, so that a NaN stays in its own
sequence. Row offsets are 64-bit: rows times hidden units passes 2³¹ in real use.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Give tanh of an fp32 tile: odd, exact in the limit at 0, 1 far out, NaN for NaN."""
    # Below 5/8 the exponential form cancels; an odd minimax polynomial (Cephes tanhf) does not.
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    # exp(2 |x|) may overflow to inf, and 1 - 2 / inf is the right answer.
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(magnitude < 0.625, near, far)


@triton.jit
def round_to_tf32(x):
    """Round an fp32 tile to TF32's 10 fraction bits, ties away from zero, as ``cvt.rna.tf32``.

    ``tl.dot`` truncates what it is given, which doubles the error and biases it.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # The carry out of a NaN's fraction would turn it into a number.
    return tl.where(x == x, rounded, x)


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round an fp32 tile to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter truncates instead, which is exact for a number of 8 bits.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def operands(x, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Turn stored numbers into what ``tl.dot`` is to see of them: a large and a small part.

    Only products of fp32 accuracy have use for the small part. There the two are TF32 numbers
    whose sum keeps 22 bits of x.
    """
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bf16 numbers.
        x = x.to(tl.float32)
    large = x
    small = x
    if PRECISION != "ieee":
        large = round_to_tf32(x)
    if PRECISION == "tf32x3":
        # Infinity less infinity is not the 0 that is meant.
        small = tl.where(x == large, 0.0, round_to_tf32(x - large))
    return large, small


@triton.jit
def multiply_add(m, m_small, s, s_small, z, PRECISION: tl.constexpr):
    """Give ``m s + z`` of parts that :func:`operands` made, the smallest products first."""
    if PRECISION == "tf32x3":
        z = tl.dot(m_small, s, z, input_precision="tf32")
        z = tl.dot(m, s_small, z, input_precision="tf32")
    return tl.dot(m, s, z, input_precision="tf32" if PRECISION != "ieee" else "ieee")


@triton.jit
def apply_epilogue(z, aux, EPILOGUE: tl.constexpr):
    """E(z, aux), in fp32, of what :func:`prepare_aux` made of aux."""
    if EPILOGUE == "tanh":
        return tanh(z)
    elif EPILOGUE == "relu":
        # Not a maximum, which would lose a NaN.
        return tl.where(z < 0, 0.0, z)
    elif EPILOGUE == "tanh_grad":
        return z * aux
    else:
        tl.static_assert(EPILOGUE == "relu_grad")
        # Chosen, not multiplied: torch gives 0 where the unit is off, whatever z is.
        return tl.where(aux > 0, z, 0.0)


@triton.jit
def prepare_aux(aux, EPILOGUE: tl.constexpr):
    """What of the epilogue can be computed before z is known."""
    aux = aux.to(tl.float32)
    if EPILOGUE == "tanh_grad":
        aux = 1.0 - aux * aux
    return aux


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
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Walk steps ``[first_step, last_step)`` of every sequence of a batch block.

    a_ptr           [N, G * H], overwritten by s
    v_0_ptr         [G, B, H] fp32, or None for zero
    m_ptr           [G, H, H] of any strides, in the dtype of a
    aux_ptr         [N, G * H], or None where the epilogue takes none
    row_map_ptr     int64 time_base[T], batch_base[B], lengths[B]; or None where token (t, b) is
                    in row t * stride_time + b * stride_batch and every length is T
    reverse_groups  bit g is set where group g walks from the last step to the first
    INTERPRETED     whether Triton's interpreter runs this, whose bf16 needs a hand
    """
    WIDTH: tl.constexpr = G * H
    dtype: tl.constexpr = a_ptr.dtype.element_ty

    group = tl.program_id(2)
    is_reverse = ((reverse_groups >> group) & 1) != 0
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
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

    m_ptr += group.to(tl.int64) * stride_m_group
    m_ptrs = m_ptr + offs_h[:, None].to(tl.int64) * stride_m_row + offs_k[None, :] * stride_m_column
    if PLAN == "resident":
        m = tl.load(m_ptrs, mask=mask_h & (offs_k < H)[None, :], other=0.0)
        m, m_small = operands(m, PRECISION, INTERPRETED)
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
    if PLAN != "resident":
        row_before = row_offset_at(
            first_step - 1, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH
        )

    t = time_at(first_step, longest, is_reverse)
    mask = mask_h & ((t < lengths) & (first_step < stop))[None, :]
    drive = tl.load(a_ptr + row + tile, mask=mask, other=0.0).to(tl.float32)
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
    for step in tl.range(first_step, stop, num_stages=1):
        row_3 = row_offset_at(step + 3, stop, longest, is_reverse, row_map_ptr, stride_time, WIDTH)
        t_2 = time_at(step + 2, longest, is_reverse)
        mask_2 = mask_h & ((t_2 < lengths) & (step + 2 < stop))[None, :]
        a_2 = tl.load(a_ptr + row_2 + tile, mask=mask_2, other=0.0)
        aux_2 = a_2
        if aux_ptr is not None:
            aux_2 = tl.load(aux_ptr + row_2 + tile, mask=mask_2, other=0.0)

        t = time_at(step, longest, is_reverse)
        live = (t < lengths)[None, :]
        if PLAN == "resident":
            state, state_small = operands(s, PRECISION, INTERPRETED)
            z = multiply_add(m, m_small, state, state_small, drive, PRECISION)
            # The store of the step before waits in the shadow of the product.
            t_before = time_at(step - 1, longest, is_reverse)
            was_live = ((t_before < lengths) & (step > first_step))[None, :]
            tl.store(a_ptr + row_before + tile, s, mask=mask_h & was_live)
        else:
            z = drive
            walking = live & (t != joins)[None, :]
            for k in tl.range(0, H, BLOCK_K):
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

        # The next step's drive is filled up from the state where a sequence is dead, whose number
        # does not count: a value that meets the state is carried in the accumulator's layout, so
        # that the product need not wait for a change of layouts.
        t_1 = time_at(step + 1, longest, is_reverse)
        live_1 = (t_1 < lengths)[None, :]
        drive = tl.where(live_1, a_1, s).to(tl.float32)
        if v_0_ptr is not None and row_map_ptr is not None:
            # Where every sequence has all T tokens, none joins later than the first step.
            drive = tl.where((t_1 == joins)[None, :], drive + v_0, drive)
        aux_now = aux
        aux = drive
        if aux_ptr is not None:
            aux = prepare_aux(tl.where(live_1, aux_1, s), EPILOGUE)

        s = tl.where(live, apply_epilogue(z, aux_now, EPILOGUE), 0.0)
        s = narrow(s, dtype, INTERPRETED)
        if PLAN != "resident":
            tl.store(a_ptr + row + tile, s, mask=mask_h & live)

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
