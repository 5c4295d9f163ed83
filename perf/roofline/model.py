"""Model the roofline: no run of a case takes less than max(compute, memory, serial).

With N tokens, G directions, e bytes an element, for each layer of I inputs (of all layers but the
first, I is G·H), forward:

    compute   2·N·G·H·(I + H) FLOP
    memory    e·(N·(I + G·H) + G·H·(I + H)) bytes
    serial    a step's chain, T + layers - 1 times: layers can overlap, directions run side by side

Backward takes twice the FLOP, ``e·(N·(2·I + 2·G·H) + 2·G·H·(I + H))`` bytes, and as many steps.
The chain of a step is that of the cheapest strategy which can hold the weights:

    multiprocessor  each slice of the batch on one multiprocessor, weights and state inside
    cluster         the weights spread over a cluster, the state exchanged between its members,
                    and a barrier of the cluster
    grid            the weights spread over the whole GPU, the state exchanged through L2
    launches        a node of a CUDA graph a step

Every strategy may cut the batch into slices, down to the eight sequences of one MMA, and keep
weights in registers. So T 1024, B 16, H 256 in bf16 takes two multiprocessors of eight sequences
each: 160 + 256 clocks a step, 215 us in all on an H200. One multiprocessor for all sixteen
sequences would take 160 + 512 clocks, 348 us, and more where it reads weights from shared memory at
each step. A kernel of ours may be bound by that; but no kernel can be faster than the limit, so the
cheapest strategy counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from perf.bench.cases import DTYPES, Case
from tritonrnn.kernels import cost
from tritonrnn.kernels.devices import Device, device_of

# MMA instructions take sequences in multiples of eight.
SEQUENCES_PER_TILE = 8

# The arithmetic of each precision, as the package's table of devices names it. The MMAs of fp64
# reach the rate of fp32 on NVIDIA's GPUs for data centers, and less on others.
ARITHMETIC = {"bf16": "16-bit", "fp16": "16-bit", "tf32": "tf32", "fp32": "fp32", "fp64": "fp32"}

# What the package has no use for. The largest clusters, portable or not: CUDA programming guide.
CLUSTER_MULTIPROCESSORS = {"sm_90": 16, "sm_100": 16, "sm_103": 16, "sm_120": 8}
# The least chain of a step that published latencies allow, in clocks: shared memory, MMA, epilogue
# and barrier; and of a counter from one multiprocessor to the others through L2. What our kernels
# take, cost.py has.
CHAIN_CLK, HANDOFF_US = 160, 0.16
# Distributed shared memory takes 180 to 210 clocks (published microbenchmarks of an H100). No cost
# of a cluster's barrier is published; it takes at least one exchange.
CLUSTER_EXCHANGE_CLK, CLUSTER_BARRIER_CLK = 195, 180
# A kernel node of a CUDA graph: published microbenchmarks.
GRAPH_NODE_US = 1.3
# The share of a multiprocessor's registers that may hold weights. An estimate.
WEIGHT_REGISTERS = 0.5


@dataclass(frozen=True)
class GPU:
    """Hold a GPU's constants, with units in their names.

    Attributes:
        name: The GPU's name in torch.
        constants: Values by their names.
        origin: "published", or "measured" if a calibration replaced some of them.
    """

    name: str
    constants: Mapping[str, float]
    origin: str = "published"

    def __getitem__(self, constant: str) -> float:
        return self.constants[constant]

    def measured(self, calibration: Mapping[str, float]) -> GPU:
        """Return this GPU with measured constants in place of the published ones."""
        known = {name: value for name, value in calibration.items() if name in self.constants}
        return replace(self, constants={**self.constants, **known}, origin="measured")

    def us(self, clocks: float) -> float:
        """Return the microseconds of so many clock cycles."""
        return clocks / (1e3 * self["clock_GHz"])


def gpu_at(device: str) -> GPU | None:
    """Return the GPU at hand with its published constants, or None on a CPU."""
    if device == "cpu":
        return None
    return GPU(torch.cuda.get_device_name(device), published(device_of(torch.device(device))))


def published(device: Device) -> dict[str, float]:
    """Return the constants of a device: published figures."""
    constants = {
        "multiprocessors": device.multiprocessors,
        "clock_GHz": device.clock_mhz / 1e3,
        "hbm_TBps": device.memory_gb_per_s / 1e3,
        "shared_bytes": device.shared_bytes,
        "register_weight_bytes": WEIGHT_REGISTERS * device.register_bytes,
        "shared_bytes_per_clk": cost.SHARED_BYTES_PER_CLOCK,
        "l2_bytes_per_clk": cost.L2_BYTES_PER_CLOCK,
        "chain_clk": CHAIN_CLK,
        "handoff_us": HANDOFF_US,
        "cluster_multiprocessors": CLUSTER_MULTIPROCESSORS.get(device.arch, 1),
        "cluster_exchange_clk": CLUSTER_EXCHANGE_CLK,
        "cluster_barrier_clk": CLUSTER_BARRIER_CLK,
        "graph_node_us": GRAPH_NODE_US,
    }
    for name, arithmetic in ARITHMETIC.items():
        constants[f"{name}_TFLOPps"] = device.peak_tflops(arithmetic)
        constants[f"{name}_FLOP_per_clk"] = 1 / device.product_clocks(1, arithmetic)
    return constants


class Work(NamedTuple):
    """Count what a case has to do: floating-point operations, and bytes to move at least."""

    flop: float
    min_bytes: float


class Limit(NamedTuple):
    """Hold the parts of a case's least time, the largest, which it is, and what sets the chain."""

    compute_us: float
    hbm_us: float
    serial_us: float
    limit_us: float
    limit_kind: str
    limit_strategy: str


def columns(case: Case, mode: str, gpu: GPU | None, seed: int) -> dict[str, object]:
    """Return the columns of a row: of the work, and on a GPU of the limit."""
    found = work(case, mode, seed)._asdict()
    if gpu is not None:
        found |= limit(case, mode, gpu, seed)._asdict() | {"limit_constants": gpu.origin}
    return found


def passes(mode: str) -> tuple[int, int]:
    """Return how often a mode runs the forward and the backward pass."""
    return {"infer": (1, 0), "fwd": (1, 0), "bwd": (0, 1), "fwdbwd": (1, 1)}[mode]


def work(case: Case, mode: str, seed: int) -> Work:
    """Return the work of a case; ``seed`` draws the lengths of a ragged batch."""
    forward, backward = passes(mode)
    times = forward + 2 * backward
    N, G, H, e = case.tokens(seed), case.directions, case.H, DTYPES[case.dtype].itemsize
    flop = nbytes = 0
    for layer in range(case.layers):
        input_size = case.I if layer == 0 else G * H
        weights = G * H * (input_size + H)
        flop += times * 2 * N * weights
        nbytes += times * e * (N * (input_size + G * H) + weights)
    return Work(flop, nbytes)


def limit(case: Case, mode: str, gpu: GPU, seed: int) -> Limit:
    """Return the least time of a case on a GPU."""
    flop, nbytes = work(case, mode, seed)
    chain_us, strategy = min(chains(case, gpu))
    steps = sum(passes(mode)) * (case.T + case.layers - 1)
    compute_us = flop / (1e6 * gpu[f"{case.precision}_TFLOPps"])
    hbm_us = nbytes / (1e6 * gpu["hbm_TBps"])
    serial_us = steps * chain_us
    parts = (compute_us, "compute"), (hbm_us, "memory"), (serial_us, "serial")
    return Limit(compute_us, hbm_us, serial_us, *max(parts), strategy)


def chains(case: Case, gpu: GPU) -> Iterator[tuple[float, str]]:
    """Yield the microseconds of a step by every strategy; infinitely many if it can't hold W_hh."""
    e, H = DTYPES[case.dtype].itemsize, case.H
    # Layers overlap in a wavefront, each on multiprocessors of its own; so do directions.
    groups = case.directions * case.layers
    available = int(gpu["multiprocessors"]) // groups
    largest = min(available, int(gpu["cluster_multiprocessors"]))
    for members in (2**power for power in range(largest.bit_length())):
        clk = gpu["chain_clk"] + _work_clk(case, gpu, members, available // members)
        if members == 1:
            yield gpu.us(clk), "multiprocessor"
        else:
            exchange_clk = gpu["cluster_exchange_clk"] + gpu["cluster_barrier_clk"]
            yield gpu.us(clk + exchange_clk), "cluster"
    for slices in range(1, min(case.B, available) + 1):
        state_clk = e * H * math.ceil(case.B / slices) / gpu["l2_bytes_per_clk"]
        clk = gpu["chain_clk"] + _work_clk(case, gpu, available // slices, slices) + state_clk
        yield gpu.us(clk) + gpu["handoff_us"], "grid"
    matrix_clk = _matrix_clk(case, gpu, case.B, max(1, available))
    yield gpu["graph_node_us"] + gpu.us(matrix_clk), "launches"


def _work_clk(case: Case, gpu: GPU, members: int, slices: int) -> float:
    """Return the clocks of a step's product; infinitely many if its weights do not fit.

    Args:
        case, gpu: What to run, and where.
        members: Multiprocessors that share the weights of one direction.
        slices: Parts of the batch, each with its own set of multiprocessors.
    """
    e, H = DTYPES[case.dtype].itemsize, case.H
    rows = math.ceil(H / members)
    share_bytes = e * rows * H
    if share_bytes > gpu["register_weight_bytes"] + gpu["shared_bytes"]:
        return math.inf
    sequences = math.ceil(case.B / slices)
    # Weights beyond the registers are read from shared memory at every step, beside the product.
    from_shared = max(0.0, share_bytes - gpu["register_weight_bytes"])
    read_clk = from_shared / gpu["shared_bytes_per_clk"]
    return max(_matrix_clk(case, gpu, sequences, members), read_clk)


def _matrix_clk(case: Case, gpu: GPU, sequences: int, members: int) -> float:
    tiles = math.ceil(sequences / SEQUENCES_PER_TILE) * SEQUENCES_PER_TILE
    per_clk = members * gpu[f"{case.precision}_FLOP_per_clk"]
    return 2 * tiles * case.H**2 / per_clk
