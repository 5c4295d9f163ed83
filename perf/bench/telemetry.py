"""Read the clock, power and temperature of a GPU while it is measured; nothing is ever set."""

from __future__ import annotations

import statistics
from collections import defaultdict
from contextlib import suppress

import torch

SENSORS = {
    "sm_MHz": torch.cuda.clock_rate,
    "power_W": lambda device: torch.cuda.power_draw(device) / 1e3,
    "temp_C": torch.cuda.temperature,
}


class Telemetry:
    """Sample a GPU's state; do nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: defaultdict[str, list[float]] = defaultdict(list)

    def sample(self) -> None:
        """Read every sensor once; leave out those that fail, as some do in virtual machines."""
        if self._device.type == "cuda":
            for name, read in SENSORS.items():
                # NVML may be missing, and has exceptions of its own.
                with suppress(Exception):
                    value = read(self._device)
                    self._samples[name].append(value)

    def columns(self) -> dict[str, float]:
        """Return the median of each sensor that was read."""
        return {name: statistics.median(values) for name, values in self._samples.items()}
