"""Choose balanced samples of the cases that the project is judged by, for a short run.

Every prefix of a sample is about as balanced as the whole, so that an interrupted run still covers
every size and precision.
"""

from __future__ import annotations

from collections.abc import Sequence

from perf import peers
from perf.bench import presets
from perf.bench.cases import Case
from perf.bench.sweep import Unit

MODES = ("infer", "fwdbwd")

STEPS = (128, 512, 2048)
SEQUENCES = (1, 16, 64, 256)
HIDDEN = (64, 128, 256, 512, 1024)
PRECISIONS = (("bf16", "none"), ("fp16", "none"), ("fp32", "tf32"))

# Ragged batches: steps of the longest, sequences, hidden units, spread of the lengths, precision.
RAGGED = (
    (512, 64, 256, "lognormal", ("bf16", "none")),
    (128, 256, 128, "words", ("fp32", "tf32")),
    (2048, 16, 512, "uniform", ("bf16", "none")),
    (512, 16, 128, "linear", ("fp16", "none")),
    (128, 64, 1024, "uniform", ("bf16", "none")),
)

# A case of FlashRNN's paper, and three more: steps, sequences, hidden units, in bf16.
FLASH = ((1024, 16, 768), (1024, 16, 256), (1024, 64, 512), (256, 16, 1024))


def headline(device: str) -> list[Case]:
    """Return 20 of the 360 padded cases of a layer: each B with each H, the other axes cycled."""
    cases = []
    for index in range(len(SEQUENCES) * len(HIDDEN)):
        # Each pair occurs once, because 4 and 5 have no common factor.
        b, h = index % len(SEQUENCES), index % len(HIDDEN)
        T, (dtype, fp32_mode) = STEPS[(index + index // 3) % 3], PRECISIONS[index % 3]
        cases.append(
            Case(
                T=T,
                B=SEQUENCES[b],
                I=HIDDEN[h],
                H=HIDDEN[h],
                directions=1 + index // len(HIDDEN) % 2,
                dtype=dtype,
                fp32_mode=fp32_mode,
                device=device,
            )
        )
    return cases


def ragged(device: str) -> list[Case]:
    """Return the packed cases, of one direction."""
    return [
        Case(
            T=T,
            B=B,
            I=H,
            H=H,
            layout="packed",
            lengths=lengths,
            dtype=dtype,
            fp32_mode=fp32_mode,
            device=device,
        )
        for T, B, H, lengths, (dtype, fp32_mode) in RAGGED
    ]


def flash(device: str) -> list[Case]:
    """Return the cases to measure beside FlashRNN."""
    return [
        Case(T=T, B=B, I=H, H=H, dtype="bf16", fp32_mode="none", device=device) for T, B, H in FLASH
    ]


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
