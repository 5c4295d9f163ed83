"""Parse PTX text: instructions, basic blocks, and where diverged threads reconverge."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple


class Unsupported(Exception):
    """The emulator does not know this PTX: it stops and does not guess."""


class Address(NamedTuple):
    """A place in memory, ``[%rd1 + 16]``."""

    base: str
    offset: int


# A register, a number or a name; several of them in braces, or on both sides of "|"; an address.
Operand = str | tuple[str, ...] | Address


@dataclass(frozen=True)
class Instruction:
    """One statement of the text.

    Args:
        op: the parts between dots: ``("ld", "global", "b32")``.
        guard: the predicate register that decides who executes it, and whether it is negated.
        operands: as they stand, the destination first.
        text: the whole statement.
        line: its line in the PTX.
        source: ``file:line:column`` of the Python code that it was compiled from.
    """

    op: tuple[str, ...]
    guard: tuple[str, bool] | None
    operands: tuple[Operand, ...]
    text: str
    line: int
    source: str

    def __str__(self) -> str:
        return f"line {self.line} ({self.source}): {self.text[:110]}"

    @cached_property
    def registers(self) -> frozenset[str]:
        """Return the names of all registers that it mentions."""
        guard = [self.guard[0]] if self.guard else []
        return frozenset(guard).union(*map(names, self.operands))


@dataclass
class BasicBlock:
    """Instructions that are executed one after the other, and where to go from there.

    Args:
        label: what branches call it.
        instructions: all but the branch at its end.
        branch: ``bra``, ``ret``, ``exit`` or ``trap`` at its end, if any.
        target: the number of the block that ``bra`` goes to.
        reconverges: the number of the block where threads meet again that diverge at its end.
    """

    label: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    branch: Instruction | None = None
    target: int = -1
    reconverges: int = -1


@dataclass(frozen=True)
class Program:
    """A kernel: names of its parameters, types of its registers by name, and its blocks."""

    parameters: list[str]
    register_types: dict[str, str]
    blocks: list[BasicBlock]


def names(operand: Operand) -> set[str]:
    """Return the names of the registers in an operand."""
    if isinstance(operand, Address):
        operand = operand.base
    texts = (operand,) if isinstance(operand, str) else operand
    return {text for text in texts if text[0] == "%"}


def parse(text: str) -> Program:
    """Parse the only kernel of a PTX file.

    Raises:
        Unsupported: there is not exactly one kernel, or a statement is unknown.
    """
    entry = re.search(
        r"\.visible \.entry \w+\((.*?)\)(.*?)\n\{(.*?)\n(?:\$L__func_end\d+:.*)?\}", text, re.S
    )
    if entry is None or text.count(".entry") != 1 or ".func" in text:
        raise Unsupported("expected one kernel, and no functions")
    parameters = re.findall(r"\.param \.[a-z]\d+[^,\n]*?(\w+_param_\d+)", entry[1])
    types: dict[str, str] = {}
    blocks = [BasicBlock()]
    source, pending, pending_line = "?", "", 0
    for number, line in enumerate(entry[3].split("\n"), 1 + text[: entry.start(3)].count("\n")):
        if line.lstrip().startswith(".loc"):
            code, _, comment = line.partition("//")
            source = comment.split("@")[0].strip() or code.split()[2]
            continue
        line = line.split("//")[0].strip()
        if not pending:
            declared = re.match(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>;$", line)
            if declared:
                types |= {f"%{declared[2]}{i}": declared[1] for i in range(int(declared[3]))}
                continue
            if re.match(r"\.pragma .*;$", line):
                continue
            label = re.match(r"([$\w]+):$", line)
            if label:
                # Other labels are of debug information.
                if label[1].startswith("$L__BB"):
                    if blocks[-1].instructions or blocks[-1].label:
                        blocks.append(BasicBlock())
                    blocks[-1].label = label[1]
                continue
            pending_line = number
        pending = f"{pending} {line}".strip()
        while ";" in pending:
            statement, pending = (part.strip() for part in pending.split(";", 1))
            if not statement:
                continue
            instruction = _instruction(statement, pending_line, source)
            if instruction.op[0] not in ("bra", "ret", "exit", "trap"):
                blocks[-1].instructions.append(instruction)
                continue
            if instruction.guard and instruction.op[0] != "bra":
                raise Unsupported(str(instruction))
            blocks[-1].branch = instruction
            blocks.append(BasicBlock())
    if pending:
        raise Unsupported(f"half a statement: {pending}")
    while not blocks[-1].instructions and blocks[-1].branch is None:
        blocks.pop()
    _link(blocks)
    return Program(parameters, types, blocks)


# Many programs are mutations of one.
@lru_cache(maxsize=4096)
def _instruction(text: str, line: int, source: str) -> Instruction:
    matched = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
    if matched is None:
        raise Unsupported(f"line {line}: {text}")
    negated, predicate, op, rest = matched.groups()
    guard = (predicate, bool(negated)) if predicate else None
    operands = tuple(map(_operand, _split(rest)))
    return Instruction(tuple(op.split(".")), guard, operands, " ".join(text.split()), line, source)


def _split(text: str) -> list[str]:
    # At the commas that are not in braces; none are in brackets.
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_split(text[1:-1]))
    address = re.match(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text)
    if address:
        return Address(address[1], int(address[2] or 0))
    if re.match(r"%\w+\|%\w+$", text):
        return tuple(text.split("|"))
    if re.match(r"[-%$]?\w[\w.$]*$", text):
        return text
    raise Unsupported(f"operand {text}")


def _link(blocks: list[BasicBlock]) -> None:
    """Find where branches go, and each block's immediate post-dominator."""
    labels = {block.label: i for i, block in enumerate(blocks) if block.label}
    end = len(blocks)
    successors = []
    for i, block in enumerate(blocks):
        branch = block.branch
        after = [i + 1] if branch is None or branch.guard else []
        if branch is not None:
            if branch.op[0] == "bra":
                (label,) = branch.operands
                assert isinstance(label, str)
                block.target = labels[label]
                after.append(block.target)
            else:
                after.append(end)
        successors.append(after)
    everything = set(range(end + 1))
    dominators = [everything] * end + [{end}]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(end)):
            new = {i}.union(set.intersection(*(dominators[j] for j in successors[i])))
            if new != dominators[i]:
                dominators[i], changed = new, True
    for i, block in enumerate(blocks):
        strict = dominators[i] - {i}
        # The nearest one is post-dominated by all the others.
        block.reconverges = next((j for j in strict if strict <= dominators[j]), end)
