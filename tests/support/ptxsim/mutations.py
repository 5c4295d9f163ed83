"""Mutations of a kernel's PTX: is each noticed?

What orders memory accesses is deleted or altered, one instruction at a time. A mutant that nobody
notices is either one too many in the program, or a hole in the emulator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tests.support.ptxsim.case import Case, Prepared

CASES = [
    Case("resident", "sm_90", "bf16", H=64, T=5, layout="packed", epilogue="tanh_grad"),
    Case("resident", "sm_80", "fp32", H=32, T=5, layout="ragged", epilogue="relu"),
    Case("registers", "sm_90", "fp16", H=64, T=5, layout="packed", epilogue="tanh_grad"),
    Case("cooperative", "sm_90", "bf16", H=128, T=3, B=18, cta_groups=1),
    Case("stepwise", "sm_90", "bf16", H=128, T=2, layout="packed"),
]
# Of what orders accesses, and (with ``every``) of what moves data and multiplies.
ORDER = (
    r"bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.commit_group|fence\.proxy\.async"
    r"|wgmma\.fence|wgmma\.commit_group|wgmma\.wait_group|(?:@%p\d+ )?atom\."
)
DATA = r"cp\.async\.c[ag]\.|wgmma\.mma_async|mma\.sync|st\.shared|stmatrix|@%p\d+ st\.global"
Change = tuple[str, str, Callable[[re.Match[str]], str]]
ALTERATIONS: list[Change] = [
    (
        "let one more group stay in flight",
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
    ("stride", r"(or\.b64.*, )(-?\d{12,})", lambda m: f"{m[1]}{int(m[2]) ^ 1 << 34}"),
    ("swizzle", r"(or\.b64.*, )(-?\d{12,})", lambda m: f"{m[1]}{int(m[2]) ^ 1 << 62}"),
]


@dataclass
class Mutant:
    """A changed program.

    Args:
        change: what was changed.
        instruction: where, without its operands.
        source: the line of Python that it was compiled from.
        line: of the PTX.
        text: the program.
        fault: what was noticed; nothing if empty.
    """

    change: str
    instruction: str
    source: str
    line: int
    text: str = ""
    fault: str = ""

    @property
    def noticed(self) -> bool:
        """Whether the emulator noticed."""
        return bool(self.fault)

    def __str__(self) -> str:
        return f"line {self.line}: {self.change} {self.instruction} [{self.source}]"


def mutants(text: str, every: bool = False) -> Iterator[Mutant]:
    """Yield each mutation of a program, of its data, too, if ``every``."""
    lines = text.split("\n")
    deleted = f"({ORDER}|{DATA})" if every else f"({ORDER})"
    source = ""
    for i, line in enumerate(lines):
        if line.lstrip().startswith(".loc"):
            source = line.partition("// ")[2].split("@")[0].strip()
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
        near = lines[max(0, i - 30) : i]
        if edge and any("ld.acquire" in x for x in near) and f"{edge[1]}:" in "\n".join(near):
            changed.append(("leave the loop that spins", [""]))
        for change, new_lines in changed:
            text = "\n".join([*lines[:i], *new_lines, *lines[i + len(new_lines) :]])
            yield Mutant(change, re.sub(r"^@%p\d+ ", "", code).split(" ")[0], source, i + 1, text)


def judge(prepared: Prepared, every: bool = False) -> list[Mutant]:
    """Emulate every mutant whose instruction is executed, each until something is noticed.

    Raises:
        RuntimeError: something is noticed in the program as it is.
    """
    clean = prepared.emulate()
    if not clean.passed:
        raise RuntimeError(f"{prepared.case}: {clean}")
    # What CTAs that wait for each other do wrong shows in some schedules only.
    schedules = 10 if prepared.plan.name == "cooperative" else 1
    judged = []
    for mutant in mutants(prepared.ptx, every):
        if mutant.line in clean.unexecuted:
            continue
        for schedule in range(schedules):
            result = prepared.emulate(mutant.text, schedule=schedule, stop=True)
            if not result.passed:
                fault = result.error or (result.faults or ["wrong output"])[0]
                mutant = replace(mutant, fault=fault)
                break
        judged.append(replace(mutant, text=""))
    return judged
