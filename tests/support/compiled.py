"""Compile kernels for GPUs that need not be there, in a process where none is interpreted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
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
    done = run_uninterpreted(
        ["-m", "tests.support.compiled"], json.dumps([asdict(kernel) for kernel in kernels])
    )
    return dict(zip(kernels, map(json.loads, done.splitlines()), strict=True))


def run_uninterpreted(arguments: Sequence[str], given: str = "") -> str:
    """Run Python where TRITON_INTERPRET is not set: here, kernels may belong to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        check=True,
        input=given,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def events(step_sass: Sequence[str]) -> list[str]:
    """Return the events of a time loop from a product on: a loop has neither beginning nor end."""
    # Without what ptxas puts in front of a copy, which does nothing.
    loop = [line for line in step_sass if "@!PT LDS RZ" not in line]
    start = next(i for i, line in enumerate(loop) if re.search("HGMMA|HMMA", line))
    return re.findall(EVENT, "\n".join([*loop[start:], *loop[:start]]))


def main() -> None:
    """Compile the kernels of standard input and print a row each."""
    from perf.compile import static

    batches = {batch[0]: batch for batch in static.BATCHES}
    for kernel in (Kernel(**fields) for fields in json.load(sys.stdin)):
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


if __name__ == "__main__":
    main()
