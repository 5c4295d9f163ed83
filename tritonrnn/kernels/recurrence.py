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
def as_operand(x, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Turn stored numbers into what ``tl.dot`` is to see of them."""
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bf16 numbers.
        x = x.to(tl.float32)
    if PRECISION == "tf32":
        x = round_to_tf32(x)
    return x


@triton.jit
def apply_epilogue(z, aux, EPILOGUE: tl.constexpr):
    """E(z, aux), in fp32."""
    if EPILOGUE == "tanh":
        return tanh(z)
    elif EPILOGUE == "relu":
        # Not a maximum, which would lose a NaN.
        return tl.where(z < 0, 0.0, z)
    elif EPILOGUE == "tanh_grad":
        return z * (1.0 - aux * aux)
    else:
        tl.static_assert(EPILOGUE == "relu_grad")
        # Chosen, not multiplied: torch gives 0 where the unit is off, whatever z is.
        return tl.where(aux > 0, z, 0.0)


@triton.jit
def row_offset(t, row_map_ptr, stride_time, is_inside, WIDTH: tl.constexpr):
    """Elements from the start of a row-major ``[N, WIDTH]`` matrix to time step t."""
    if row_map_ptr is None:
        row = t.to(tl.int64) * stride_time
    else:
        row = tl.load(row_map_ptr + t, mask=is_inside, other=0)
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
    mask_h = offs_h < H

    if row_map_ptr is None:
        lengths = tl.where(mask_b, T, 0)
        batch_base = offs_b.to(tl.int64) * stride_batch
    else:
        batch_base = tl.load(row_map_ptr + T + offs_b, mask=mask_b, other=0)
        lengths = tl.load(row_map_ptr + T + B + offs_b, mask=mask_b, other=0).to(tl.int32)
    longest = tl.max(lengths, axis=0)
    # The time step at which a sequence joins the walk.
    joins = tl.where(is_reverse, lengths - 1, 0)

    # Offsets of column 0 of a tile's rows, and of its hidden units, in a, aux and s.
    base = batch_base * WIDTH + group * H
    tile = base[None, :] + offs_h[:, None]
    v_0_tile = (group.to(tl.int64) * B + offs_b)[None, :] * H + offs_h[:, None]

    m_ptr += group.to(tl.int64) * stride_m_group
    m_ptrs = m_ptr + offs_h[:, None].to(tl.int64) * stride_m_row + offs_k[None, :] * stride_m_column
    if PLAN == "resident":
        m = tl.load(m_ptrs, mask=mask_h[:, None] & (offs_k < H)[None, :], other=0.0)
        m = as_operand(m, PRECISION, INTERPRETED)
        state = as_operand(tl.zeros([BLOCK_H, BLOCK_B], dtype), PRECISION, INTERPRETED)

    # The pipeliner would move reads of the state above the stores that other programs wait for.
    for step in tl.range(first_step, tl.minimum(last_step, longest), num_stages=1):
        t = tl.where(is_reverse, longest - 1 - step, step)
        live = t < lengths
        first = live & (t == joins)
        mask = mask_h[:, None] & live[None, :]

        row = row_offset(t, row_map_ptr, stride_time, True, WIDTH)
        z = tl.load(a_ptr + row + tile, mask=mask, other=0.0).to(tl.float32)
        if v_0_ptr is not None:
            z += tl.load(v_0_ptr + v_0_tile, mask=mask_h[:, None] & first[None, :], other=0.0)
        aux = z
        if aux_ptr is not None:
            aux = tl.load(aux_ptr + row + tile, mask=mask, other=0.0).to(tl.float32)

        if PLAN == "resident":
            z = tl.dot(m, state, z, input_precision=PRECISION)
        else:
            t_before = tl.where(is_reverse, t + 1, t - 1)
            row_before = row_offset(t_before, row_map_ptr, stride_time, step > 0, WIDTH)
            walking = (live & (t != joins))[None, :]
            for k in tl.range(0, H, BLOCK_K):
                mask_k = k + offs_k < H
                m = tl.load(
                    m_ptrs + k * stride_m_column, mask=mask_h[:, None] & mask_k[None, :], other=0.0
                )
                state = tl.load(
                    a_ptr + row_before + base[None, :] + (k + offs_k)[:, None],
                    mask=mask_k[:, None] & walking,
                    other=0.0,
                )
                z = tl.dot(
                    as_operand(m, PRECISION, INTERPRETED),
                    as_operand(state, PRECISION, INTERPRETED),
                    z,
                    input_precision=PRECISION,
                )

        s = tl.where(live[None, :], apply_epilogue(z, aux, EPILOGUE), 0.0)
        s = narrow(s, dtype, INTERPRETED)
        tl.store(a_ptr + row + tile, s, mask=mask)
        if PLAN == "resident":
            state = as_operand(s, PRECISION, INTERPRETED)
