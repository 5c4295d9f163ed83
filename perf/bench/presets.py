"""Choose what a sweep measures: presets, and axes given on the command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from perf import peers
from perf.bench.cases import DTYPES, LAYOUTS, LENGTHS, MODES, RAGGED, Case
from perf.bench.measure import Cell
from perf.bench.sweep import Unit

# The axes that are named, not counted, with every value.
NAMED_AXES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "nonlinearity": ("tanh", "relu"),
    "layout": LAYOUTS,
    "lengths": LENGTHS,
    "dtype": tuple(DTYPES),
    "fp32_mode": ("tf32", "ieee"),
}
SIZES = ("T", "B", "I", "H", "layers", "directions")

# What tritonrnn's geometric mean over the preset "cpu" should reach, by mode and layout.
CPU_TARGETS = {("fwdbwd", "padded"): 1.8, ("fwdbwd", "packed"): 2.5, ("infer", "padded"): 1.1}
CPU_SIZES = (
    "T=100 B=1 I=32 H=32",
    "T=200 B=8 I=64 H=64",
    "T=100 B=32 I=64 H=128 layers=2 directions=2",
    "T=256 B=16 I=128 H=256",
    "T=64 B=64 I=256 H=512",
)
SHORT = (
    "T=1,2,4,8,12,16,20,32,64 directions=1,2 mode=infer,fwdbwd layout=padded,packed,lengths,cell"
    " lengths=linear"
)

# Grids of axes in the notation of the command line; all combinations are measured. Without I, the
# input has as many features as there are hidden units.
PRESETS: dict[str, tuple[str, ...]] = {
    # A minute or less, to see that everything runs.
    "smoke": ("T=12 B=3 I=4 H=8", "T=12 B=3 I=4 H=8 mode=fwdbwd layout=packed lengths=linear"),
    # The torch path on a CPU is judged by these.
    "cpu": (
        *(f"{sizes} mode=fwdbwd,infer" for sizes in CPU_SIZES),
        *(f"{sizes} mode=fwdbwd layout=packed lengths=linear" for sizes in CPU_SIZES),
    ),
    # Sequences so short that the cost of a call decides, on a CPU.
    "short": tuple(f"{sizes} {SHORT}" for sizes in ("B=1 H=32", "B=16 H=64", "B=32 H=128")),
    # The project is judged by these on a GPU.
    "headline": (
        "T=128,1024 B=1,16,128 H=64:1024:x2 mode=infer,fwdbwd dtype=bf16,fp32 fp32_mode=tf32,ieee",
    ),
    # Batches of sequences of different lengths.
    "packed": (
        "T=128,1024 B=16,128 H=128,256,512 mode=infer,fwdbwd dtype=bf16,fp32 fp32_mode=tf32"
        " layout=packed lengths=linear,uniform,words,lognormal",
    ),
    # Everything; takes hours.
    "full": (
        "T=32:8192:x4 B=1:256:x4 H=32:2048:x2 dtype=bf16,fp16,fp32 fp32_mode=tf32,ieee",
        "T=128,1024 B=16,128 H=128,512 layers=1,2,4 directions=1,2 nonlinearity=tanh,relu"
        " dtype=bf16,fp32 fp32_mode=tf32,ieee layout=padded,packed lengths=uniform",
    ),
}
# Of each grid, where it says nothing else.
DEFAULTS = (
    "mode=infer,fwd,bwd,fwdbwd layout=padded lengths=equal dtype=fp32 fp32_mode=ieee"
    " nonlinearity=tanh"
)


def units(
    preset: str, axes: Mapping[str, str | None], names: Sequence[str], device: str
) -> list[Unit]:
    """Return the units of a sweep, each case once, in an order of chance that is always the same.

    Args:
        preset: One of ``PRESETS``.
        axes: Texts for ``SIZES`` and ``NAMED_AXES``, in place of those of the preset.
        names: The peers; if empty, the default ones of the device.
        device: Where to run.

    Raises:
        ValueError: there is no such preset, or an axis can't be parsed.
    """
    if preset not in PRESETS:
        raise ValueError(f"Expected a preset of {', '.join(PRESETS)}, got {preset!r}")
    given = {axis: text for axis, text in axes.items() if text is not None}
    names = tuple(names) or peers.defaults(device)
    found: dict[Case, dict[Cell, None]] = {}
    for grid in PRESETS[preset]:
        texts = dict(part.split("=") for part in f"{DEFAULTS} {grid}".split()) | given
        wanted = {axis: values(axis, text) for axis, text in texts.items()}
        cells = [(name, mode) for mode in wanted["mode"] for name in names]
        for case in _cases(wanted, device):
            found.setdefault(case, {}).update(dict.fromkeys(cells))
    units = [Unit(case, tuple(cells)) for case, cells in found.items()]
    # What a run that is stopped has measured is then a sample of all.
    Random(0).shuffle(units)
    return units


def _cases(wanted: Mapping[str, tuple[Any, ...]], device: str) -> Iterator[Case]:
    """Yield every case of a grid; a case may come twice. A cell has one layer and direction."""
    axes = {axis: values for axis, values in wanted.items() if axis != "mode"}
    for combination in itertools.product(*axes.values()):
        fields = dict(zip(axes, combination))
        if fields["layout"] not in RAGGED:
            fields["lengths"] = "equal"
        if fields["dtype"] != "fp32":
            fields["fp32_mode"] = "none"
        elif device == "cpu":
            # There is no TF32 on a CPU.
            fields["fp32_mode"] = "ieee"
        case = Case(**{"I": fields["H"], **fields}, device=device)
        if case.layout != "cell" or case.layers == case.directions == 1:
            yield case


def values(axis: str, text: str) -> tuple[Any, ...]:
    """Parse the values of an axis, separated by commas.

    Integers are given as ``1,16``, ``64:1024:x2`` (doubling) or ``10:50:+10`` (adding).

    Raises:
        ValueError: there is no such axis, or it has no such value.
    """
    if axis in SIZES:
        return tuple(itertools.chain.from_iterable(map(_integers, text.split(","))))
    names = tuple(part.strip() for part in text.split(","))
    known = NAMED_AXES.get(axis, ())
    for name in names:
        if name not in known:
            raise ValueError(f"Expected {axis} of {', '.join(known)}, got {name!r}")
    return names


def _integers(part: str) -> Iterator[int]:
    match = re.fullmatch(r"(\d+)(?::(\d+):([x+])(\d+))?", part.strip())
    if match is None:
        raise ValueError(f"Expected integers as 1,16 or 64:1024:x2 or 10:50:+10, got {part!r}")
    value, step, grows = int(match[1]), int(match[4] or 1), match[3] == "x"
    if value < 1 or step < (2 if grows else 1):
        raise ValueError(f"Expected integers of at least 1 that grow, got {part!r}")
    last = value if match[2] is None else int(match[2])
    while value <= last:
        yield value
        value = value * step if grows else value + step


def seconds(text: str) -> float:
    """Parse ``90``, ``90s``, ``9m`` or ``2h``.

    Raises:
        ValueError: ``text`` has none of these forms.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise ValueError(f"Expected a time as 90s, 9m or 2h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
