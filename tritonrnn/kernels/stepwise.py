"""A launch a step: the kernel to read first. It serves every problem.

The tile picture (``common.py`` has the formula and the names). A program makes one tile of the
next state; the launch before has stored the whole previous state, which the program reads in
tiles of BLOCK_K hidden units, as it reads its rows of M (░ is read, ▓ is made):

                    M [H, H]            s_{t-1} [H, B]            s_t [H, B]
                  BLOCK_K ->              BLOCK_B
                ┌──┬──┬──┬──┐           ┌──┬──┐                  ┌──┬──┐
                │  │  │  │  │           │░░│  │ BLOCK_K          │  │  │
                ├──┼──┼──┼──┤           ├──┼──┤   |              ├──┼──┤
       BLOCK_H  │░░│░░│░░│░░│     x     │░░│  │   v       =      │▓▓│  │  = E(a + M s, aux)
                ├──┼──┼──┼──┤           ├──┼──┤                  ├──┼──┤
                │  │  │  │  │           │░░│  │                  │  │  │
                └──┴──┴──┴──┘           └──┴──┘                  └──┴──┘

The grid is batch blocks x blocks of hidden units x groups. Only the order of launches in their
stream says what waits for what: between two launches all stores become visible.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from tritonrnn.kernels.common import (
    UNSPECIALIZED,
    Batch,
    Constants,
    clear_padding,
    compute_state,
    dot_acc,
    has_previous,
    load_and_prepare_step,
    make_block,
    row_offset,
    split_tf32,
    store_ends,
    store_step,
)


@dataclass(frozen=True)
class StepwiseConstants(Constants):
    """BLOCK_K: columns of M, and hidden units of the previous state, of one product."""

    BLOCK_K: int


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "step"])
def stepwise_kernel(
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
    step,
    C: tl.constexpr,
):
    """Make one step of one tile.

    Arguments as ``common.Batch`` has them; m_ptr is [G, H, H] of any strides, in the dtype of a.
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
    range_h, offs_k = tl.arange(0, C.BLOCK_H), tl.arange(0, C.BLOCK_K)
    # Of any size, so offsets have 64 bits.
    rows = (tl.program_id(1) * C.BLOCK_H + range_h)[:, None].to(tl.int64)
    columns = offs_k[None, :].to(tl.int64)
    m_ptr += tl.program_id(2).to(tl.int64) * stride_m_group
    m_ptrs = m_ptr + (rows * stride_m_row + columns * stride_m_column)

    index, range_b = tl.program_id(0), tl.arange(0, C.BLOCK_B)
    block = make_block(index, range_h, range_b, batch, C)
    if step == 0:
        clear_padding(index, range_b, block, batch, C)
    if step < block.num_steps:
        row = row_offset(step, batch, block, C)
        z, aux = load_and_prepare_step(step, row, batch, block, C)
        state_ptrs = s_ptr + row_offset(step - 1, batch, block, C) + block.base + offs_k[:, None]
        previous = has_previous(step, block)
        # Products of fp32 accuracy are added up apart from z (common.dot_acc).
        IS_APART: tl.constexpr = C.PRECISION == "tf32x3"
        total = z
        if IS_APART:
            total = tl.zeros(z.shape, tl.float32)
        # LLVM would hoist the descriptor of every wgmma out of the loop.
        for k in tl.range(0, C.H, C.BLOCK_K, disable_licm=True):
            mask_k = k + offs_k < C.H
            m_k_ptrs = m_ptrs + tl.cast(k, tl.int64) * stride_m_column
            m = tl.load(m_k_ptrs, mask=block.mask_h & mask_k[None, :], other=0.0)
            s = tl.load(state_ptrs + k, mask=mask_k[:, None] & previous, other=0.0)
            total = dot_acc(split_tf32(m, C), split_tf32(s, C), total, C)
        if IS_APART:
            total += z
        s = compute_state(step, total, aux, batch, block, C)
        store_step(step, row, s, batch, block)
    if step == tl.maximum(block.num_steps - 1, 0):
        store_ends(index, range_h, range_b, block, batch, C)
