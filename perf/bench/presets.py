"""Choose what a sweep measures: presets, and axes given on the command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from perf import peers
from perf.bench.cases import DTYPES, LAYOUTS, LENGTHS, MODES, Case
from perf.bench.sweep import Unit

Sizes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Grid:
    """Hold every combination of some sizes and ways to run them.

    Attributes:
        sizes: Sets of T, B, I, H, layers and directions; the values of a set are combined with each
            other. Without I, the input has as many features as there are hidden units.
    """

    sizes: tuple[Sizes, ...]
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("fp32",)
    fp32_modes: tuple[str, ...] = ("ieee",)
    layouts: tuple[str, ...] = ("padded",)
    lengths: tuple[str, ...] = ("equal",)
    nonlinearities: tuple[str, ...] = ("tanh",)

    def cases(self, device: str) -> Iterator[Case]:
        """Yield every case; a case may come twice."""
        ways = itertools.product(
            self.nonlinearities, self.layouts, self.lengths, self.dtypes, self.fp32_modes
        )
        for (nonlinearity, layout, lengths, dtype, fp32_mode), sizes in itertools.product(
            ways, self.sizes
        ):
            for values in itertools.product(*sizes.values()):
                one = dict(zip(sizes, values))
                yield Case(
                    **{"I": one["H"], **one},
                    nonlinearity=nonlinearity,
                    layout=layout,
                    # A padded batch has no lengths; only fp32 has a mode of its products.
                    lengths="equal" if layout == "padded" else lengths,
                    dtype=dtype,
                    fp32_mode=fp32_mode if dtype == "fp32" else "none",
                    device=device,
                )


CPU_SIZES: tuple[Sizes, ...] = tuple(
    {"T": [T], "B": [B], "I": [I], "H": [H], "layers": [layers], "directions": [directions]}
    for T, B, I, H, layers, directions in (  # noqa: E741
        (100, 1, 32, 32, 1, 1),
        (200, 8, 64, 64, 1, 1),
        (100, 32, 64, 128, 2, 2),
        (256, 16, 128, 256, 1, 1),
        (64, 64, 256, 512, 1, 1),
    )
)
GPU_DTYPES = ("bf16", "fp16", "fp32")
BOTH_FP32 = ("tf32", "ieee")

PRESETS: dict[str, tuple[Grid, ...]] = {
    # A minute or less, to see that everything runs.
    "smoke": (
        Grid(({"T": [8], "B": [3], "I": [4], "H": [8]},)),
        Grid(
            ({"T": [8], "B": [3], "I": [4], "H": [8]},),
            modes=("fwdbwd",),
            layouts=("packed",),
            lengths=("linear",),
        ),
    ),
    # The torch path on a CPU is judged by these.
    "cpu": (
        Grid(CPU_SIZES, modes=("fwdbwd", "infer")),
        Grid(CPU_SIZES, modes=("fwdbwd",), layouts=("packed",), lengths=("linear",)),
    ),
    # The project is judged by these on a GPU.
    "headline": (
        Grid(
            ({"T": [128, 1024], "B": [1, 16, 128], "H": [64, 128, 256, 512, 1024]},),
            modes=("infer", "fwdbwd"),
            dtypes=("bf16", "fp32"),
            fp32_modes=BOTH_FP32,
        ),
    ),
    # Batches of sequences of different lengths.
    "packed": (
        Grid(
            ({"T": [128, 1024], "B": [16, 128], "H": [128, 256, 512]},),
            modes=("infer", "fwdbwd"),
            dtypes=("bf16", "fp32"),
            fp32_modes=("tf32",),
            layouts=("packed",),
            lengths=("linear", "uniform", "words", "lognormal"),
        ),
    ),
    # Everything; takes hours.
    "full": (
        Grid(
            (
                {
                    "T": [32, 128, 512, 2048, 8192],
                    "B": [1, 4, 16, 64, 256],
                    "H": [32, 64, 128, 256, 512, 1024, 2048],
                },
            ),
            dtypes=GPU_DTYPES,
            fp32_modes=BOTH_FP32,
        ),
        Grid(
            (
                {
                    "T": [128, 1024],
                    "B": [16, 128],
                    "H": [128, 512],
                    "layers": [1, 2, 4],
                    "directions": [1, 2],
                },
            ),
            dtypes=("bf16", "fp32"),
            fp32_modes=BOTH_FP32,
            layouts=("padded", "packed"),
            lengths=("uniform",),
            nonlinearities=("tanh", "relu"),
        ),
    ),
}


def integers(text: str) -> tuple[int, ...]:
    """Parse ``1,16``, ``64:1024:x2`` (doubling) or ``10:50:+10`` (adding), or several of them.

    Raises:
        ValueError: ``text`` has none of these forms.
    """
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+):([x+])(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"Expected integers as 1,16 or 64:1024:x2 or 10:50:+10, got {part!r}")
        value = int(match[1])
        if match[2] is None:
            values.append(value)
            continue
        step, grows = int(match[4]), match[3] == "x"
        if step < (2 if grows else 1) or value < 1:
            raise ValueError(f"Expected a step that grows, got {part!r}")
        while value <= int(match[2]):
            values.append(value)
            value = value * step if grows else value + step
    if min(values) < 1:
        raise ValueError(f"Expected integers of at least 1, got {text!r}")
    return tuple(values)


def seconds(text: str) -> float:
    """Parse ``90``, ``90s``, ``9m`` or ``2h``.

    Raises:
        ValueError: ``text`` has none of these forms.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise ValueError(f"Expected a time as 90s, 9m or 2h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def words(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse names separated by commas.

    Raises:
        ValueError: a name is not known.
    """
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"Expected any of {', '.join(known)}, got {name!r}")
    return names


NAMED_AXES: dict[str, Sequence[str]] = {
    "modes": MODES,
    "dtypes": tuple(DTYPES),
    "fp32_modes": BOTH_FP32,
    "layouts": LAYOUTS,
    "lengths": LENGTHS,
    "nonlinearities": ("tanh", "relu"),
}


def units(
    preset: str, axes: Mapping[str, str | None], names: Sequence[str], device: str
) -> list[Unit]:
    """Return the units of a sweep, each case once, in an order of chance that is always the same.

    Args:
        preset: One of ``PRESETS``.
        axes: Texts for ``T B I H layers directions`` and ``NAMED_AXES``; they replace those of the
            preset.
        names: The peers; if empty, the default ones of the device.
        device: Where to run.

    Raises:
        ValueError: an axis can't be parsed.
    """
    if preset not in PRESETS:
        raise ValueError(f"Expected a preset of {', '.join(PRESETS)}, got {preset!r}")
    given = {axis: text for axis, text in axes.items() if text is not None}
    named = {
        axis: words(text, NAMED_AXES[axis]) for axis, text in given.items() if axis in NAMED_AXES
    }
    sizes = {axis: integers(text) for axis, text in given.items() if axis not in NAMED_AXES}
    names = tuple(names) or peers.defaults(device)
    found: dict[Case, dict[str, Sequence[str]]] = {}
    for grid in PRESETS[preset]:
        merged = tuple({**one, **sizes} for one in grid.sizes)
        wanted = replace(grid, sizes=merged, **named)
        if device == "cpu":
            # There is no TF32 on a CPU.
            wanted = replace(wanted, fp32_modes=("ieee",))
        for case in wanted.cases(device):
            found.setdefault(case, {}).update(dict.fromkeys(wanted.modes, names))
    units = [Unit(case, modes) for case, modes in found.items()]
    # What a run that is stopped has measured is then a sample of all.
    Random(0).shuffle(units)
    return units
