"""Compile the plans' kernels for a GPU that is not there, and read the listings.

A launch and this module share every argument (``launch.kernel_arguments``); tensors on the meta
device stand in for real ones. So Triton specialises here exactly as it does for a launch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import triton
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from triton.backends.compiler import GPUTarget

from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES, Device
from tritonrnn.kernels.plan import PLANS, LaunchPlan, Problem
from tritonrnn.layout import SequenceLayout

# GPUs that can be compiled for.
ARCHS = [name for name, device in DEVICES.items() if not device.is_interpreter]
EPILOGUES = ("tanh", "relu", "tanh_grad", "relu_grad")
# Up to what the largest shared memory holds. Round sizes, and odd ones between them: rows that are
# no whole number of vectors are loaded and stored element by element, with other layouts and more
# registers.
HIDDEN_SIZES = (
    *(16, 32, 64, 128, 256, 384, 512, 768, 1024, 1272, 1536, 2048),
    *(50, 97, 100, 201, 255, 333, 1023),
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
T = 1024
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
    """One plan, compiled: the compiler's listings and what follows from them.

    ``is_cooperative_launch``: whether the driver runs all programs at the same time or none.
    """

    plan: LaunchPlan
    shared_bytes: int
    is_cooperative_launch: bool
    compile_s: float
    assembly: dict[str, Any]

    @property
    def resources(self) -> tuple[int, int]:
        """Return the registers of a thread, and the bytes that a thread spills to memory."""
        if self.plan.device.is_amd:
            listing = self.assembly["amdgcn"]
            spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", listing)
            return _number(r"\.vgpr_count:\s+(\d+)", listing), 4 * spilled
        return _number(r"REG:(\d+)", self._listing), _number(r"STACK:(\d+)", self._listing)

    @property
    def sass(self) -> list[str]:
        """Return the instructions of the kernel, each with its address."""
        return re.findall(r"^\s+/\*([0-9a-f]{4,}\*/\s+.*?);", self._listing, re.MULTILINE)

    @property
    def step_sass(self) -> list[str]:
        """Return the time loop; of a stepwise kernel, which is one step, everything."""
        if self.plan.name == "stepwise":
            return self.sass
        return time_loop(self.sass, nested=self.plan.name == "cooperative")

    @cached_property
    def _listing(self) -> str:
        return listing_of(self.assembly["cubin"])


def listing_of(cubin: bytes) -> str:
    """Return what NVIDIA's ``cuobjdump`` prints of a kernel: its resources and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_case(case: CompileCase) -> Compiled:
    """Compile a plan as a launch would."""
    problem, plan, dtype = case.problem, case.plan, DTYPES[case.dtype][0]
    T, B, G, H = problem.T, problem.B, problem.G, problem.H
    rows = (
        SequenceLayout.time_major(T, B)
        if case.layout == "padded"
        else SequenceLayout.packed((B,) * T, T * B)
    )
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
    return Compiled(
        plan,
        kernel.metadata.shared,
        kernel.metadata.launch_cooperative_grid,
        time.perf_counter() - started,
        kernel.asm,
    )


def time_loop(sass: list[str], nested: bool = False) -> list[str]:
    """Return the instructions of the time loop.

    A loop is a branch to a lower address. The time loop is the longest of them or, nested in
    the loop over batch blocks of a cooperative plan, the shortest that has all MMAs of the kernel.
    """
    spans = [(0, 0)]
    addresses = [int(line.split("*/")[0], 16) for line in sass]
    for position, line in enumerate(sass):
        branch = re.search(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)*`?\(?(?:\.L_x_\d+|0x([0-9a-f]+))", line)
        if branch and branch[1] and int(branch[1], 16) < addresses[position]:
            spans.append((addresses.index(int(branch[1], 16)), position + 1))
    if nested:
        products = count(sass, r"H(?:G?)MMA")
        whole = [span for span in spans if count(sass[slice(*span)], r"H(?:G?)MMA") == products]
        start, end = min(whole, key=lambda span: span[1] - span[0])
    else:
        start, end = max(spans, key=lambda span: span[1] - span[0])
    return sass[start:end]


def count(instructions: list[str], mnemonic: str) -> int:
    """Return how many of the instructions are of one kind."""
    pattern = re.compile(rf"\*/\s+(?:@!?\w+\s+)?{mnemonic}\b")
    return sum(bool(pattern.search(line)) for line in instructions)


def compile_cases(
    arch: str,
    *,
    dtypes: Iterable[str] = tuple(DTYPES),
    sizes: Iterable[int] = HIDDEN_SIZES,
    epilogues: Iterable[str] = EPILOGUES,
    batches: Iterable[tuple[str, int, bool]] = BATCHES,
    plans: Iterable[str] = tuple(PLANS),
    B: int = 16,
) -> list[CompileCase]:
    """Return every plan that fits the device, over a spread of shapes."""
    device = DEVICES[arch]
    made = []
    for name, H, epilogue, (layout, G, has_v_0) in product(dtypes, sizes, epilogues, batches):
        dtype, tf32 = DTYPES[name]
        problem = Problem(T, B, G, H, launch.DTYPES[dtype], tf32, epilogue)
        for plan in (PLANS[choice](problem, device) for choice in plans):
            if plan is not None:
                made.append(CompileCase(name, problem, layout, has_v_0, plan))
    return made


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


def table(
    wanted: Sequence[CompileCase],
    *,
    processes: int | None = None,
    tick: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Compile every case and return one row each.

    Args:
        wanted: what to compile.
        processes: that compile at the same time; as many as there are cores, if not given.
        tick: called after each.
    """
    processes = processes or len(os.sched_getaffinity(0))
    # New processes: what a fork would copy has threads, and the driver of this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(wanted)), context) as pool:
        futures = [pool.submit(_compile_row, case) for case in wanted]
        try:
            for future in as_completed(futures):
                future.result()
                if tick is not None:
                    tick()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pd.DataFrame([future.result() for future in futures])


def _compile_row(case: CompileCase) -> dict[str, Any]:
    # Otherwise a kernel from the cache would seem to compile in no time.
    triton.knobs.compilation.always_compile = True
    return row(case, compile_case(case))


def row(case: CompileCase, compiled: Compiled) -> dict[str, Any]:
    """Return the row of a compiled case."""
    problem, plan = case.problem, case.plan
    registers, spill_bytes = compiled.resources
    made = {
        "arch": plan.device.arch,
        "dtype": case.dtype,
        "H": problem.H,
        "G": problem.G,
        "layout": case.layout,
        "v_0": case.has_v_0,
        "plan": plan.name,
        "epilogue": plan.epilogue,
        "block_h": plan.block_h,
        "block_b": plan.block_b,
        "num_warps": plan.num_warps,
        # The instructions below are of a step of as many batch blocks.
        "interleave": plan.interleave,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "planned_bytes": plan.shared_bytes,
    }
    if not plan.device.is_amd:
        loop = compiled.step_sass
        steps = STEPS_A_LOOP.get(plan.name, 1)
        made |= {
            # Of the spilled registers, what is stored and loaded within the time loop.
            "spills_per_step": -(-count(loop, r"(?:LDL|STL)\S*") // steps),
            "sass_per_step": len(loop) // steps,
            "hgmma": count(loop, "HGMMA") // steps,
            "hmma": count(loop, "HMMA") // steps,
            "bar": count(loop, "BAR") // steps,
        }
    return made | {"compile_s": round(compiled.compile_s, 2)}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1])


def versions(arch: str) -> dict[str, str]:
    """Return the versions of the compilers that made the rows."""
    made_with = {"torch": torch.__version__, "triton": triton.__version__}
    if DEVICES[arch].is_amd:
        # Triton's own copy of LLVM.
        return made_with
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(int(arch.removeprefix("sm_")))
    return made_with | {"ptxas": tool.version}


def static(
    arch: Annotated[str, typer.Option(help=f"One of {', '.join(ARCHS)}.")] = "sm_90",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, too.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only bf16, fp16, tf32, fp32.")] = None,
    plan: Annotated[list[str] | None, typer.Option(help="Only plans of this name.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Only this many hidden units.")] = None,
    every: Annotated[bool, typer.Option(help="Every epilogue and layout of each size.")] = False,
) -> None:
    """Compile every plan for a GPU that need not be there, and show what the compiler made."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("Nothing is compiled where TRITON_INTERPRET is set.")
    for option, chosen, known in (
        ("--arch", [arch], ARCHS),
        ("--dtype", dtype or [], list(DTYPES)),
        ("--plan", plan or [], list(PLANS)),
    ):
        if not set(chosen) <= set(known):
            raise typer.BadParameter(f"Expected {option} to be one of {', '.join(known)}.")
    wanted = compile_cases(
        arch, dtypes=dtype or tuple(DTYPES), plans=plan or tuple(PLANS), sizes=size or HIDDEN_SIZES
    )
    wanted = wanted if every else spread(wanted)
    if not wanted:
        raise typer.BadParameter("No plan fits.")
    columns = (TextColumn("compiled"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(wanted))
        rows = table(wanted, tick=lambda: progress.advance(bar))
    typer.echo(rows.to_string(index=False))
    if json is not None:
        rows.assign(**versions(arch)).to_json(json, orient="records", lines=True)


if __name__ == "__main__":
    typer.run(static)
