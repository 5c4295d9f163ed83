"""Limits and rates of a GPU: asked of the device at hand, published where there is none.

Published figures are from NVIDIA's architecture whitepapers and the CUDA programming guide (tables
of technical specifications by compute capability), and from AMD's CDNA 3 whitepaper.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

KIB = 1024


@dataclass(frozen=True)
class Device:
    """What a plan must stay within, and what its time is estimated from.

    Args:
        arch: ``sm_90``, ``gfx942``, ... or ``interpreter``.
        multiprocessors: streaming multiprocessors, or AMD's compute units.
        shared_bytes: shared memory (LDS) that one thread block may use.
        clock_mhz: of the multiprocessors, boosted.
        mma_clock_mhz: the clock at which the peaks of MMAs are published, if that is a lower one.
        flop_per_clock: of a multiprocessor, dense, by arithmetic: ``16-bit``, ``tf32`` and
            ``fp32``, with sums in fp32.
        memory_gb_per_s: of global memory.
        warp_size: threads a warp.
        threads: threads that a multiprocessor holds at once.
        register_bytes: registers of a multiprocessor.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    clock_mhz: float
    flop_per_clock: tuple[int, int, int]
    memory_gb_per_s: float
    mma_clock_mhz: float = math.inf
    warp_size: int = 32
    threads: int = 2048
    register_bytes: int = 256 * KIB

    @property
    def is_interpreter(self) -> bool:
        """Return whether kernels run on CPU tensors, one program after the other."""
        return self.arch == "interpreter"

    @property
    def is_amd(self) -> bool:
        """Return whether the device is AMD's."""
        return self.arch.startswith("gfx")

    @property
    def has_async_copy(self) -> bool:
        """Return whether there is ``cp.async``, of 32 bits or more: NVIDIA's since sm_80."""
        return self.is_interpreter or self._compute_capability >= 80

    @property
    def has_wgmma(self) -> bool:
        """Return whether MMA instructions read their operands from shared memory (``wgmma``)."""
        return self.arch == "sm_90"

    @property
    def has_mma_sync(self) -> bool:
        """Return whether MMA instructions take their operands from registers (``mma.sync``).

        NVIDIA's since sm_80, Hopper's among them. Blackwell's ``tcgen05`` is not used here.
        """
        return self._compute_capability >= 80

    @property
    def is_blackwell(self) -> bool:
        """Return whether the device is of NVIDIA's generation after Hopper."""
        return self._compute_capability >= 100

    @property
    def has_tcgen05(self) -> bool:
        """Return whether there is ``tcgen05``, which Triton prefers to ``mma.sync`` for 64 rows."""
        return 100 <= self._compute_capability < 120

    @property
    def has_tanh(self) -> bool:
        """Return whether there is an instruction for tanh: NVIDIA's since sm_75."""
        return self._compute_capability >= 75

    @property
    def has_tf32(self) -> bool:
        """Return whether MMA instructions multiply TF32: of AMD's, on the MI300 only."""
        return not self.is_amd or self.arch == "gfx942"

    @property
    def missing_plans(self) -> str:
        """Return which plans the device can't have, and why; nothing where it can have all."""
        if not self.is_amd:
            return ""
        return (
            "no registers plan and no cooperative one on AMD: the former is written for NVIDIA's "
            "mma.sync and wgmma, the latter waits by an instruction of PTX"
        )

    @property
    def _compute_capability(self) -> int:
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    def clocks_us(self, clocks: float) -> float:
        """Return how long so many clock cycles last."""
        return clocks / self.clock_mhz

    def product_clocks(self, flop: float, arithmetic: str) -> float:
        """Return the clock cycles that a product takes on one multiprocessor."""
        return flop / self.flop_per_clock[("16-bit", "tf32", "fp32").index(arithmetic)]

    def product_us(self, flop: float, arithmetic: str) -> float:
        """Return how long a product takes that is spread over the whole device."""
        return flop / (1e6 * self.peak_tflops(arithmetic))

    def peak_tflops(self, arithmetic: str) -> float:
        """Return the peak of the whole device, dense, in TFLOP/s."""
        clock_mhz = self.clock_mhz
        if arithmetic != "fp32":
            clock_mhz = min(clock_mhz, self.mma_clock_mhz)
        return self.multiprocessors * clock_mhz / 1e6 / self.product_clocks(1, arithmetic)

    def memory_us(self, moved_bytes: float) -> float:
        """Return how long global memory takes over so many bytes."""
        return moved_bytes / (1e3 * self.memory_gb_per_s)


# One device of each architecture: A100, RTX 3090, RTX 4090, H100, B200, B300, RTX 5090 and MI300X;
# and Triton's interpreter, with the limits of an H100.
DEVICES = {
    device.arch: device
    for device in (
        Device(
            "sm_80",
            multiprocessors=108,
            shared_bytes=163 * KIB,
            clock_mhz=1410,
            flop_per_clock=(2048, 1024, 128),
            memory_gb_per_s=2039,
        ),
        Device(
            "sm_86",
            multiprocessors=82,
            shared_bytes=99 * KIB,
            threads=1536,
            clock_mhz=1695,
            flop_per_clock=(512, 256, 256),
            memory_gb_per_s=936,
        ),
        Device(
            "sm_89",
            multiprocessors=128,
            shared_bytes=99 * KIB,
            threads=1536,
            clock_mhz=2520,
            flop_per_clock=(512, 256, 256),
            memory_gb_per_s=1008,
        ),
        Device(
            "sm_90",
            multiprocessors=132,
            shared_bytes=227 * KIB,
            clock_mhz=1980,
            # 989 TFLOP/s in 16 bits, by the datasheet.
            mma_clock_mhz=1830,
            flop_per_clock=(4096, 2048, 256),
            memory_gb_per_s=3350,
        ),
        Device(
            "sm_100",
            multiprocessors=148,
            shared_bytes=227 * KIB,
            clock_mhz=1965,
            flop_per_clock=(8192, 4096, 256),
            memory_gb_per_s=8000,
        ),
        Device(
            "sm_103",
            multiprocessors=148,
            shared_bytes=227 * KIB,
            clock_mhz=1965,
            flop_per_clock=(8192, 4096, 256),
            memory_gb_per_s=8000,
        ),
        Device(
            "sm_120",
            multiprocessors=170,
            shared_bytes=99 * KIB,
            threads=1536,
            clock_mhz=2407,
            flop_per_clock=(512, 256, 256),
            memory_gb_per_s=1792,
        ),
        Device(
            "gfx942",
            multiprocessors=304,
            shared_bytes=64 * KIB,
            warp_size=64,
            register_bytes=512 * KIB,
            clock_mhz=2100,
            flop_per_clock=(2048, 1024, 256),
            memory_gb_per_s=5300,
        ),
    )
}
DEVICES["interpreter"] = replace(DEVICES["sm_90"], arch="interpreter", multiprocessors=1)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return the device at hand.

    What torch does not report is taken from a published one: of NVIDIA's from the one of the next
    lower compute capability, of AMD's from the MI300X.
    """
    if device.type == "cpu":
        return DEVICES["interpreter"]
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return replace(
            DEVICES["gfx942"],
            arch=arch,
            multiprocessors=properties.multi_processor_count,
            shared_bytes=properties.shared_memory_per_block,
            warp_size=properties.warp_size,
            **_rates_of(properties),
        )
    return replace(
        _published(10 * properties.major + properties.minor),
        arch=f"sm_{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,
        threads=properties.max_threads_per_multi_processor,
        register_bytes=4 * properties.regs_per_multiprocessor,
        **_rates_of(properties),
    )


def _published(compute_capability: int) -> Device:
    """Return NVIDIA's device of this compute capability, or of the next lower one."""
    known = {int(arch[3:]): device for arch, device in DEVICES.items() if arch.startswith("sm_")}
    return known[max((c for c in known if c <= compute_capability), default=min(known))]


def _rates_of(properties: Any) -> dict[str, Any]:
    """Return the clock and the memory's bandwidth, where torch knows them."""
    rates: dict[str, Any] = {}
    if getattr(properties, "clock_rate", 0):
        rates["clock_mhz"] = properties.clock_rate / 1e3
    # In kHz and bits; two transfers a clock.
    if getattr(properties, "memory_clock_rate", 0) and getattr(properties, "memory_bus_width", 0):
        bytes_per_ms = 2 * properties.memory_clock_rate * properties.memory_bus_width / 8
        rates["memory_gb_per_s"] = bytes_per_ms / 1e6
    return rates
