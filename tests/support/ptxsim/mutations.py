"""Mutations of a kernel's PTX: is each noticed?

What orders memory accesses is deleted or altered, one instruction at a time. A mutant that nobody
notices is either one too many in the program, or a hole in the emulator.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tests.support.ptxsim.case import KERNELS, Case, Prepared

CASES = {
    "resident": Case("resident", H=64, T=5, layout="packed", epilogue="tanh_grad"),
    "resident-fp32": Case("resident", "sm_90", "fp32", H=32, T=5, layout="ragged"),
    "registers": Case("registers", "sm_90", "fp16", T=5, layout="packed", epilogue="tanh_grad"),
    "registers-sm_80": Case("registers", "sm_80", T=5, layout="packed", epilogue="tanh_grad"),
    "cooperative": Case("cooperative", H=128, T=3, B=18, cta_groups=1),
    "stepwise": Case("stepwise", H=128, T=2, layout="packed"),
}
# What CTAs that wait for each other do wrong shows in some schedules only. What any of 13 shows,
# one of these does.
SCHEDULES = (12, 0, 1)
# Of what orders accesses, and (with ``every``) of what moves data and multiplies.
ORDER = (
    r"bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.commit_group|fence\.proxy\.async"
    r"|wgmma\.fence|wgmma\.commit_group|wgmma\.wait_group|(?:@%p\d+ )?atom\."
)
DATA = r"cp\.async\.c[ag]\.|wgmma\.mma_async|mma\.sync|st\.shared|stmatrix|@%p\d+ st\.global"
Change = tuple[str, str, Callable[[re.Match[str]], str]]
ALTERATIONS: list[Change] = [
    (
        "wait for one less",
        r"((?:cp\.async|wgmma)\.wait_group\S*\s+)(\d+)",
        lambda m: f"{m[1]}{int(m[2]) + 1}",
    ),
    ("relax the acquire", r"ld\.acquire", lambda m: "ld.relaxed"),
    ("relax the release", r"atom\.global\.gpu\.release", lambda m: "atom.global.gpu.relaxed"),
    (
        "read the counter one too high",
        r"(ld\.acquire\S+ (%r\d+), .*;)",
        lambda m: f"{m[1]} add.s32 {m[2]}, {m[2]}, 1;",
    ),
    ("add to another counter", r"(atom\..*\[ *%rd\d+ *)(\+ 0 )?\]", lambda m: f"{m[1]}+ 128 ]"),
]
DATA_ALTERATIONS: list[Change] = [
    ("transpose", r"((?:ld|st)matrix\S*?)\.trans", lambda m: m[1]),
    ("store for all threads", r"@%p\d+ (st\.global)", lambda m: m[1]),
    # The constant part of a descriptor.
    ("another stride", r"(or\.b64.*, )(-?\d{12,})", lambda m: f"{m[1]}{int(m[2]) ^ 1 << 34}"),
    ("another swizzle", r"(or\.b64.*, )(-?\d{12,})", lambda m: f"{m[1]}{int(m[2]) ^ 1 << 62}"),
]


@dataclass(frozen=True)
class Mutant:
    """A changed program.

    Args:
        change: what was changed, and the function of the kernel where.
        line: of the PTX.
        text: the program.
        fault: what was noticed; nothing if empty.
    """

    change: str
    line: int
    text: str = ""
    fault: str = ""


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    path = KERNELS / file
    tree = ast.parse(path.read_text() if path.exists() else "")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node.lineno, node.end_lineno or 0, node.name) for node in functions]


def _function_at(location: str) -> str:
    """Return the name of the function that contains ``file:line``."""
    file, line, *_ = location.split(":")
    found = (name for first, last, name in _functions(file) if first <= int(line) <= last)
    return next(found, file)


def mutants(text: str, every: bool = False) -> Iterator[Mutant]:
    """Yield each mutation of a program, of its data, too, if ``every``."""
    lines = text.split("\n")
    deleted = f"({ORDER}|{DATA})" if every else f"({ORDER})"
    function = ""
    for i, line in enumerate(lines):
        if line.lstrip().startswith(".loc") and "// " in line:
            function = _function_at(line.partition("// ")[2].split("@")[0].strip())
        code = line.split("//")[0].strip()
        changed = []
        if re.match(deleted, code):
            changed.append(("delete", [""]))
        if re.match(r"fence\.proxy\.async|cp\.async\.wait_group", code):
            # Behind the barrier that comes next.
            later = next((j for j in range(i, len(lines)) if "bar.sync" in lines[j]), i)
            changed.append(("postpone", ["", *lines[i + 1 : later + 1], line]))
        for change, pattern, new in ALTERATIONS + (DATA_ALTERATIONS if every else []):
            altered = re.sub(pattern, new, code)
            if altered != code:
                changed.append((change, [altered]))
        # The back edge of a loop that spins.
        edge = re.match(r"@%p\d+ bra\s+(\S+);", code)
        near = "\n".join(lines[max(0, i - 30) : i])
        if edge and "ld.acquire" in near and f"{edge[1]}:" in near:
            changed.append(("leave the loop that spins", [""]))
        opcode = re.sub(r"^@%p\d+ ", "", code).split(" ")[0].split("\t")[0].rstrip(";")
        for change, new_lines in changed:
            mutated = "\n".join([*lines[:i], *new_lines, *lines[i + len(new_lines) :]])
            yield Mutant(f"{change}: {opcode} in {function}", i + 1, mutated)


def judge(
    prepared: Prepared, every: bool = False, schedules: Sequence[int] = SCHEDULES
) -> list[Mutant]:
    """Emulate every mutant whose instruction is executed, each until something is noticed.

    Args:
        prepared: the kernel.
        every: whether loads, stores and products are mutated, too.
        schedules: of a cooperative kernel; all others have one.

    Raises:
        RuntimeError: something is noticed in the program as it is.
    """
    clean = prepared.emulate()
    if not clean.passed:
        raise RuntimeError(f"{prepared.case}: {clean}")
    schedules = schedules if prepared.plan.name == "cooperative" else (0,)
    judged = []
    for mutant in mutants(prepared.ptx, every):
        if mutant.line in clean.unexecuted:
            continue
        fault = ""
        for schedule in schedules:
            result = prepared.emulate(mutant.text, schedule=schedule, stop=True)
            if not result.passed:
                fault = result.error or (result.faults or ["wrong output"])[0]
                break
        judged.append(replace(mutant, text="", fault=fault))
    return judged
