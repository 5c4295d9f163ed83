"""The resident walk: all of M and of a batch block's state in one multiprocessor.

A turn of the loop makes the state of a step from the pre-activation that the turn before has left,
and then the next pre-activation:

    s_t = E(z_t, aux_t)      z_{t+1} = M s_t + a_{t+1}

So the state sets out for the product and for memory at the same time, and its way to whole rows,
which leads through shared memory, has no barrier of its own. A step has two barriers. Behind the
first, what was sent for has come, and what the step before has read may be overwritten; behind the
second the product begins. (A state of fp32 accuracy goes to its products in several tiles: two
barriers more, for its small part, and two beside the products, for the store.)

What a step takes of global memory is sent for steps ahead, for its latency may be that of two.
Triton's pipeliner has numbers come to shared memory by themselves (``cp.async``), where the
product's layout reads them. Loads to registers would be waited for in the step that sends them:
values that go from one turn to the next are copied there, and ptxas has a counter in common for
most that are under way.
"""

import triton
import triton.language as tl

from tritonrnn.kernels.arithmetic import multiply_add, operands
from tritonrnn.kernels.block import (
    clear_padding,
    in_layout_of,
    is_walked,
    load_and_prepare_step,
    load_step,
    prepare_step,
    row_at,
    row_number,
    state_of,
    store_step,
    time_at,
)


@triton.jit
def walk_resident(
    batch,
    block,
    tiles,
    tiles_small,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Walk a batch block whose numbers come by themselves, NUM_STAGES - 1 steps ahead."""
    WIDTH: tl.constexpr = G * H
    # Where every sequence has all T tokens, none joins later than the first step.
    MAY_JOIN: tl.constexpr = batch.row_map_ptr is not None
    APART: tl.constexpr = len(tiles) > 1
    row = row_at(0, batch, block, WIDTH)
    number_1 = row_number(1, batch, block)
    a, aux = load_step_in_words(0, row, batch, block, H)
    z, aux = prepare_step(0, a, aux, batch, block, EPILOGUE, True)
    for step in tl.range(0, block.longest, num_stages=NUM_STAGES):
        row_1 = number_1 * WIDTH
        a_1, aux_1 = load_step_in_words(step + 1, row_1, batch, block, H)
        # For the next turn alone. Were it used in this one, the pipeliner would have it come to
        # shared memory, too, at the price of a barrier.
        number_1 = row_number(step + 2, batch, block)
        z = clear_padding(z, block, H, EPILOGUE)
        s = state_of(step, z, aux, batch, block, EPILOGUE, INTERPRETED)
        state, state_small = operands(s, PRECISION, INTERPRETED)
        if not APART:
            # Behind what makes the product's operand: so the store's change of layouts shares the
            # barrier in front of the product.
            store_step(step, row, s, batch, block)
        if batch.v_0_ptr is not None and MAY_JOIN:
            # Else all is done in the layout of v_0.
            a_1 = in_layout_of(z, a_1, step + 1, block)
        drive, aux = prepare_step(step + 1, a_1, aux_1, batch, block, EPILOGUE, MAY_JOIN)
        z = multiply_parts(tiles, tiles_small, state, state_small, drive, PRECISION)
        if APART:
            # Beside the product, which in this case takes all it needs to registers.
            store_step(step, row, s, batch, block)
        row = row_1


@triton.jit
def walk_resident_by_loads(
    batch,
    block,
    tiles,
    tiles_small,
    G: tl.constexpr,
    H: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Walk a batch block whose numbers are loaded to registers.

    For rows that are no whole words, and for GPUs without ``cp.async``. Here a turn begins with the
    product, which takes fewer registers; loads are sent three steps ahead, and change layouts one
    step ahead. The store's change of layouts has two barriers of its own, as has that of aux.
    """
    WIDTH: tl.constexpr = G * H
    MAY_JOIN: tl.constexpr = batch.row_map_ptr is not None
    row = row_at(0, batch, block, WIDTH)
    row_1 = row_at(1, batch, block, WIDTH)
    row_2 = row_at(2, batch, block, WIDTH)
    row_3 = row_at(3, batch, block, WIDTH)
    drive, aux = load_and_prepare_step(0, row, batch, block, EPILOGUE)
    a_1, aux_1 = load_step(1, row_1, batch, block)
    a_2, aux_2 = load_step(2, row_2, batch, block)
    s = tl.zeros(block.tile.shape, batch.a_ptr.dtype.element_ty)
    for step in tl.range(0, block.longest, num_stages=1):
        row_4 = row_at(step + 4, batch, block, WIDTH)
        a_3, aux_3 = load_step(step + 3, row_3, batch, block)
        state, state_small = operands(s, PRECISION, INTERPRETED)
        z = multiply_parts(tiles, tiles_small, state, state_small, drive, PRECISION)
        aux_now = aux
        a_1 = in_layout_of(s, a_1, step + 1, block)
        aux_1 = in_layout_of(s, aux_1, step + 1, block)
        drive, aux = prepare_step(step + 1, a_1, aux_1, batch, block, EPILOGUE, MAY_JOIN)
        z = clear_padding(z, block, H, EPILOGUE)
        s = state_of(step, z, aux_now, batch, block, EPILOGUE, INTERPRETED)
        # At once: a store that waits for the next product takes registers, and does not overlap it,
        # as Triton waits for a product where it is written.
        store_step(step, row, s, batch, block)
        row, row_1, row_2, row_3 = row_1, row_2, row_3, row_4
        a_1, aux_1, a_2, aux_2 = a_2, aux_2, a_3, aux_3


@triton.jit
def multiply_parts(tiles, tiles_small, s, s_small, z, PRECISION: tl.constexpr):
    """Give ``M s + z``: a product for each of M's tiles, which have its columns by turns."""
    parts = parts_of(s, len(tiles))
    parts_small = parts_of(s_small, len(tiles))
    for i in tl.static_range(len(tiles)):
        z = multiply_add(tiles[i], tiles_small[i], parts[i], parts_small[i], z, PRECISION)
    return z


@triton.jit
def parts_of(s, PARTS: tl.constexpr):
    """Give a state in as many tiles, of every so many of its hidden units each."""
    UNITS: tl.constexpr = s.shape[0] // PARTS
    BLOCK_B: tl.constexpr = s.shape[1]
    if PARTS == 4:
        pairs = tl.permute(tl.reshape(s, [UNITS, 2, 2, BLOCK_B]), (0, 3, 2, 1))
        first, second = tl.split(pairs)
        return tl.split(first) + tl.split(second)
    elif PARTS == 2:
        return tl.split(tl.permute(tl.reshape(s, [UNITS, 2, BLOCK_B]), (0, 2, 1)))
    else:
        tl.static_assert(PARTS == 1)
        return (s,)


@triton.jit
def load_step_in_words(step, row, batch, block, H: tl.constexpr):
    """Load a and aux of a step, in fp32; a again where there is no aux. Rows are whole words."""
    a = load_words(batch.a_ptr, step, row, batch, block, H)
    aux = a
    if batch.aux_ptr is not None:
        aux = load_words(batch.aux_ptr, step, row, batch, block, H)
    return a, aux


@triton.jit
def load_words(ptr, step, row, batch, block, H: tl.constexpr):
    """Load a step's numbers of one matrix by words of 32 bits, the least that can be sent for.

    In shared memory the tile lies as it is loaded, its last dimension fastest: four words of a
    sequence, then the same four of the next sequence. So the words that a warp takes for the
    product, a few of each sequence, lie in different banks; whole rows, of a power of two each,
    would all begin in the same one.
    """
    dtype: tl.constexpr = ptr.dtype.element_ty
    NUMBERS_A_WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    BLOCK_H: tl.constexpr = block.mask_h.shape[0]
    BLOCK_B: tl.constexpr = block.lengths.shape[0]
    FOURS: tl.constexpr = BLOCK_H // (4 * NUMBERS_A_WORD)
    offs_w = (4 * tl.arange(0, FOURS)[:, None] + tl.arange(0, 4)[None, :])[:, None, :]
    live = ((time_at(step, block) < block.lengths) & is_walked(step, block))[None, :, None]
    words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + row // NUMBERS_A_WORD
    words = tl.load(
        words_ptr + (block.base[:, :, None] // NUMBERS_A_WORD + offs_w),
        mask=(offs_w < H // NUMBERS_A_WORD) & live,
        other=0,
    )
    # Each hidden unit takes the word that its number is in, without a change of layouts, and then
    # its half of it.
    words = tl.broadcast_to(words[:, :, :, None], [FOURS, BLOCK_B, 4, NUMBERS_A_WORD])
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [BLOCK_H, BLOCK_B])
    half = (tl.arange(0, BLOCK_H) % NUMBERS_A_WORD)[:, None]
    if dtype == tl.float16:
        return (words >> 16 * half).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    if dtype == tl.bfloat16:
        # The upper half of an fp32 number.
        words = (words << 16 * (1 - half)) & -0x10000
    return words.to(tl.float32, bitcast=True)
