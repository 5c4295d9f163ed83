"""Launch a plan's kernel: row map, arguments, grid."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor

from tritonrnn.kernels.common import Constants
from tritonrnn.kernels.cooperative import CooperativeConstants, cooperative_kernel
from tritonrnn.kernels.devices import device_of
from tritonrnn.kernels.launcher import launcher
from tritonrnn.kernels.plan import (
    PLANS,
    LaunchPlan,
    Problem,
    cdiv,
    max_registers,
    plan_named,
    uses_wgmma,
)
from tritonrnn.kernels.resident import ResidentConstants, resident_kernel
from tritonrnn.kernels.stepwise import StepwiseConstants, stepwise_kernel
from tritonrnn.layout import SequenceLayout, is_in_memory

_INTERPRETED = triton.knobs.runtime.interpret
# Polls until a program gives up waiting: some seconds on a GPU, where a poll is a round trip to L2,
# and as long in the interpreter, at 50 microseconds a poll.
MAX_SPINS = 200_000 if _INTERPRETED else 20_000_000
# In a trial 0.2 s at most, were a poll to take a microsecond.
MAX_SPINS_IN_TRIAL = MAX_SPINS // 100
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Triton before 3.7.1 leaves out the proxy fence between an async copy and the wgmma that reads what
# it brought (https://github.com/triton-lang/triton/issues/10537). No other plan's product reads
# what was copied so; a stepwise product's tiles go through registers in these versions.
_LACKS_FENCES = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) < (3, 7, 1)

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
    plan: LaunchPlan | str,
    s: Tensor | None = None,
    with_ends: bool = True,
    otherwise: Tensor | None = None,
    compile_only: bool = False,
) -> Tensor | None:
    """Compute ``s_t = E(a_t + v_t, aux_t)``, ``v_t = M s_{t-1}``.

    Args:
        a: ``[N, G * H]``, contiguous: the drive, or the gradient of the output.
        v_0: ``[G, B, H]``, fp32 or as a, contiguous: v at each sequence's own first step of the
            walk, in a reverse group its last token. None for zero.
        M: ``[G, H, H]`` in the dtype of a, of any strides.
        aux: ``[N, G * H]``, contiguous: the output of the forward pass, for the gradients.
        layout: where every token of the batch lives.
        epilogue: ``tanh``, ``relu``, ``tanh_grad`` or ``relu_grad``.
        reverse: for each group, whether it walks from a sequence's last step to its first.
        tf32: whether fp32 products may round their operands to TF32.
        plan: the plan to launch, or the name of one.
        s: as a, where s is stored, and 0 in padding rows; None to store over a.
        with_ends: whether to return the s that each sequence's walk ends with.
        otherwise: ``[G, B, H]``, what to return for sequences without a token, in the forward pass
            only; None for zero.
        compile_only: whether to compile what would be launched, and launch nothing. Several threads
            may do so at the same time.

    Returns:
        ``[G, B, H]`` in the dtype of a, or None; B counts the sequences of ``layout.parent``.

    Raises:
        RuntimeError: the named plan does not fit.
    """
    s = a if s is None else s
    if a.numel() == 0:
        return layout.final_states(s, reverse, otherwise) if with_ends else None
    v_0 = v_0 if v_0 is None or is_in_memory(v_0) else v_0.clone()
    M = M if is_in_memory(M) else M.clone()
    if (a.data_ptr() | s.data_ptr()) % 16 != 0:
        # Kernels access memory by vectors of 16 bytes. What the package allocates is aligned so;
        # the gradient of an output may be a part of a larger tensor.
        aligned = a.clone() if a.data_ptr() % 16 != 0 else a
        into = s if s.data_ptr() % 16 == 0 else torch.empty_like(aligned)
        ends = recurrence(
            aligned,
            v_0,
            M,
            aux,
            layout,
            epilogue=epilogue,
            reverse=reverse,
            tf32=tf32,
            with_ends=with_ends,
            otherwise=otherwise,
            plan=plan,
            s=into,
            compile_only=compile_only,
        )
        if into is not s and not compile_only:
            s.copy_(into)
        return ends
    if aux is not None and aux.data_ptr() % 16 != 0:
        aux = aux.clone()
    problem = problem_of(a, layout, G=len(reverse), epilogue=epilogue, tf32=tf32)
    if isinstance(plan, str):
        plan = plan_named(_forced or plan, problem, device_of(a.device))
    # Where resets split sequences, the kernels know the parts only.
    is_split = layout.parent is not layout
    live = layout.live_rows(a.device) if is_split else None
    if live is not None:
        s.masked_fill_(~live[:, None], 0)
    ends = None
    if with_ends and not is_split:
        ends = _empty_ends(a, layout, problem, otherwise)
    arguments = kernel_arguments(a, s, v_0, M, aux, ends, layout, problem, reverse, plan)
    kernel, programs = kernel_of(plan), grid(problem, plan)
    _, compiled_for = _compiled_for(problem, plan)
    with _current_device(a):
        if compile_only:
            first_step = {"step": 0} if plan.name == "stepwise" else {}
            kernel.warmup(grid=programs, **first_step, **arguments)
            return ends
        if plan.name == "stepwise":
            launch = launcher(kernel, programs, arguments | {"step": 0}, compiled_for)
            for step in range(max(layout.T, 1)):
                launch(step=step)
        else:
            launcher(kernel, programs, arguments, compiled_for)()
        if plan.waits:
            if _trial.counters is None:
                check_barrier(arguments["counters_ptr"], plan)
            else:
                _trial.counters.append(arguments["counters_ptr"])
    return layout.final_states(s, reverse, otherwise) if with_ends and is_split else ends


def _current_device(a: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one; to enter a context costs more than to ask."""
    if not a.is_cuda or a.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(a.device)


def _empty_ends(
    a: Tensor, layout: SequenceLayout, problem: Problem, otherwise: Tensor | None
) -> Tensor:
    """Allocate what a kernel stores the ends of walks in."""
    shape = problem.G, problem.B, problem.H
    if not layout.is_ragged or problem.epilogue.endswith("_grad"):
        return a.new_empty(shape)
    # Of a sequence without a token, a forward pass stores nothing.
    if otherwise is None:
        return a.new_zeros(shape)
    return otherwise.clone(memory_format=torch.contiguous_format)


class _Trial(threading.local):
    # Of the launches of a trial in this thread, or None outside of one.
    counters: list[Tensor] | None = None


_trial = _Trial()


@contextmanager
def trial() -> Iterator[None]:
    """Launch in this thread as a trial: a wait is short, and its end is raised here.

    A device assertion would make the GPU unusable for the process.

    Raises:
        BarrierTimeoutError: a program of a launch inside gave up waiting.
    """
    counters: list[Tensor] = []
    before, _trial.counters = _trial.counters, counters
    try:
        yield
    finally:
        _trial.counters = before
    if not all(bool(words[0, 0]) for words in counters):
        raise BarrierTimeoutError("a program gave up waiting for the others of its CTA group")


class BarrierTimeoutError(RuntimeError):
    """A program of a cooperative launch in a trial gave up waiting."""


@contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Launch every recurrence by the plan of this name, also those of a backward pass.

    For tests and measurements. It holds for the whole process, not for a thread: a GPU's backward
    pass runs in a thread of its own. It takes the place of a plan's name, not of a plan.

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


def is_plan_forced() -> bool:
    """Return whether :func:`forced_plan` holds."""
    return _forced is not None


def problem_of(a: Tensor, layout: SequenceLayout, *, G: int, epilogue: str, tf32: bool) -> Problem:
    """Return what a plan needs to know of a call."""
    H = a.shape[1] // G
    return Problem(layout.T, layout.B, G, H, DTYPES[a.dtype], tf32, epilogue)


def kernel_of(plan: LaunchPlan) -> Any:
    """Return the kernel that a plan launches."""
    if plan.name == "registers":
        # Only here, as Gluon takes its time to import, and the interpreter does not know it.
        from tritonrnn.kernels.registers import registers_kernel

        return registers_kernel
    return {
        "resident": resident_kernel,
        "cooperative": cooperative_kernel,
        "stepwise": stepwise_kernel,
    }[plan.name]


def grid(problem: Problem, plan: LaunchPlan) -> tuple[int, int, int]:
    """Return the programs by batch block (or CTA group), block of hidden units and group."""
    blocks_b, blocks_h = cdiv(problem.B, plan.block_b), cdiv(problem.H, plan.block_h)
    if plan.name == "cooperative":
        blocks_b = plan.programs // (blocks_h * problem.G)
    return blocks_b, blocks_h, problem.G


def barrier_counters(problem: Problem, plan: LaunchPlan, device: torch.device) -> Tensor:
    """Make the counters of a cooperative launch, and in front of them a word for its failure.

    New ones for every launch: so calls on two streams share none, and a captured graph makes its
    own anew in every replay. Everything starts at 1, for the sake of one fill, and of a word that
    is true if nobody writes it.
    """
    num_cta_groups, _, groups = grid(problem, plan)
    rows = 1 + plan.interleave * num_cta_groups * groups
    return torch.ones(rows, 32, dtype=torch.int32, device=device)


def check_barrier(counters: Tensor, plan: LaunchPlan) -> None:
    """Have the device raise if a program of a cooperative launch gave up waiting.

    The assertion runs after the kernel, on its stream. On a GPU the next call that synchronises
    with the device (``torch.cuda.synchronize``, ``Tensor.item``, ``Tensor.cpu``, ...) raises a
    RuntimeError, as for any assertion in a kernel, and the assertion's text is on stderr: no value
    made of the walk can be read before. On the CPU this call raises.

    Raises:
        RuntimeError: on the CPU, a program gave up.
    """
    # On CUDA torch takes no text of more than 254 characters.
    torch._assert_async(
        counters[0, 0],
        "tritonrnn: a program of a recurrence gave up waiting for the others of its CTA group; the "
        f"result is wrong. Launched: {plan.programs} programs of {plan.block_h} hidden units on "
        f"{plan.device.multiprocessors} multiprocessors ({plan.device.arch})",
    )


def kernel_arguments(
    a: Tensor,
    s: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    ends: Tensor | None,
    layout: SequenceLayout,
    problem: Problem,
    reverse: tuple[bool, ...],
    plan: LaunchPlan,
) -> dict[str, Any]:
    """Return every argument of the plan's kernel, and the compiler's options.

    Of a stepwise plan all but ``step``, the one to walk.
    """
    B, G, H = problem.B, problem.G, problem.H
    for rows in (a, s) if aux is None else (a, s, aux):
        assert rows.shape == (layout.N, G * H)
        assert rows.is_contiguous()
        assert rows.data_ptr() % 16 == 0
        assert rows.dtype == a.dtype
    assert M.shape == (G, H, H)
    assert M.dtype == a.dtype
    assert (aux is not None) == problem.epilogue.endswith("_grad")
    if v_0 is not None:
        assert v_0.shape == (G, B, H)
        assert v_0.is_contiguous()
        assert v_0.dtype in (torch.float32, a.dtype)
    if ends is not None:
        assert ends.shape == (G, B, H)
        assert ends.is_contiguous()
        assert ends.dtype == a.dtype
    assert plan.epilogue in (problem.epilogue, f"{problem.epilogue}_approx")
    # One bit a group, in an argument of 32 bits.
    assert G < 32
    # A matrix that fits multiprocessors may be a view into a larger one; the kernel counts the
    # distance between its elements in 32 bits there.
    too_wide = (H - 1) * (M.stride(1) + M.stride(2)) >= 2**31
    # Shared memory is read in wide pieces along rows only where elements have 16 bits: a transposed
    # M would be read element by element in every step.
    along_rows = a.dtype == torch.float32 and plan.name != "registers"
    if plan.name != "stepwise" and (along_rows or too_wide):
        M = M.contiguous()
    time_base, batch_base, lengths = layout.terms(a.device)
    stride_time, stride_batch = layout.strides
    arguments: dict[str, Any] = {
        "a_ptr": a,
        "s_ptr": s,
        "v_0_ptr": v_0,
        "m_ptr": M,
        "aux_ptr": aux,
        "ends_ptr": ends,
        "time_base_ptr": time_base,
        "batch_base_ptr": batch_base,
        "lengths_ptr": lengths,
        "T": layout.padded_T,
        "B": B,
        "stride_time": stride_time,
        "stride_batch": stride_batch,
        "stride_m_group": M.stride(0),
        "stride_m_row": M.stride(1),
        "stride_m_column": M.stride(2),
        "reverse_groups": _bits(reverse),
        **_compiled_for(problem, plan)[0],
    }
    if plan.name == "cooperative":
        arguments["counters_ptr"] = barrier_counters(problem, plan, a.device)
        arguments["max_spins"] = MAX_SPINS if _trial.counters is None else MAX_SPINS_IN_TRIAL
    return arguments


@functools.cache
def _bits(reverse: tuple[bool, ...]) -> int:
    """Return a number that has the bit of each group that walks backwards."""
    return sum(1 << group for group, backwards in enumerate(reverse) if backwards)


@functools.lru_cache(maxsize=1024)
def _compiled_for(
    problem: Problem, plan: LaunchPlan
) -> tuple[Mapping[str, Any], tuple[Hashable, ...]]:
    """Return the arguments that a kernel is compiled for, and what stands for them.

    They are its constants and the compiler's options.
    """
    arguments: dict[str, Any] = {
        "C": _constants(problem, plan),
        "num_warps": plan.num_warps,
        "num_stages": 1 if plan.name == "stepwise" and _LACKS_FENCES else plan.num_stages,
    }
    registers = max_registers(problem, plan)
    if registers is not None:
        arguments["maxnreg"] = registers
    if plan.name == "cooperative" and not _INTERPRETED:
        # The driver refuses a grid whose programs can't all run at the same time.
        arguments["launch_cooperative_grid"] = True
    return MappingProxyType(arguments), (plan.name, *arguments.values())


def _constants(problem: Problem, plan: LaunchPlan) -> Constants:
    shared = {
        "G": problem.G,
        "H": problem.H,
        "EPILOGUE": plan.epilogue,
        "PRECISION": plan.precision,
        "INTERPRETED": _INTERPRETED,
        "BLOCK_H": plan.block_h,
        "BLOCK_B": plan.block_b,
    }
    if plan.name == "registers":
        from tritonrnn.kernels.registers import RegistersConstants

        return RegistersConstants(
            **shared,
            BLOCK_K=plan.block_k,
            ITEM_BITS=8 * problem.item_bytes,
            NUM_WARPS=plan.num_warps,
            USES_WGMMA=uses_wgmma(problem, plan.device),
            HAS_ODD_WORDS=problem.has_odd_words,
        )
    if plan.name == "resident":
        return ResidentConstants(**shared, BLOCK_K=plan.block_k, NUM_STAGES=plan.num_stages)
    if plan.name == "cooperative":
        return CooperativeConstants(
            **shared,
            BLOCK_K=plan.block_k,
            BLOCK_READ=plan.block_read,
            NUM_SUMS=plan.num_sums,
            INTERLEAVE=plan.interleave,
        )
    assert plan.name == "stepwise"
    return StepwiseConstants(**shared, BLOCK_K=plan.block_k)
