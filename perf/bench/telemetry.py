"""Read the clock, power and temperature of a GPU while it is measured; nothing is ever set."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress

import torch


class Telemetry:
    """Sample a GPU's state; do nothing on a CPU or without NVML."""

    def __init__(self, device: torch.device) -> None:
        self._samples: dict[str, list[float]] = {}
        self._handle = None
        if device.type != "cuda" or torch.version.hip is not None:
            return
        with suppress(ImportError):
            import pynvml

            with suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def sample(self) -> None:
        """Read every sensor once; leave out those that fail, as some do in virtual machines."""
        if self._handle is None:
            return
        import pynvml

        readings: dict[str, Callable[[], float]] = {
            "sm_MHz": lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM),
            "power_W": lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "temp_C": lambda: pynvml.nvmlDeviceGetTemperature(
                self._handle, pynvml.NVML_TEMPERATURE_GPU
            ),
        }
        for name, read in readings.items():
            with suppress(pynvml.NVMLError):
                self._samples.setdefault(name, []).append(read())

    def columns(self) -> dict[str, float]:
        """Return the median of each sensor that was read."""
        return {name: statistics.median(values) for name, values in self._samples.items()}
