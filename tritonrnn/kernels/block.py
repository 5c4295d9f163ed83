"""The tokens of a program: where their numbers lie, and when they are loaded and stored.

A step of a sequence that has not yet joined, or has ended, is dead: it loads nothing and stores
nothing. Before a sequence joins, its state is a true zero, chosen and never multiplied; after it
has ended, nobody reads it. Sequences are columns of the product, so that a NaN stays in its own.
Row offsets are 64-bit: rows times hidden units passes 2³¹ in real use.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonrnn.kernels.arithmetic import apply_epilogue, narrow, prepare_aux


class Batch(NamedTuple):
    """What is walked: arguments of ``recurrence_kernel``, which says what they are."""

    a_ptr: Any
    v_0_ptr: Any
    aux_ptr: Any
    row_map_ptr: Any
    T: Any
    B: Any
    stride_time: Any
    stride_batch: Any
    reverse_groups: Any


class Block(NamedTuple):
    """A program's hidden units of one batch block: what is the same in every step.

    is_reverse  whether the walk goes from the last time step to the first
    lengths     tokens of each sequence, 0 where there is none
    longest     the most of them: steps of the walk
    joins       the time step at which each sequence joins the walk
    base        offset of each sequence from a time step's row, to the group's first hidden unit
    tile        offsets of the program's hidden units of each sequence
    mask_h      hidden units that there are
    v_0         v at the steps at which sequences join, or 0.0
    """

    is_reverse: Any
    lengths: Any
    longest: Any
    joins: Any
    base: Any
    tile: Any
    mask_h: Any
    v_0: Any


@triton.jit
def block_of(number, units, sequences, batch, G: tl.constexpr, H: tl.constexpr):
    """Give the program's part of the batch block of this number, empty past the last one.

    units, sequences
        ranges of as many as a program has; in a Gluon kernel, of the layout that tiles shall have
    """
    group = tl.program_id(2)
    offs_h = tl.program_id(1) * units.shape[0] + units
    offs_b = number * sequences.shape[0] + sequences
    mask_b = offs_b < batch.B
    mask_h = (offs_h < H)[:, None]
    if batch.row_map_ptr is None:
        lengths = tl.where(mask_b, batch.T, 0)
        batch_base = offs_b.to(tl.int64) * batch.stride_batch
    else:
        sequences_ptr = batch.row_map_ptr + batch.T
        batch_base = tl.load(sequences_ptr + offs_b, mask=mask_b, other=0)
        lengths = tl.load(sequences_ptr + batch.B + offs_b, mask=mask_b, other=0).to(tl.int32)
    is_reverse = ((batch.reverse_groups >> group) & 1) != 0
    base = (batch_base * G * H + group * H)[None, :]
    v_0 = 0.0
    if batch.v_0_ptr is not None:
        v_0_tile = (group.to(tl.int64) * batch.B + offs_b)[None, :] * H + offs_h[:, None]
        v_0 = tl.load(batch.v_0_ptr + v_0_tile, mask=mask_h & mask_b[None, :], other=0.0)
    return Block(
        is_reverse=is_reverse,
        lengths=lengths,
        longest=tl.max(lengths, axis=0),
        joins=tl.where(is_reverse, lengths - 1, 0),
        base=base,
        tile=base + offs_h[:, None],
        mask_h=mask_h,
        v_0=v_0,
    )


@triton.jit
def time_at(step, block):
    """Give the time step that is walked as number ``step``; outside the walk any."""
    return tl.where(block.is_reverse, block.longest - 1 - step, step)


@triton.jit
def is_walked(step, block):
    """Tell whether a step is neither before the walk nor after it."""
    return (step >= 0) & (step < block.longest)


@triton.jit
def row_at(step, batch, block, WIDTH: tl.constexpr):
    """Give the offset of a step's row in a row-major ``[N, WIDTH]`` matrix; outside a walk any."""
    return row_number(step, batch, block) * WIDTH


@triton.jit
def row_number(step, batch, block):
    """Give the number of a step's row; outside a walk any."""
    t = time_at(step, block)
    if batch.row_map_ptr is None:
        return t.to(tl.int64) * batch.stride_time
    else:
        return tl.load(batch.row_map_ptr + t, mask=is_walked(step, block), other=0)


@triton.jit
def tile_of(step, block):
    """Tell which numbers of a program's tile there are in a step, in the walk or outside of it."""
    live = (time_at(step, block) < block.lengths) & is_walked(step, block)
    return block.mask_h & live[None, :]


@triton.jit
def load_step(step, row, batch, block):
    """Load a and aux of a step; a again where there is no aux."""
    mask = tile_of(step, block)
    a = tl.load(batch.a_ptr + row + block.tile, mask=mask, other=0.0)
    aux = a
    if batch.aux_ptr is not None:
        aux = tl.load(batch.aux_ptr + row + block.tile, mask=mask, other=0.0)
    return a, aux


@triton.jit
def in_layout_of(s, x, step, block):
    """Give numbers loaded for a step in the layout of a state.

    Dead sequences take the state's numbers, which nobody uses. The point is the choice: Triton
    keeps what is chosen in the state's layout, that of the product, and so changes layouts here.
    """
    live = (time_at(step, block) < block.lengths)[None, :]
    return tl.where(live, x, s)


@triton.jit
def prepare_step(step, a, aux, batch, block, EPILOGUE: tl.constexpr, MAY_JOIN: tl.constexpr):
    """Turn the numbers loaded for a step into what its product starts from and its epilogue takes.

    MAY_JOIN    whether a sequence may join in this step, where v_0 is added then
    """
    drive = a.to(tl.float32)
    if batch.v_0_ptr is not None and MAY_JOIN:
        joining = (time_at(step, block) == block.joins)[None, :]
        drive = tl.where(joining, drive + block.v_0, drive)
    prepared = drive
    if batch.aux_ptr is not None:
        prepared = prepare_aux(aux, EPILOGUE)
    return drive, prepared


@triton.jit
def load_and_prepare_step(step, row, batch, block, EPILOGUE: tl.constexpr):
    """Load a step and prepare it at once, v_0 added where a sequence joins."""
    a, aux = load_step(step, row, batch, block)
    joining = (time_at(step, block) == block.joins)[None, :]
    # Also where v_0 is 0.0: the sum is fp32, and so Triton carries the drive in fp32, not in the
    # dtype of a, which it would widen in front of the product.
    drive = a.to(tl.float32) + tl.where(joining, block.v_0, 0.0)
    prepared = drive
    if batch.aux_ptr is not None:
        prepared = prepare_aux(aux, EPILOGUE)
    return drive, prepared


@triton.jit
def clear_padding(z, block, H: tl.constexpr, EPILOGUE: tl.constexpr):
    """Give z with a zero for every hidden unit that there is not, if it may have anything else.

    M is 0 there, which times a state that has overflowed to infinity is NaN, and the next product
    would spread it. States of tanh don't overflow, and relu_grad chooses 0 by an aux of 0.
    """
    if H < z.shape[0] and (EPILOGUE == "relu" or EPILOGUE == "tanh_grad"):
        z = tl.where(block.mask_h, z, 0.0)
    return z


@triton.jit
def state_of(step, z, aux, batch, block, EPILOGUE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Give the state of a step from its pre-activation, in the dtype of a."""
    if batch.row_map_ptr is not None:
        # Before the epilogue, while z is fp32: a choice between halves of registers takes three
        # times the instructions. Where every sequence has all T tokens, nobody sees a dead state.
        live = (time_at(step, block) < block.lengths)[None, :]
        z = tl.where(live, z, 0.0)
    s = apply_epilogue(z, aux, EPILOGUE)
    return narrow(s, batch.a_ptr.dtype.element_ty, INTERPRETED)


@triton.jit
def store_step(step, row, s, batch, block):
    """Overwrite a by the state of a step of the walk."""
    live = (time_at(step, block) < block.lengths)[None, :]
    tl.store(batch.a_ptr + row + block.tile, s, mask=block.mask_h & live)


@triton.jit
def has_state_before(step, block):
    """Tell which sequences have walked the step before, too."""
    t = time_at(step, block)
    return ((t < block.lengths) & (t != block.joins))[None, :]
