"""Compile the plans' kernels for a GPU that is not there, and read the listings.

A launch and this module share every argument (``launch.kernel_arguments``); tensors on the meta
device stand in for real ones. So Triton specialises here exactly as it does for a launch.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
import torch
import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget

from perf.compile import listing
from perf.compile.listing import count, time_loop
from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES, Device
from tritonrnn.kernels.plan import EPILOGUES, PLANS, LaunchPlan, Problem
from tritonrnn.layout import SequenceLayout

# GPUs that can be compiled for.
ARCHS = [name for name, device in DEVICES.items() if not device.is_interpreter]
# Up to what the largest shared memory holds. Round sizes, and odd ones between them: rows that are
# no whole number of vectors are loaded and stored element by element, with other layouts and more
# registers.
HIDDEN_SIZES = (
    *(16, 32, 64, 128, 256, 384, 512, 768, 1024, 1272, 1536, 2048),
    *(50, 97, 100, 201, 255, 333, 1023),
    # What a CTA group holds at most, on one device or another.
    *(656, 864, 1056, 1184, 1280, 1312, 1475, 1728, 1792, 2112, 2368),
)
# The simplest kernel and the one with everything: a layout, groups, and whether v_0 is given.
BATCHES = (("padded", 1, False), ("packed", 2, True))
# dtype of the tensors, and whether fp32 products may be TF32.
DTYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
T, B = 1024, 16
PLAN_COLUMNS = ("epilogue", "block_h", "block_b", "num_warps", "interleave")
# Steps of one iteration of a time loop, where that is not one.
STEPS_A_LOOP = {"registers": 4}


class TargetDriver:
    """Stand in for Triton's driver where there is no device."""

    def __init__(self, device: Device):
        backend = "hip" if device.is_amd else "cuda"
        arch = device.arch if device.is_amd else int(device.arch.removeprefix("sm_"))
        self.target = GPUTarget(backend, arch, device.warp_size)

    def get_current_device(self) -> str:
        """Return another device for another target: Triton keeps a kernel's cache by device."""
        return str(self.target.arch)

    def get_current_stream(self, device: Any = None) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what Triton compiles for."""
        return self.target


@dataclass(frozen=True)
class CompileCase:
    """What is compiled: a plan for a problem of one arithmetic, over a padded or a packed batch."""

    dtype: str
    problem: Problem
    layout: str
    has_v_0: bool
    plan: LaunchPlan


@dataclass(frozen=True)
class Compiled:
    """One plan, compiled: Triton's kernel, and what follows from the compiler's listing."""

    plan: LaunchPlan
    kernel: Any
    compile_s: float

    @property
    def step_sass(self) -> list[str]:
        """Return the time loop; of a stepwise kernel, which is one step, everything."""
        if self.plan.name == "stepwise":
            return self.sass
        return time_loop(self.sass, nested=self.plan.name == "cooperative")

    @property
    def sass(self) -> list[str]:
        """Return the instructions of the kernel, each with its address."""
        return listing.instructions(self.listing)

    @cached_property
    def listing(self) -> str:
        """Return AMD's assembly, or the resources and instructions of NVIDIA's kernel."""
        asm = self.kernel.asm
        return asm["amdgcn"] if self.plan.device.is_amd else listing.listing_of(asm["cubin"])


def compile_case(case: CompileCase) -> Compiled:
    """Compile a plan as a launch would."""
    problem, plan, dtype = case.problem, case.plan, DTYPES[case.dtype][0]
    T, B, G, H = problem.T, problem.B, problem.G, problem.H
    is_padded = case.layout == "padded"
    rows = SequenceLayout.time_major(T, B) if is_padded else SequenceLayout.packed((B,) * T, T * B)
    backward = problem.epilogue.endswith("_grad")

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    M = meta(G, H, H)
    a = meta(rows.N, G * H)
    triton.runtime.driver.set_active(TargetDriver(plan.device))
    started = time.perf_counter()
    step = {"step": 0} if plan.name == "stepwise" else {}
    kernel = launch.kernel_of(plan).warmup(
        **step,
        grid=launch.grid(problem, plan),
        **launch.kernel_arguments(
            a,
            meta(*a.shape) if backward else a,
            meta(G, B, H, dtype=dtype if backward else torch.float32) if case.has_v_0 else None,
            M.transpose(1, 2) if backward else M,
            meta(*a.shape) if backward else None,
            meta(G, B, H) if case.has_v_0 or not backward else None,
            rows,
            problem,
            (False, True) if G == 2 else (False,),
            plan,
        ),
    )
    return Compiled(plan, kernel, time.perf_counter() - started)


def compile_cases(
    arch: str,
    *,
    dtypes: Iterable[str] = tuple(DTYPES),
    sizes: Iterable[int] = HIDDEN_SIZES,
    epilogues: Iterable[str] = EPILOGUES,
    batches: Iterable[tuple[str, int, bool]] = BATCHES,
    plans: Iterable[str] = tuple(PLANS),
) -> list[CompileCase]:
    """Return every plan that fits the device, over a spread of shapes."""
    device = DEVICES[arch]
    found = []
    for name, H, epilogue, (layout, G, has_v_0) in product(dtypes, sizes, epilogues, batches):
        dtype, tf32 = DTYPES[name]
        problem = Problem(T, B, G, H, launch.DTYPES[dtype], tf32, epilogue)
        for plan in (PLANS[choice](problem, device) for choice in plans):
            if plan is not None:
                found.append(CompileCase(name, problem, layout, has_v_0, plan))
    return found


def spread(cases: Iterable[CompileCase]) -> list[CompileCase]:
    """Keep one case of each plan, dtype and size: each time another epilogue and layout."""
    plans: dict[str, dict[tuple[str, int], list[CompileCase]]] = {}
    for case in cases:
        of_plan = plans.setdefault(case.plan.name, {})
        of_plan.setdefault((case.dtype, case.problem.H), []).append(case)
    # Every third, of eight in turn.
    return [
        some[3 * i % len(some)]
        for of_plan in plans.values()
        for i, some in enumerate(of_plan.values())
    ]


def _compile_row(case: CompileCase) -> dict[str, Any]:
    # Otherwise a kernel from the cache would seem to compile in no time.
    triton.knobs.compilation.always_compile = True
    return row(case, compile_case(case))


def row(case: CompileCase, compiled: Compiled) -> dict[str, Any]:
    """Return the row of a compiled case."""
    problem, plan = case.problem, case.plan
    registers, spill_bytes = listing.resources(compiled.listing)
    made = {
        "arch": plan.device.arch,
        "dtype": case.dtype,
        "H": problem.H,
        "G": problem.G,
        "layout": case.layout,
        "v_0": case.has_v_0,
        "plan": plan.name,
        # The instructions below are of a step of as many batch blocks as are interleaved.
        **{name: getattr(plan, name) for name in PLAN_COLUMNS},
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.kernel.metadata.shared,
        "planned_bytes": plan.shared_bytes,
    }
    if not plan.device.is_amd:
        loop = compiled.step_sass
        steps = STEPS_A_LOOP.get(plan.name, 1)
        made |= {
            # Of the spilled registers, what is stored and loaded within the time loop.
            "spills_per_step": -(-count(loop, r"(?:LDL|STL)\S*") // steps),
            "sass_per_step": len(loop) // steps,
            **{name.lower(): count(loop, name) // steps for name in ("HGMMA", "HMMA", "BAR")},
        }
    return made | {"compile_s": round(compiled.compile_s, 2)}


def versions(arch: str) -> dict[str, str]:
    """Return the versions of the compilers that made the rows."""
    made_with = {"torch": torch.__version__, "triton": triton.__version__}
    if DEVICES[arch].is_amd:
        # Triton's own copy of LLVM.
        return made_with
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(int(arch.removeprefix("sm_")))
    return made_with | {"ptxas": tool.version}


def run(
    arch: str,
    dtypes: Sequence[str] | None = None,
    plans: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    every: bool = False,
) -> pd.DataFrame:
    """Run ``python -m perf static``: compile cases of some dtypes, plans and sizes, a row for each.

    One case of each plan, dtype and size, or ``every`` one.

    Raises:
        ValueError: an argument is not known, no plan fits, or Triton is set to interpret.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("Nothing is compiled where TRITON_INTERPRET is set.")
    for name, chosen, known in (
        ("arch", [arch], ARCHS),
        ("dtype", dtypes or [], list(DTYPES)),
        ("plan", plans or [], list(PLANS)),
    ):
        if not set(chosen) <= set(known):
            raise ValueError(f"Expected {name} to be one of {', '.join(known)}.")
    wanted = compile_cases(
        arch, dtypes=dtypes or DTYPES, plans=plans or PLANS, sizes=sizes or HIDDEN_SIZES
    )
    wanted = wanted if every else spread(wanted)
    if not wanted:
        raise ValueError("No plan fits.")
    processes = min(len(os.sched_getaffinity(0)), len(wanted))
    # New processes: what a fork would copy has threads, and the driver of this one.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        rows = pool.map(_compile_row, wanted)
        progress = track(rows, "compiling", len(wanted), console=Console(stderr=True))
        return pd.DataFrame(list(progress))
