"""What all kernels share: a program's tile, its loads and stores, its arithmetic.

    s_t = E(a_t + v_t, aux_t)      v_t = M s_{t-1},  v_0 given at a sequence's own first step

              a          v_0          M         aux     E(z)
    forward   drive      h_0 W_hhᵀ    W_hh      -       tanh z, relu z
    backward  d output   d h_n        W_hhᵀ     output  z (1 - y²), z [y > 0]

A program owns BLOCK_H hidden units of BLOCK_B sequences of one group. Hidden units are on the M
side of the product,

    v[BLOCK_H, BLOCK_B] = M[BLOCK_H, H] s[H, BLOCK_B],

because Hopper's MMA (``wgmma``) takes 64 rows or more there, and as few as 8 columns. Sequences are
columns, so that a NaN stays in its own. The state may overwrite ``a``: only the program that owns a
slice of a row of ``a`` reads it, before it stores the state there.

A sequence is live in a step between its own first and its own last one. A dead sequence loads and
stores nothing. Before its first step its state is a true zero, chosen and never multiplied; after
its last step nobody reads its state. Row offsets have 64 bits: rows times hidden units exceeds 2³¹
in real use.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

# The runtime integers of a kernel's entry. Triton would compile anew for a T or B of 1 or of a
# multiple of 16.
# A column stride of 1 is to be known, though: rows of M are loaded by vectors.
UNSPECIALIZED = ["T", "B", "stride_time", "stride_batch", "reverse_groups"]


@dataclass(frozen=True)
class Constants:
    """What every kernel is compiled for. A kernel that needs more derives a class from it.

    G               groups
    H               hidden units of a group
    EPILOGUE        E: tanh, tanh_approx, relu, tanh_grad or relu_grad
    PRECISION       of products: ieee (as the operands are), tf32, or tf32x3, of fp32 accuracy
    INTERPRETED     whether Triton's interpreter runs this, whose bf16 needs a hand
    BLOCK_H         hidden units of a program
    BLOCK_B         sequences of a program
    """

    G: int
    H: int
    EPILOGUE: str
    PRECISION: str
    INTERPRETED: bool
    BLOCK_H: int
    BLOCK_B: int

    @property
    def WIDTH(self) -> int:
        """Return the elements of a row."""
        return self.G * self.H


class Batch(NamedTuple):
    """The arguments that every kernel has.

    a_ptr           [N, G * H]
    s_ptr           [N, G * H], overwritten by s; may be a_ptr
    v_0_ptr         [G, B, H], fp32 or as a, or None for zero
    aux_ptr         [N, G * H], or None where the epilogue takes none
    ends_ptr        [G, B, H], overwritten by the s that each sequence's walk ends with, or None
    time_base_ptr   int64 [T], or None where it is t * stride_time
    batch_base_ptr  int64 [B], or None where it is b * stride_batch
    lengths_ptr     int64 [B], or None where every length is T
    reverse_groups  bit g is set where group g walks from the last step to the first

    Token (t, b) is in row time_base[t] + batch_base[b]. If lengths are all that is given, each
    sequence has T rows, and those after its end become 0.
    """

    a_ptr: Any
    s_ptr: Any
    v_0_ptr: Any
    aux_ptr: Any
    ends_ptr: Any
    time_base_ptr: Any
    batch_base_ptr: Any
    lengths_ptr: Any
    T: Any
    B: Any
    stride_time: Any
    stride_batch: Any
    reverse_groups: Any


class Block(NamedTuple):
    """A program's tile of one batch block: what is the same in every step.

    is_reverse  whether the walk goes from the last time step to the first
    lengths     tokens of each sequence, 0 where there is no sequence
    num_steps   the largest of them: steps of the walk
    start_time  time step at which the walk of each sequence begins
    base        offset of each sequence from a time step's row, to the group's first hidden unit
    offs_tile   offset of each element of the tile from a time step's row
    mask_h      which hidden units exist
    v_0         v at each sequence's first step, or 0.0
    """

    is_reverse: Any
    lengths: Any
    num_steps: Any
    start_time: Any
    base: Any
    offs_tile: Any
    mask_h: Any
    v_0: Any


class Operand(NamedTuple):
    """One side of a product: its TF32 part, and what that leaves; see :func:`split_tf32`.

    Of M, tuples of tiles.
    """

    large: Any
    small: Any


@triton.jit
def make_block(index, range_h, range_b, batch, C: tl.constexpr):
    """Return the program's tile of a batch block, an empty one past the last block.

    range_h, range_b
        0 to BLOCK_H and to BLOCK_B; in a Gluon kernel, in the layouts that the tile is to have
    """
    G: tl.constexpr = C.G
    H: tl.constexpr = C.H
    group = tl.program_id(2)
    offs_h = tl.program_id(1) * C.BLOCK_H + range_h
    offs_b = index * C.BLOCK_B + range_b
    mask_b = offs_b < batch.B
    mask_h = (offs_h < H)[:, None]
    if batch.batch_base_ptr is None:
        batch_base = offs_b.to(tl.int64) * batch.stride_batch
    else:
        batch_base = tl.load(batch.batch_base_ptr + offs_b, mask=mask_b, other=0)
    if batch.lengths_ptr is None:
        lengths = tl.where(mask_b, batch.T, 0)
    else:
        lengths = tl.load(batch.lengths_ptr + offs_b, mask=mask_b, other=0).to(tl.int32)
    is_reverse = ((batch.reverse_groups >> group) & 1) != 0
    base = (batch_base * G * H + group * H)[None, :]
    v_0 = 0.0
    if batch.v_0_ptr is not None:
        v_0_ptrs = batch.v_0_ptr + sequence_tile(index, range_h, range_b, batch, C)
        v_0 = tl.load(v_0_ptrs, mask=mask_h & mask_b[None, :], other=0.0).to(tl.float32)
    return Block(
        is_reverse=is_reverse,
        lengths=lengths,
        num_steps=tl.max(lengths, axis=0),
        start_time=tl.where(is_reverse, lengths - 1, 0),
        base=base,
        offs_tile=base + offs_h[:, None],
        mask_h=mask_h,
        v_0=v_0,
    )


@triton.jit
def sequence_tile(index, range_h, range_b, batch, C: tl.constexpr):
    """Return the offset of each element of a batch block's tile in a tensor [G, B, H]."""
    offs_h = tl.program_id(1) * C.BLOCK_H + range_h
    offs_b = index * C.BLOCK_B + range_b
    first = tl.program_id(2).to(tl.int64) * batch.B
    return (first + offs_b)[None, :] * C.H + offs_h[:, None]


@triton.jit
def time_at(step, block):
    """Return the time step that a step of the walk is; outside of the walk, any."""
    return tl.where(block.is_reverse, block.num_steps - 1 - step, step)


@triton.jit
def in_walk(step, block):
    """Return whether the walk has this step."""
    return (step >= 0) & (step < block.num_steps)


@triton.jit
def row_index(step, batch, block):
    """Return the row of a step; outside of the walk, any."""
    t = time_at(step, block)
    if batch.time_base_ptr is None:
        return t.to(tl.int64) * batch.stride_time
    else:
        return tl.load(batch.time_base_ptr + t, mask=in_walk(step, block), other=0)


@triton.jit
def row_offset(step, batch, block, C: tl.constexpr):
    """Return the offset of a step's row; outside of the walk, of any row."""
    return row_index(step, batch, block) * C.WIDTH


@triton.jit
def is_live(step, block):
    """Return which sequences have a token in a step of the walk, [1, BLOCK_B]."""
    return (time_at(step, block) < block.lengths)[None, :]


@triton.jit
def is_first(step, block):
    """Return which sequences begin in this step, [1, BLOCK_B]."""
    return (time_at(step, block) == block.start_time)[None, :]


@triton.jit
def has_previous(step, block):
    """Return which sequences are live in this step and in the one before, [1, BLOCK_B]."""
    t = time_at(step, block)
    return ((t < block.lengths) & (t != block.start_time))[None, :]


@triton.jit
def tile_mask(step, block):
    """Return which elements the tile has in a step, of the walk or not."""
    live = (time_at(step, block) < block.lengths) & in_walk(step, block)
    return block.mask_h & live[None, :]


@triton.jit
def load_step(step, row, batch, block):
    """Load a and aux of a step to registers; a twice where there is no aux."""
    mask = tile_mask(step, block)
    a = tl.load(batch.a_ptr + row + block.offs_tile, mask=mask, other=0.0)
    aux = a
    if batch.aux_ptr is not None:
        aux = tl.load(batch.aux_ptr + row + block.offs_tile, mask=mask, other=0.0)
    return a, aux


@triton.jit
def convert_layout_like(s, x, step, block):
    """Return a loaded tile in the layout of a state.

    Dead sequences take the state's values, which nobody uses. The choice is what matters: Triton
    keeps its result in the layout of the state, which is the product's, and so converts x here.
    """
    return tl.where(is_live(step, block), x, s)


@triton.jit
def prepare_step(step, a, aux, batch, block, C: tl.constexpr, MAY_BEGIN: tl.constexpr):
    """Return the accumulator that a step's product starts from, and what its epilogue takes.

    MAY_BEGIN   whether a sequence may begin in this step; v_0 is added where it does
    """
    drive = a.to(tl.float32)
    if batch.v_0_ptr is not None and MAY_BEGIN:
        # A choice, not a sum with v_0 or 0: Triton would make the sum in the layout of v_0, and
        # change the layout of the drive twice, with two to four barriers more.
        drive = tl.where(is_first(step, block), drive + block.v_0, drive)
    prepared = drive
    if batch.aux_ptr is not None:
        prepared = prepare_aux(aux, C)
    return drive, prepared


@triton.jit
def load_and_prepare_step(step, row, batch, block, C: tl.constexpr):
    """Load a step and prepare it at once."""
    a, aux = load_step(step, row, batch, block)
    # A sum, also where v_0 is 0.0: the sum is fp32, so Triton carries fp32 to the next iteration.
    # Without it Triton would carry the dtype of a, and widen it right before the product.
    drive = a.to(tl.float32) + tl.where(is_first(step, block), block.v_0, 0.0)
    prepared = drive
    if batch.aux_ptr is not None:
        prepared = prepare_aux(aux, C)
    return drive, prepared


@triton.jit
def zero_padding(z, block, C: tl.constexpr):
    """Return z with zeros in the hidden units that do not exist, where it may have other values.

    M is 0 there. Times a state that has overflowed to infinity that is NaN, which the next product
    would spread. States of tanh don't overflow, and relu_grad chooses 0 by an aux of 0.
    """
    if C.H < C.BLOCK_H and (C.EPILOGUE == "relu" or C.EPILOGUE == "tanh_grad"):
        z = tl.where(block.mask_h, z, 0.0)
    return z


@triton.jit
def compute_state(step, z, aux, batch, block, C: tl.constexpr):
    """Return the state of a step from its pre-activation, in the dtype of a."""
    if batch.lengths_ptr is not None:
        # A sequence that begins in the next step multiplies this state. Chosen before the epilogue,
        # while z is fp32: a choice between halves of registers takes three times the instructions.
        # Where every sequence has all T tokens, nobody sees a dead state.
        z = tl.where(is_live(step, block), z, 0.0)
    s = apply_epilogue(z, aux, C)
    return downcast(s, batch.a_ptr.dtype.element_ty, C)


@triton.jit
def store_step(step, row, s, batch, block):
    """Store the state of a step of the walk."""
    tl.store(batch.s_ptr + row + block.offs_tile, s, mask=block.mask_h & is_live(step, block))


@triton.jit
def clear_padding(index, range_b, block, batch, C: tl.constexpr):
    """Store 0 in the rows of a padded batch that are after a sequence's end.

    No step of the walk reads or stores them.
    """
    if (
        batch.time_base_ptr is None
        and batch.batch_base_ptr is None
        and batch.lengths_ptr is not None
    ):
        mask_b = index * C.BLOCK_B + range_b < batch.B
        first = tl.min(tl.where(mask_b, block.lengths, batch.T), axis=0)
        for t in tl.range(first, batch.T, num_stages=1):
            row = tl.cast(t, tl.int64) * batch.stride_time * C.WIDTH
            mask = block.mask_h & ((t >= block.lengths) & mask_b)[None, :]
            tl.store(batch.s_ptr + row + block.offs_tile, 0.0, mask=mask)


@triton.jit
def store_ends(index, range_h, range_b, block, batch, C: tl.constexpr):
    """Store the state that the walk of each sequence has ended with.

    Where a sequence has no token, the gradient is 0; its last state is left to the caller.
    """
    if batch.ends_ptr is not None:
        # Other threads may have stored what this one loads.
        tl.debug_barrier()
        t = tl.where(block.is_reverse, 0, block.lengths - 1)
        has_token = block.lengths > 0
        if batch.time_base_ptr is None:
            row = t.to(tl.int64) * batch.stride_time
        else:
            row = tl.load(batch.time_base_ptr + t, mask=has_token, other=0)
        mask = block.mask_h & has_token[None, :]
        s_ptrs = batch.s_ptr + (row * C.WIDTH)[None, :] + block.offs_tile
        s = tl.load(s_ptrs, mask=mask, other=0.0)
        if batch.aux_ptr is not None:
            mask = block.mask_h & (index * C.BLOCK_B + range_b < batch.B)[None, :]
        tl.store(batch.ends_ptr + sequence_tile(index, range_h, range_b, batch, C), s, mask=mask)


@triton.jit
def load_weights(m_ptrs, mask_h, stride_m_column, C: tl.constexpr):
    """Load a program's rows of M for the whole walk: an operand of C.NUM_TILES tiles.

    Tiles of BLOCK_K consecutive columns or, where C.STRIDE_K > 1, of every STRIDE_K-th column. (Of
    the plans that keep M, whose constants have these three.)
    """
    NUM_TILES: tl.constexpr = C.NUM_TILES
    offs_k = C.STRIDE_K * tl.arange(0, C.BLOCK_K)
    large = ()
    small = ()
    for i in tl.static_range(NUM_TILES):
        k = i if C.STRIDE_K > 1 else i * C.BLOCK_K
        mask = mask_h & (k + offs_k < C.H)[None, :]
        m = tl.load(m_ptrs + k * stride_m_column, mask=mask, other=0.0)
        tile = split_tf32(m, C)
        # Triton knows no starred expressions.
        large = large + (tile.large,)  # type: ignore[assignment]  # noqa: RUF005
        small = small + (tile.small,)  # type: ignore[assignment]  # noqa: RUF005
        # One tile after the other, lest the elements of all of them be in registers at once.
        tl.debug_barrier()
    # Not a tuple of operands: Triton 3.6 forgets the fields of a named tuple in a tuple.
    return Operand(large=large, small=small)


@triton.jit
def split_tf32(x, C: tl.constexpr):
    """Turn stored values into an operand of :func:`dot_acc`.

    In 16 bits it is x itself, for products of TF32 it is rounded; neither uses the small part. For
    products of fp32 accuracy it is split in two TF32 parts, whose sum keeps 22 bits of x. (There a
    state that relu lets overflow to infinity gives NaN in the next step, where infinities of one
    sign might have been left: infinity times a small part.)
    """
    if C.INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bf16 values.
        x = x.to(tl.float32)
    large = x
    small = x
    if C.PRECISION != "ieee":
        large = round_to_tf32(x)
    if C.PRECISION == "tf32x3":
        # Infinity less infinity is not the 0 that is meant.
        small = tl.where(x == large, 0.0, round_to_tf32(x - large))
    return Operand(large=large, small=small)


@triton.jit
def dot_acc(m, s, z, C: tl.constexpr):
    """Return ``m s + z`` of two operands.

    A tensor core truncates the sum of each instruction (Fasi et al., Numerical behavior of NVIDIA
    tensor cores, 2021) by up to a unit in the last place of what it has added up, and a product is
    many instructions. So products of fp32 accuracy begin with the smallest, from zero, and are
    narrow: 16 or 32 columns. They are added in fp32. Where they are many, they are added to each
    other first, and to the drive last: their sum is smaller than the drive, and so are its
    roundings.
    """
    if C.PRECISION == "tf32x3":
        product = tl.dot(m.small, s.large, input_precision="tf32")
        product = tl.dot(m.large, s.small, product, input_precision="tf32")
        return z + tl.dot(m.large, s.large, product, input_precision="tf32")
    else:
        return tl.dot(m.large, s.large, z, input_precision=C.PRECISION)


@triton.jit
def dot_tile(tiles, i: tl.constexpr, s, z, C: tl.constexpr):
    """Return ``M_i s + z`` of the i-th tile of M."""
    return dot_acc(Operand(large=tiles.large[i], small=tiles.small[i]), s, z, C)


@triton.jit
def prepare_aux(aux, C: tl.constexpr):
    """Compute the part of the epilogue that does not need z."""
    aux = aux.to(tl.float32)
    if C.EPILOGUE == "tanh_grad":
        aux = 1.0 - aux * aux
    return aux


@triton.jit
def apply_epilogue(z, aux, C: tl.constexpr):
    """Return E(z, aux), in fp32, of an aux from :func:`prepare_aux`."""
    if C.EPILOGUE == "tanh":
        return tanh(z)
    elif C.EPILOGUE == "tanh_approx":
        return tanh_approx(z)
    elif C.EPILOGUE == "relu":
        # Not a maximum, which would lose a NaN.
        return tl.where(z < 0, 0.0, z)
    elif C.EPILOGUE == "tanh_grad":
        return z * aux
    else:
        tl.static_assert(C.EPILOGUE == "relu_grad")
        # Chosen, not multiplied: torch gives 0 where the unit is off, whatever z is.
        return tl.where(aux > 0, z, 0.0)


@triton.jit
def tanh(x):
    """Return tanh of an fp32 tile: odd, exact in the limit at 0, 1 far out, NaN for NaN."""
    # Below 5/8 the exponential form cancels; an odd minimax polynomial (Cephes tanhf) does not.
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    # exp(2 |x|), to base 2, may overflow to inf, and 1 - 2 / inf is the right answer.
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * magnitude) + 1.0)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    far = (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0.625, near, far)


@triton.jit
def tanh_approx(x):
    """Return tanh of an fp32 tile that is to be rounded to bf16, by NVIDIA's one instruction.

    Its relative error is at most 2⁻¹¹ (PTX ISA, ``tanh.approx.f32``; others measured 1.11e-5,
    https://stackoverflow.com/q/41251698), an eighth to a quarter of what rounding to bf16 may add.
    If the error were 2⁻¹¹ throughout, 10 % of the outputs of z ~ N(0, 4) would be the next bf16
    value, and the error of a bf16 recurrence against float64 would be 7 % larger; with 1.11e-5,
    0.2 % would be. It replaces some twenty instructions an element, half of a resident step's.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def round_to_tf32(x):
    """Round an fp32 tile to TF32's 10 fraction bits, ties away from zero, as ``cvt.rna.tf32``.

    ``tl.dot`` truncates its operands, which doubles the error and biases it.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # The carry out of a NaN's fraction would turn it into a number.
    return tl.where(x == x, rounded, x)


@triton.jit
def downcast(x, dtype: tl.constexpr, C: tl.constexpr):
    """Round an fp32 tile to dtype, to nearest even."""
    if C.INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter truncates instead, which is exact for a value of 8 bits.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def optimization_barrier(x, C: tl.constexpr):
    """Return x, 32 bits a register, by an instruction that the compiler neither moves nor removes.

    Otherwise Triton moves the store of a loaded tile to shared memory up to its load, between the
    loads; and LLVM packs two 16-bit elements, loaded one by one, wherever they are used.
    """
    if C.INTERPRETED:
        return x
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK
    )
