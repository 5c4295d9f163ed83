"""Launching the recurrence kernel: row map, arguments, grid."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tritonrnn.kernels.plan import (
    DEVICES,
    DeviceLimits,
    LaunchPlan,
    Problem,
    choose_plan,
    stepwise_plan,
)
from tritonrnn.kernels.recurrence import recurrence_kernel
from tritonrnn.layout import SequenceLayout

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def recurrence(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: tuple[bool, ...],
    tf32: bool,
    plan: LaunchPlan | None = None,
) -> None:
    """Overwrite ``a`` by ``s_t = E(a_t + v_t, aux_t)``, ``v_t = M s_{t-1}``.

    Args:
        a: ``[N, G * H]``, contiguous: the drive, or the gradient of the output.
        v_0: ``[G, B, H]`` fp32, contiguous: v at each sequence's own first step of the walk, in
            a reverse group its last token. None for zero.
        M: ``[G, H, H]`` in the dtype of a, of any strides.
        aux: ``[N, G * H]``, contiguous: the output of the forward pass, for the gradients.
        layout: where every token of the batch lives.
        epilogue: ``tanh``, ``relu``, ``tanh_grad`` or ``relu_grad``.
        reverse: for each group, whether it walks from a sequence's last step to its first.
        tf32: whether fp32 products may round their operands to TF32.
        plan: the plan to launch, whatever :func:`choose_plan` says. Without one, a problem that
            torch's own path would serve better is walked step by step.
    """
    if a.numel() == 0:
        return
    problem = problem_of(a, layout, G=len(reverse), epilogue=epilogue, tf32=tf32)
    if plan is None:
        device = device_limits(a.device)
        choice = choose_plan(problem, device)
        plan = choice if isinstance(choice, LaunchPlan) else stepwise_plan(problem, device)
    arguments = kernel_arguments(a, v_0, M, aux, layout, problem, reverse, plan)
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        if plan.name == "resident":
            recurrence_kernel[grid(problem, plan)](first_step=0, last_step=layout.T, **arguments)
        else:
            for step in range(layout.T):
                recurrence_kernel[grid(problem, plan)](
                    first_step=step, last_step=step + 1, **arguments
                )


def problem_of(a: Tensor, layout: SequenceLayout, *, G: int, epilogue: str, tf32: bool) -> Problem:
    """What :func:`choose_plan` needs to know of a call."""
    H = a.shape[1] // G
    return Problem(layout.T, layout.B, G, H, DTYPES[a.dtype], tf32, epilogue)


def grid(problem: Problem, plan: LaunchPlan) -> tuple[int, int, int]:
    """Programs by batch block, block of hidden units and group."""
    return (
        triton.cdiv(problem.B, plan.block_b),
        triton.cdiv(problem.H, plan.block_h),
        problem.G,
    )


def kernel_arguments(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    problem: Problem,
    reverse: tuple[bool, ...],
    plan: LaunchPlan,
) -> dict[str, Any]:
    """Every argument of the kernel but the steps to walk, and the compiler's options."""
    B, G, H = problem.B, problem.G, problem.H
    assert a.shape == (layout.N, G * H)
    assert M.shape == (G, H, H)
    assert v_0 is None or v_0.shape == (G, B, H)
    assert aux is None or aux.shape == a.shape
    assert (aux is not None) == problem.epilogue.endswith("_grad")
    assert v_0 is None or v_0.dtype == torch.float32
    assert all(matrix is None or matrix.dtype == a.dtype for matrix in (M, aux))
    assert all(rows is None or rows.is_contiguous() for rows in (a, v_0, aux))
    # One bit a group, in an argument of 32 bits.
    assert G < 32
    if plan.name == "resident" and a.dtype == torch.float32:
        # Shared memory is read in wide pieces along rows only where numbers have 16 bits: a
        # transposed M would be read number by number in every step.
        M = M.contiguous()
    stride_m_group, stride_m_row, stride_m_column = M.stride()
    return {
        "a_ptr": a,
        "v_0_ptr": v_0,
        "m_ptr": M,
        "aux_ptr": aux,
        # The rows of a padded layout are computed from its two strides.
        "row_map_ptr": None if layout.is_padded else layout.row_map(a.device),
        "T": layout.T,
        "B": B,
        "stride_time": 1 if layout.batch_first else B,
        "stride_batch": layout.T if layout.batch_first else 1,
        "stride_m_group": stride_m_group,
        "stride_m_row": stride_m_row,
        "stride_m_column": stride_m_column,
        "reverse_groups": sum(1 << group for group, backwards in enumerate(reverse) if backwards),
        "G": G,
        "H": H,
        "EPILOGUE": problem.epilogue,
        "PLAN": plan.name,
        "PRECISION": plan.precision,
        "INTERPRETED": triton.knobs.runtime.interpret,
        "BLOCK_H": plan.block_h,
        "BLOCK_B": plan.block_b,
        "BLOCK_K": plan.block_k,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a device at hand."""
    if device.type == "cpu":
        return DEVICES["interpreter"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return DeviceLimits(
            arch=properties.gcnArchName.split(":")[0],
            multiprocessors=properties.multi_processor_count,
            shared_bytes=properties.shared_memory_per_block,
            warp_size=properties.warp_size,
        )
    return DeviceLimits(
        arch=f"sm_{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )
