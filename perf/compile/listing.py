"""Read what a compiler made of a kernel: registers, spills, and the instructions of a step."""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton


def listing_of(cubin: bytes) -> str:
    """Return what NVIDIA's ``cuobjdump`` prints of a kernel: its resources and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(listing: str) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that a thread spills to memory.

    Args:
        listing: NVIDIA's, or AMD's assembly.
    """
    if "amdgcn" in listing:
        spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", listing)
        return _number(r"\.vgpr_count:\s+(\d+)", listing), 4 * spilled
    return _number(r"REG:(\d+)", listing), _number(r"STACK:(\d+)", listing)


def instructions(listing: str) -> list[str]:
    """Return the instructions of NVIDIA's listing, each with its address."""
    return re.findall(r"^\s+/\*([0-9a-f]{4,}\*/\s+.*?);", listing, re.MULTILINE)


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


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1])
