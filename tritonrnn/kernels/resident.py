"""The whole walk in one launch: all of M and the state of a batch block in one multiprocessor.

The tile picture (``common.py`` has the formula and the names). BLOCK_H covers H. M stays in shared
memory for the whole walk (in fp32, and on AMD, in registers), the state in registers; a program
waits for no other (▒ stays, ░ is read, ▓ is made in a step):

                  M [H, H]            s_{t-1} [H, B]            s_t [H, B]
                                        BLOCK_B
                ┌───────────┐         ┌──┬──┬──┐               ┌──┬──┬──┐
                │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
       BLOCK_H  │▒▒▒▒▒▒▒▒▒▒▒│    x    │░░│  │  │       =       │▓▓│  │  │  = E(a + M s, aux)
                │▒▒▒▒▒▒▒▒▒▒▒│         │░░│  │  │               │▓▓│  │  │
                └───────────┘         └──┴──┴──┘               └──┴──┴──┘

An iteration of the time loop makes the state of a step from the pre-activation that the iteration
before has left, and then the next pre-activation:

    s_t = E(z_t, aux_t)      z_{t+1} = M s_t + a_{t+1}

So the state goes to the product and to global memory at the same time, and its way to whole rows,
which leads through shared memory, has no block barrier of its own. A step has two block barriers.
After the first, the async copies of this step have landed, and what the step before has read may be
overwritten; after the second the product begins. (A state of fp32 accuracy goes to its products in
several tiles: two barriers more, for its small part, and two beside the products, for the store.)

What a step reads from global memory is prefetched several steps ahead, as its latency may be that
of two steps. Triton's pipeliner turns the loads into async copies (``cp.async``) to shared memory,
where the product's layout reads them. Loads to registers would be waited for in the iteration that
sends them: values that go from one iteration to the next are copied there, and ptxas has one
scoreboard in common for most that are in flight.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from tritonrnn.kernels.common import (
    UNSPECIALIZED,
    Batch,
    Constants,
    Operand,
    clear_padding,
    compute_state,
    convert_layout_like,
    dot_tile,
    in_walk,
    load_and_prepare_step,
    load_step,
    load_weights,
    make_block,
    prepare_step,
    row_index,
    row_offset,
    split_tf32,
    store_ends,
    store_step,
    time_at,
    zero_padding,
)


@dataclass(frozen=True)
class ResidentConstants(Constants):
    """What the resident kernel is compiled for, too.

    BLOCK_K         columns of M of one product
    NUM_STAGES      iterations in flight: one is walked, the others are being prefetched; 1 where
                    loads go to registers
    """

    BLOCK_K: int
    NUM_STAGES: int

    @property
    def NUM_TILES(self) -> int:
        """Return the number of tiles of M."""
        return self.BLOCK_H // self.BLOCK_K

    @property
    def STRIDE_K(self) -> int:
        """Return the distance of a tile's columns in M, which :func:`split_k` deals in turn."""
        return self.NUM_TILES


@triton.jit(do_not_specialize=UNSPECIALIZED)
def resident_kernel(
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
    C: tl.constexpr,
):
    """Walk every step of every sequence of a batch block.

    Arguments as ``common.Batch`` has them; m_ptr is [G, H, H] in the dtype of a, with offsets of 32
    bits at most.
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
    range_h = tl.arange(0, C.BLOCK_H)
    # The grid has one such program: so written, LLVM finds the mask to be that of the block.
    offs_h = tl.program_id(1) * C.BLOCK_H + range_h
    offs_k = C.STRIDE_K * tl.arange(0, C.BLOCK_K)
    m_ptr += tl.program_id(2).to(tl.int64) * stride_m_group
    m_ptrs = m_ptr + (offs_h[:, None] * stride_m_row + offs_k[None, :] * stride_m_column)
    mask_h = (offs_h < C.H)[:, None]
    tiles = load_weights(m_ptrs, mask_h, stride_m_column, C)
    index, range_b = tl.program_id(0), tl.arange(0, C.BLOCK_B)
    block = make_block(index, range_h, range_b, batch, C)
    clear_padding(index, range_b, block, batch, C)
    if C.NUM_STAGES > 1:
        walk(batch, block, tiles, C)
    else:
        walk_sync_loads(batch, block, tiles, C)
    store_ends(index, range_h, range_b, block, batch, C)


@triton.jit
def walk(batch, block, tiles, C: tl.constexpr):
    """Walk a batch block that async copies prefetch, NUM_STAGES - 1 iterations ahead."""
    # Where every sequence has all T tokens, none begins later than in the first step.
    MAY_BEGIN: tl.constexpr = batch.lengths_ptr is not None
    IS_SPLIT: tl.constexpr = C.NUM_TILES > 1
    row = row_offset(0, batch, block, C)
    index_1 = row_index(1, batch, block)
    a, aux = load_step_b32(0, row, batch, block, C)
    z, aux = prepare_step(0, a, aux, batch, block, C, True)
    for step in tl.range(0, block.num_steps, num_stages=C.NUM_STAGES):
        row_1 = index_1 * C.WIDTH
        a_1, aux_1 = load_step_b32(step + 1, row_1, batch, block, C)
        # For the next iteration alone. If this one used it, the pipeliner would bring it through
        # shared memory, too, at the price of a barrier.
        index_1 = row_index(step + 2, batch, block)
        z = zero_padding(z, block, C)
        s = compute_state(step, z, aux, batch, block, C)
        state = split_tf32(s, C)
        if not IS_SPLIT:
            # After what makes the product's operand: so the store's change of layout shares the
            # barrier in front of the product.
            store_step(step, row, s, batch, block)
        if batch.v_0_ptr is not None and MAY_BEGIN:
            # Else all is done in the layout of v_0.
            a_1 = convert_layout_like(z, a_1, step + 1, block)
        drive, aux = prepare_step(step + 1, a_1, aux_1, batch, block, C, MAY_BEGIN)
        z = dot_tiles(tiles, state, drive, C)
        if IS_SPLIT:
            # Beside the product, which in this case takes all its operands to registers.
            store_step(step, row, s, batch, block)
        row = row_1


@triton.jit
def walk_sync_loads(batch, block, tiles, C: tl.constexpr):
    """Walk a batch block whose steps are loaded to registers.

    For rows that are no whole number of 32-bit words, and for GPUs without ``cp.async``. Here an
    iteration begins with the product, which takes fewer registers; loads are issued three steps
    ahead, and change their layout one step ahead. The store's change of layout has two block
    barriers of its own, as has that of aux.
    """
    MAY_BEGIN: tl.constexpr = batch.lengths_ptr is not None
    row = row_offset(0, batch, block, C)
    row_1 = row_offset(1, batch, block, C)
    row_2 = row_offset(2, batch, block, C)
    row_3 = row_offset(3, batch, block, C)
    drive, aux = load_and_prepare_step(0, row, batch, block, C)
    a_1, aux_1 = load_step(1, row_1, batch, block)
    a_2, aux_2 = load_step(2, row_2, batch, block)
    s = tl.zeros(block.offs_tile.shape, batch.a_ptr.dtype.element_ty)
    for step in tl.range(0, block.num_steps, num_stages=1):
        row_4 = row_offset(step + 4, batch, block, C)
        a_3, aux_3 = load_step(step + 3, row_3, batch, block)
        z = dot_tiles(tiles, split_tf32(s, C), drive, C)
        aux_0 = aux
        a_1 = convert_layout_like(s, a_1, step + 1, block)
        aux_1 = convert_layout_like(s, aux_1, step + 1, block)
        drive, aux = prepare_step(step + 1, a_1, aux_1, batch, block, C, MAY_BEGIN)
        z = zero_padding(z, block, C)
        s = compute_state(step, z, aux_0, batch, block, C)
        # At once: a store that waits for the next product takes registers, and does not overlap
        # it, as Triton waits for a product where it is written.
        store_step(step, row, s, batch, block)
        row, row_1, row_2, row_3 = row_1, row_2, row_3, row_4
        a_1, aux_1, a_2, aux_2 = a_2, aux_2, a_3, aux_3


@triton.jit
def dot_tiles(tiles, s, z, C: tl.constexpr):
    """Return ``M s + z``: one product for each tile of M."""
    large = split_k(s.large, C)
    small = split_k(s.small, C)
    for i in tl.static_range(len(large)):
        z = dot_tile(tiles, i, Operand(large=large[i], small=small[i]), z, C)
    return z


@triton.jit
def split_k(s, C: tl.constexpr):
    """Return a state in NUM_TILES tiles, each of every NUM_TILES-th hidden unit."""
    NUM_TILES: tl.constexpr = C.NUM_TILES
    UNITS: tl.constexpr = s.shape[0] // NUM_TILES
    BLOCK_B: tl.constexpr = s.shape[1]
    if NUM_TILES == 4:
        pairs = tl.permute(tl.reshape(s, [UNITS, 2, 2, BLOCK_B]), (0, 3, 2, 1))
        first, second = tl.split(pairs)
        return tl.split(first) + tl.split(second)
    elif NUM_TILES == 2:
        return tl.split(tl.permute(tl.reshape(s, [UNITS, 2, BLOCK_B]), (0, 2, 1)))
    else:
        tl.static_assert(NUM_TILES == 1)
        return (s,)


@triton.jit
def load_step_b32(step, row, batch, block, C: tl.constexpr):
    """Load a and aux of a step by 32-bit words, in fp32; a twice where there is no aux."""
    a = load_b32(batch.a_ptr, step, row, block, C)
    aux = a
    if batch.aux_ptr is not None:
        aux = load_b32(batch.aux_ptr, step, row, block, C)
    return a, aux


@triton.jit
def load_b32(ptr, step, row, block, C: tl.constexpr):
    """Load a step of one matrix by words of 32 bits, the least that ``cp.async`` copies.

    In shared memory the tile lies as it is loaded, its last dimension fastest: four words of a
    sequence, then the same four of the next sequence. So the words that a warp reads for the
    product, a few of each sequence, lie in different banks; of whole rows, each a power of two
    long, all would begin in the same bank.
    """
    dtype: tl.constexpr = ptr.dtype.element_ty
    PACK: tl.constexpr = 32 // dtype.primitive_bitwidth
    NUM_QUADS: tl.constexpr = C.BLOCK_H // (4 * PACK)
    offs_w = (4 * tl.arange(0, NUM_QUADS)[:, None] + tl.arange(0, 4)[None, :])[:, None, :]
    live = ((time_at(step, block) < block.lengths) & in_walk(step, block))[None, :, None]
    words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + row // PACK
    words = tl.load(
        words_ptr + (block.base[:, :, None] // PACK + offs_w),
        mask=(offs_w < C.H // PACK) & live,
        other=0,
    )
    # Each hidden unit takes the word that holds it, without a change of layout, and then its half.
    words = tl.broadcast_to(words[:, :, :, None], [NUM_QUADS, C.BLOCK_B, 4, PACK])
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [C.BLOCK_H, C.BLOCK_B])
    half = (tl.arange(0, C.BLOCK_H) % PACK)[:, None]
    if dtype == tl.float16:
        return (words >> 16 * half).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    if dtype == tl.bfloat16:
        # The upper half of an fp32 value.
        words = (words << 16 * (1 - half)) & -0x10000
    return words.to(tl.float32, bitcast=True)
