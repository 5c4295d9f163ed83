"""Compile kernels for GPUs that need not be there, in a process where none is interpreted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.processes import run_alone

# Instructions on the chain of a step, or to be kept off it. Waiting for a product leaves none in
# flight; a wait that leaves one is none.
EVENT = (
    r"HGMMA|HMMA|WARPGROUP\.DEPBAR\S* gsb0, 0x0|DEPBAR\.LE SB0(?:, 0x\w+)?|LDGSTS|LDG\.E\S*"
    r"|\b(?:LDS|STS|LDSM|STSM|LDL|STL|BAR|FENCE|MEMBAR)\b"
)


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile: padded without v_0 in one group, or packed with v_0 in two."""

    plan: str
    arch: str
    dtype: str
    H: int
    epilogue: str
    layout: str = "packed"

    def __str__(self) -> str:
        return f"{self.plan}-{self.arch}-{self.dtype}-H{self.H}-{self.epilogue}-{self.layout}"


def compile_kernels(kernels: Sequence[Kernel]) -> dict[Kernel, dict[str, Any]]:
    """Compile kernels: for each its row of ``perf static``, and its instructions.

    Besides the columns of ``perf static`` a row has ``num_stages``, ``precision``,
    ``is_cooperative_launch`` and, on NVIDIA, ``sass`` and ``step_sass``.
    """
    # Here, kernels may belong to the interpreter.
    printed = run_alone(f"from tests.support.compiled import *; compile_here({list(kernels)})")
    return dict(zip(kernels, map(json.loads, printed.splitlines()), strict=True))


def events(step_sass: Sequence[str]) -> list[str]:
    """Return the events of a time loop from a product on: a loop has neither beginning nor end."""
    # Without what ptxas puts in front of a copy, which does nothing.
    loop = [line for line in step_sass if "@!PT LDS RZ" not in line]
    start = next(i for i, line in enumerate(loop) if re.search("HGMMA|HMMA", line))
    return re.findall(EVENT, "\n".join([*loop[start:], *loop[:start]]))


def compile_here(kernels: Sequence[Kernel]) -> None:
    """Compile kernels and print a row each."""
    from perf.compile import static

    batches = {batch[0]: batch for batch in static.BATCHES}
    for kernel in kernels:
        (case,) = static.compile_cases(
            kernel.arch,
            dtypes=[kernel.dtype],
            sizes=[kernel.H],
            epilogues=[kernel.epilogue],
            batches=[batches[kernel.layout]],
            plans=[kernel.plan],
        )
        compiled = static.compile_case(case)
        row = static.row(case, compiled) | {
            "num_stages": case.plan.num_stages,
            "precision": case.plan.precision,
            "is_cooperative_launch": bool(compiled.kernel.metadata.launch_cooperative_grid),
        }
        if not case.plan.device.is_amd:
            row |= {"sass": compiled.sass, "step_sass": compiled.step_sass}
        print(json.dumps(row), flush=True)
