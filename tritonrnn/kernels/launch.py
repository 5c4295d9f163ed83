"""Launching the recurrence kernel: row map, arguments, grid."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tritonrnn.kernels.plan import (
    DEVICES,
    PLANS,
    DeviceLimits,
    LaunchPlan,
    Problem,
    choose_plan,
    plan_without_torch,
)
from tritonrnn.kernels.recurrence import recurrence_kernel
from tritonrnn.layout import SequenceLayout

# Polls until a program gives up waiting: some ten seconds on a GPU, where a poll is a round trip to
# L2 of half a microsecond or more, and as long in the interpreter, at 50 microseconds a poll.
PATIENCE = 200_000 if triton.knobs.runtime.interpret else 20_000_000
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_forced: str | None = None


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
        a: ``[N, G * H]``, contiguous, on a whole word of memory: the drive, or the gradient of the
            output.
        v_0: ``[G, B, H]`` fp32, contiguous: v at each sequence's own first step of the walk, in
            a reverse group its last token. None for zero.
        M: ``[G, H, H]`` in the dtype of a, of any strides.
        aux: ``[N, G * H]``, contiguous: the output of the forward pass, for the gradients.
        layout: where every token of the batch lives.
        epilogue: ``tanh``, ``relu``, ``tanh_grad`` or ``relu_grad``.
        reverse: for each group, whether it walks from a sequence's last step to its first.
        tf32: whether fp32 products may round their operands to TF32.
        plan: the plan to launch, whatever :func:`choose_plan` says. Without one, a problem that
            torch's own path would serve better has the next best, :func:`plan_without_torch`'s.
    """
    if a.numel() == 0:
        return
    if aux is not None and aux.data_ptr() % 16 != 0:
        # It may be a view of anything, and is read by whole words, and vectors of them.
        aux = aux.clone()
    problem = problem_of(a, layout, G=len(reverse), epilogue=epilogue, tf32=tf32)
    if plan is None:
        plan = _plan_for(problem, device_limits(a.device))
    kernel = kernel_of(plan)[grid(problem, plan)]
    arguments = kernel_arguments(a, v_0, M, aux, layout, problem, reverse, plan)
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        if plan.name == "stepwise":
            for step in range(layout.T):
                kernel(step=step, **arguments)
        else:
            kernel(**arguments)
        if plan.name == "cooperative":
            check_gangs(arguments["gang_ptr"], plan)


@contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Launch every recurrence by the plan of this name, also those of a backward pass.

    For tests and measurements. It holds for the whole process, not for a thread: a GPU's backward
    pass runs in a thread of its own.

    Args:
        name: of :data:`tritonrnn.kernels.plan.PLANS`.

    Raises:
        ValueError: no plan has this name.
        RuntimeError: from a launch whose problem the plan does not fit.
    """
    global _forced
    if name not in PLANS:
        raise ValueError(f"Expected a plan of {', '.join(PLANS)}, got {name}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _plan_for(problem: Problem, device: DeviceLimits) -> LaunchPlan:
    if _forced is None:
        choice = choose_plan(problem, device)
        return choice if isinstance(choice, LaunchPlan) else plan_without_torch(problem, device)
    plan = PLANS[_forced](problem, device)
    if plan is None:
        raise RuntimeError(f"the plan {_forced} does not fit {problem} on {device.arch}")
    return plan


def problem_of(a: Tensor, layout: SequenceLayout, *, G: int, epilogue: str, tf32: bool) -> Problem:
    """What :func:`choose_plan` needs to know of a call."""
    H = a.shape[1] // G
    return Problem(layout.T, layout.B, G, H, DTYPES[a.dtype], tf32, epilogue)


def kernel_of(plan: LaunchPlan) -> Any:
    """The kernel that a plan launches."""
    if plan.name == "registers":
        # Only here, for Gluon takes its time to import.
        from tritonrnn.kernels.registers import recurrence_in_registers_kernel

        return recurrence_in_registers_kernel
    return recurrence_kernel


def grid(problem: Problem, plan: LaunchPlan) -> tuple[int, int, int]:
    """Programs by batch block (by gang, where one takes several), block of hidden units, group."""
    blocks_b, blocks_h = triton.cdiv(problem.B, plan.block_b), triton.cdiv(problem.H, plan.block_h)
    if plan.name == "cooperative":
        blocks_b = plan.programs // (blocks_h * problem.G)
    return blocks_b, blocks_h, problem.G


def gang_words(problem: Problem, plan: LaunchPlan, device: torch.device) -> Tensor:
    """Whether all waited in time, and each gang's counters: new ones for every launch.

    So calls on two streams share none, and a captured graph makes its own anew in every replay.
    Everything starts at 1, for the sake of one fill, and of a word that is true if not written.
    """
    lanes, _, groups = grid(problem, plan)
    return torch.ones(1 + plan.turns * lanes * groups, 32, dtype=torch.int32, device=device)


def check_gangs(words: Tensor, plan: LaunchPlan) -> None:
    """Have the device raise if a program of a cooperative launch gave up waiting for its gang.

    The assertion runs behind the kernel, on its stream. On a GPU it is the next call that
    synchronises with the device (``torch.cuda.synchronize``, ``Tensor.item``, ``Tensor.cpu``, ...)
    that raises a RuntimeError, like for any assertion in a kernel, and with the assertion's text
    on stderr: no number made of the walk can be read before. On the CPU it is this one.

    Raises:
        RuntimeError: on the CPU, a program gave up.
    """
    # On CUDA torch takes no text of more than 254 characters.
    torch._assert_async(
        words[0, 0],
        "tritonrnn: a program of a recurrence waited in vain for the others of its gang; what was "
        f"computed is wrong. Launched: {plan.programs} programs of {plan.block_h} hidden units on "
        f"{plan.device.multiprocessors} multiprocessors ({plan.device.arch})",
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
    """Every argument of the plan's kernel, and the compiler's options.

    Of a stepwise plan all but ``step``, the one to walk.
    """
    B, G, H = problem.B, problem.G, problem.H
    assert a.shape == (layout.N, G * H)
    assert M.shape == (G, H, H)
    assert v_0 is None or v_0.shape == (G, B, H)
    assert aux is None or aux.shape == a.shape
    assert (aux is not None) == problem.epilogue.endswith("_grad")
    assert v_0 is None or v_0.dtype == torch.float32
    assert all(matrix is None or matrix.dtype == a.dtype for matrix in (M, aux))
    assert all(rows is None or rows.is_contiguous() for rows in (a, v_0, aux))
    # By these plans a may be read by whole words, which must not begin between two.
    odd_rows = H * a.element_size() % 4 != 0
    assert plan.name not in ("registers", "resident") or odd_rows or a.data_ptr() % 4 == 0
    assert plan.epilogue in (problem.epilogue, f"{problem.epilogue}_approx")
    # One bit a group, in an argument of 32 bits.
    assert G < 32
    # A matrix that fits multiprocessors may be a view into a larger one; the kernel counts what
    # lies between its numbers in 32 bits there.
    too_wide = (H - 1) * (abs(M.stride(1)) + abs(M.stride(2))) >= 2**31
    # Shared memory is read in wide pieces along rows only where numbers have 16 bits: a transposed
    # M would be read number by number in every step. Registers take pairs along rows.
    along_rows = a.dtype == torch.float32 or plan.name == "registers"
    if plan.name != "stepwise" and (along_rows or too_wide):
        M = M.contiguous()
    cooperative = plan.name == "cooperative"
    options: dict[str, Any] = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    if cooperative and not triton.knobs.runtime.interpret:
        # The driver refuses a grid whose programs can't all run at the same time.
        options["launch_cooperative_grid"] = True
    arguments = {
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
        "reverse_groups": sum(1 << group for group, backwards in enumerate(reverse) if backwards),
        "G": G,
        "H": H,
        "EPILOGUE": plan.epilogue,
        "PRECISION": plan.precision,
        "INTERPRETED": triton.knobs.runtime.interpret,
        "BLOCK_H": plan.block_h,
        "BLOCK_B": plan.block_b,
        **options,
    }
    if plan.name == "registers":
        return arguments
    if plan.name != "stepwise":
        arguments["step"] = 0
    stride_m_group, stride_m_row, stride_m_column = M.stride()
    return arguments | {
        "stride_m_group": stride_m_group,
        "stride_m_row": stride_m_row,
        "stride_m_column": stride_m_column,
        "gang_ptr": gang_words(problem, plan, a.device) if cooperative else None,
        "PLAN": plan.name,
        "PATIENCE": PATIENCE if cooperative else 0,
        "BLOCK_K": plan.block_k,
        "BLOCK_READ": plan.block_read,
        "TURNS": plan.turns,
        "NUM_STAGES": plan.num_stages,
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
