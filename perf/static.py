"""Compile the kernel's plans for a GPU that is not there, and read what came out.

A launch and this module share every argument (``launch.kernel_arguments``); tensors on the meta
device stand in for real ones. So Triton specialises here exactly as it does for a launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import triton
import typer
from triton.backends.compiler import GPUTarget

from tritonrnn.kernels import launch
from tritonrnn.kernels.plan import (
    DEVICES,
    DeviceLimits,
    LaunchPlan,
    Problem,
    cooperative_plan,
    resident_plan,
    stepwise_plan,
)
from tritonrnn.kernels.recurrence import recurrence_kernel
from tritonrnn.layout import SequenceLayout

EPILOGUES = ("tanh", "relu", "tanh_grad", "relu_grad")
HIDDEN_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536)
# dtype of the tensors, and whether fp32 products may be TF32.
DTYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
T = 1024


class _Target:
    """Stands in for Triton's driver where there is no device."""

    def __init__(self, device: DeviceLimits):
        backend = "hip" if device.is_amd else "cuda"
        arch = device.arch if device.is_amd else int(device.arch.removeprefix("sm_"))
        self.target = GPUTarget(backend, arch, device.warp_size)

    def get_current_device(self) -> str:
        # The kernel's cache is kept by device: another target must be another device.
        return str(self.target.arch)

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Compiled:
    """One plan, compiled: the compiler's listings and what they say."""

    plan: LaunchPlan
    shared_bytes: int
    compile_s: float
    assembly: dict[str, Any]

    @property
    def resources(self) -> tuple[int, int]:
        """Registers a thread, and bytes a thread spills to memory."""
        if self.plan.device.is_amd:
            listing = self.assembly["amdgcn"]
            spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", listing)
            return _number(r"\.vgpr_count:\s+(\d+)", listing), 4 * spilled
        listing = _cuda_tool("cuobjdump", "--dump-resource-usage", self.assembly["cubin"])
        return _number(r"REG:(\d+)", listing), _number(r"STACK:(\d+)", listing)

    @property
    def sass(self) -> list[str]:
        """The instructions of the kernel, each with its address."""
        listing = _cuda_tool("cuobjdump", "-sass", self.assembly["cubin"])
        return re.findall(r"^\s+/\*([0-9a-f]{4,}\*/\s+.*?);", listing, re.MULTILINE)


def compile_plan(problem: Problem, plan: LaunchPlan, dtype: torch.dtype) -> Compiled:
    """Compile a plan as a launch over a padded batch, with v_0 given, would."""
    layout = SequenceLayout.time_major(problem.T, problem.B)
    backward = problem.epilogue.endswith("_grad")

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    G, H = problem.G, problem.H
    M = meta(G, H, H)
    a = meta(layout.N, G * H)
    triton.runtime.driver.set_active(_Target(plan.device))
    started = time.perf_counter()
    kernel = recurrence_kernel.warmup(
        first_step=0,
        last_step=1 if plan.name == "stepwise" else problem.T,
        grid=launch.grid(problem, plan),
        **launch.kernel_arguments(
            a,
            meta(G, problem.B, H, dtype=torch.float32),
            M.transpose(1, 2) if backward else M,
            meta(*a.shape) if backward else None,
            layout,
            problem,
            (False, True) if G == 2 else (False,),
            plan,
        ),
    )
    return Compiled(plan, kernel.metadata.shared, time.perf_counter() - started, kernel.asm)


def time_loop(sass: list[str], nested: bool = False) -> list[str]:
    """The instructions of the time loop.

    A loop is a branch to a lower address. The time loop is the longest of them or, nested in
    the loop over batch blocks of a cooperative plan, the shortest that has all matrix instructions
    of the kernel.
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
    """How many of the instructions are of one kind."""
    pattern = re.compile(rf"\*/\s+(?:@!?\w+\s+)?{mnemonic}\b")
    return sum(bool(pattern.search(line)) for line in instructions)


def problems(
    dtypes: list[str], sizes: tuple[int, ...], epilogues: tuple[str, ...], B: int
) -> Iterator[tuple[str, Problem]]:
    """The spread of shapes that the table shows, each with the name of its arithmetic."""
    for name, H, epilogue in product(dtypes, sizes, epilogues):
        dtype, tf32 = DTYPES[name]
        yield name, Problem(T, B, 1, H, launch.DTYPES[dtype], tf32, epilogue)


def table(
    arch: str,
    dtypes: list[str] | None = None,
    sizes: tuple[int, ...] = HIDDEN_SIZES,
    epilogues: tuple[str, ...] = EPILOGUES,
    B: int = 16,
) -> pd.DataFrame:
    """One row a plan that fits the device."""
    device = DEVICES[arch]
    rows = []
    for name, problem in problems(dtypes or list(DTYPES), sizes, epilogues, B):
        for choose in (resident_plan, cooperative_plan, stepwise_plan):
            plan = choose(problem, device)
            if plan is not None:
                rows.append(_row(name, problem, compile_plan(problem, plan, DTYPES[name][0])))
    return pd.DataFrame(rows)


def _row(name: str, problem: Problem, compiled: Compiled) -> dict[str, Any]:
    plan = compiled.plan
    registers, spill_bytes = compiled.resources
    row = {
        "arch": plan.device.arch,
        "dtype": name,
        "H": problem.H,
        "plan": plan.name,
        "epilogue": problem.epilogue,
        "block_h": plan.block_h,
        "block_b": plan.block_b,
        "num_warps": plan.num_warps,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "planned_bytes": plan.shared_bytes,
    }
    if not plan.device.is_amd:
        step = time_loop(compiled.sass, nested=plan.name == "cooperative")
        row |= {
            "sass_per_step": len(step),
            "hgmma": count(step, "HGMMA"),
            "hmma": count(step, "HMMA"),
            "bar": count(step, "BAR"),
        }
    return row | {"compile_s": round(compiled.compile_s, 2)}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1])


def _cuda_tool(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run(
            [path, option, file.name], check=True, capture_output=True, text=True
        ).stdout


def static(
    arch: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942.")] = "sm_90",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, too.")] = None,
) -> None:
    """Compile every plan for a GPU that need not be there, and show what the compiler made."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("Nothing is compiled where TRITON_INTERPRET is set.")
    if arch not in DEVICES or DEVICES[arch].is_interpreter:
        raise typer.BadParameter(f"Expected --arch to be one of {', '.join(DEVICES)}, got {arch}.")
    rows = table(arch)
    typer.echo(rows.to_string(index=False))
    if json is not None:
        rows.to_json(json, orient="records", indent=1)


if __name__ == "__main__":
    typer.run(static)
