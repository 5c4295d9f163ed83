"""Kernels compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# On the chain of a step, or to be kept off it. Waiting for a product leaves none under way; a wait
# that leaves one is none.
EVENT = (
    r"HGMMA|HMMA|WARPGROUP\.DEPBAR\S* gsb0, 0x0|DEPBAR\.LE SB0(?:, 0x\w+)?|LDGSTS|LDG\.E\S*"
    r"|\b(?:LDS|STS|LDSM|STSM|LDL|STL|BAR|FENCE|MEMBAR)\b"
)


def compile_in_a_fresh_process(code: str) -> str:
    """Run a script where kernels are compiled: here they may belong to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def kernels(spreads: Sequence[str]) -> list[dict[str, Any]]:
    """Compile ``perf.static.specimens`` of these arguments: what each is, and its time loop."""
    wanted = " + ".join(f"specimens({spread})" for spread in spreads)
    code = (
        "import json\n"
        "from perf.static import *\n"
        f"for specimen in {wanted}:\n"
        "    problem, plan = specimen.problem, specimen.plan\n"
        "    compiled = compile_plan(\n"
        "        problem, plan, DTYPES[specimen.dtype][0], specimen.layout, specimen.has_v_0\n"
        "    )\n"
        "    print(json.dumps({'H': problem.H, 'precision': plan.precision, 'stages':\n"
        "        plan.num_stages, 'layout': specimen.layout, 'bits': 8 * problem.item_bytes,\n"
        "        'has_aux': problem.epilogue.endswith('_grad'), 'spilled': compiled.resources[1],\n"
        "        'shared': compiled.shared_bytes, 'planned': plan.shared_bytes,\n"
        "        'loop': time_loop(compiled.sass)}))"
    )
    made = [json.loads(line) for line in compile_in_a_fresh_process(code).splitlines()]
    assert len(made) == len(spreads)
    return made


def events(loop: Sequence[str]) -> list[str]:
    """The events of a time loop, from a product on: a loop has neither beginning nor end."""
    # Without what ptxas puts in front of a copy, which does nothing.
    loop = [line for line in loop if "@!PT LDS RZ" not in line]
    start = next(i for i, line in enumerate(loop) if re.search("HGMMA|HMMA", line))
    return re.findall(EVENT, "\n".join([*loop[start:], *loop[:start]]))
