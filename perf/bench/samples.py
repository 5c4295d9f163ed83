"""Choose balanced samples of the cases that the project is judged by, for a short run.

Every prefix of a sample is about as balanced as the whole, so that an interrupted run still covers
every size and precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perf import peers
from perf.bench import presets
from perf.bench.cases import Case
from perf.bench.sweep import Unit

MODES = ("infer", "fwdbwd")

STEPS = (128, 512, 2048)
SEQUENCES = (1, 16, 64, 256)
HIDDEN = (64, 128, 256, 512, 1024)
BF16: dict[str, Any] = {"dtype": "bf16", "fp32_mode": "none"}
FP16: dict[str, Any] = {"dtype": "fp16", "fp32_mode": "none"}
TF32: dict[str, Any] = {"dtype": "fp32", "fp32_mode": "tf32"}
PRECISIONS = (BF16, FP16, TF32)

# Ragged batches: steps of the longest, sequences, hidden units, spread of the lengths, precision.
RAGGED: tuple[tuple[int, int, int, str, dict[str, Any]], ...] = (
    (512, 64, 256, "lognormal", BF16),
    (128, 256, 128, "words", TF32),
    (2048, 16, 512, "uniform", BF16),
    (512, 16, 128, "linear", FP16),
    (128, 64, 1024, "uniform", BF16),
)

# A case of FlashRNN's paper, and three more: steps, sequences, hidden units, in bf16.
FLASH = ((1024, 16, 768), (1024, 16, 256), (1024, 64, 512), (256, 16, 1024))


def _case(T: int, B: int, H: int, device: str, **more: Any) -> Case:
    return Case(T=T, B=B, I=H, H=H, device=device, **more)


def headline(device: str) -> list[Case]:
    """Return 20 of the 360 padded cases of a layer: each B with each H, the other axes cycled."""
    return [
        _case(
            STEPS[(index + index // 3) % 3],
            # Each pair of B and H occurs once, because 4 and 5 have no common factor.
            SEQUENCES[index % len(SEQUENCES)],
            HIDDEN[index % len(HIDDEN)],
            device,
            directions=1 + index // len(HIDDEN) % 2,
            **PRECISIONS[index % 3],
        )
        for index in range(len(SEQUENCES) * len(HIDDEN))
    ]


def ragged(device: str) -> list[Case]:
    """Return the packed cases, of one direction."""
    return [
        _case(T, B, H, device, layout="packed", lengths=lengths, **precision)
        for T, B, H, lengths, precision in RAGGED
    ]


def flash(device: str) -> list[Case]:
    """Return the cases to measure beside FlashRNN."""
    return [_case(*sizes, device, **BF16) for sizes in FLASH]


def acceptance(device: str) -> list[Unit]:
    """Return the units of ``python -m perf accept``; on a CPU, those of the preset ``smoke``."""
    if device == "cpu":
        return presets.units("smoke", {}, (), device)
    baseline = peers.baseline(device)
    beside: tuple[tuple[list[Case], Sequence[str]], ...] = (
        (headline(device), ("tritonrnn", baseline, "loop_graphed")),
        (ragged(device), ("tritonrnn", baseline)),
        (flash(device), ("tritonrnn", baseline, "flashrnn", "flashrnn-alternating")),
    )
    return [Unit(case, dict.fromkeys(MODES, names)) for cases, names in beside for case in cases]
