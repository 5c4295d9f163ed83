"""Run ``python -m perf calibrate``: measure the constants of the roofline model."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.benchmark import Timer

from perf.bench import environment
from perf.bench.failures import first_line
from perf.report import tables
from perf.roofline import model
from tritonrnn.kernels.devices import DEVICES

COPY_BYTES = 2**30
MATRIX_SIZE = 8192
# Sizes that keep a GPU busy would take minutes on a CPU, most of all in 16 bits.
CPU_COPY_BYTES = 2**26
CPU_MATRIX_SIZE = 256

# Steps of two calls, whose difference contains no launch.
SHORT, LONG = 1_000, 11_000
NODES = 1_000
SAMPLE_S = 0.2
MIN_LAUNCHES = 8
GAIN = 1.5
# Spins of about half a microsecond, after which a program gives up waiting for the other.
MAX_SPINS = 10_000_000


def time_us(call: Callable[[], object]) -> float:
    """Return the median time of calls one after the other, on a CPU or a GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e6 * timer.blocked_autorange(min_run_time=SAMPLE_S).median


def hbm_TBps(device: str) -> float:
    """Return the bandwidth of a copy, read and written bytes together; random data."""
    nbytes = COPY_BYTES if device != "cpu" else CPU_COPY_BYTES
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / time_us(lambda: target.copy_(source)) / 1e6


def matrix_TFLOPps(device: str, dtype: torch.dtype, fp32_mode: str = "ieee") -> float:
    """Return the rate of large products of random matrices."""
    size = MATRIX_SIZE if device != "cpu" else CPU_MATRIX_SIZE
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = fp32_mode
        return 2 * size**3 / time_us(lambda: a @ b) / 1e6
    finally:
        switch.fp32_precision = before


def slope_us(call: Callable[[int], object], short: int = SHORT, long: int = LONG) -> float:
    """Return the time of one repetition inside a call, from the difference of two calls."""
    return (time_us(lambda: call(long)) - time_us(lambda: call(short))) / (long - short)


def run_chain(device: str, steps: int) -> tuple[float, float]:
    """Return the clock cycles and the nanoseconds of a chain of steps, by the GPU's counters."""
    from perf.roofline import probes

    H, B = probes.CHAIN_HIDDEN, probes.CHAIN_SEQUENCES
    # The gain is above 1; otherwise the state would soon be zeros, which draw less power.
    matrix = (GAIN * torch.randn(H, H, device=device) / math.sqrt(H)).bfloat16()
    state = torch.randn(H, B, device=device).bfloat16()
    ticks = torch.zeros(2, dtype=torch.int64, device=device)
    found: list[list[int]] = []
    deadline = time.monotonic() + SAMPLE_S
    # The first launch compiles, and the clock of an idle GPU takes a while to rise.
    while len(found) < MIN_LAUNCHES or time.monotonic() < deadline:
        probes.chain_kernel[(1,)](
            matrix, state, ticks, steps, HIDDEN=H, SEQUENCES=B, num_warps=probes.CHAIN_WARPS
        )
        found.append(ticks.tolist())
    cycles, ns = zip(*found[len(found) // 2 :])
    return statistics.median(cycles), statistics.median(ns)


def clock_GHz(device: str) -> float:
    """Return the clock of the multiprocessors while one of them runs the chain."""
    cycles, ns = run_chain(device, LONG)
    return cycles / ns


def chain_clk(device: str) -> float:
    """Return the clock cycles of a step of a dependent chain in one multiprocessor.

    It is a step of the smallest recurrence, less the cycles that the model counts for its product.
    """
    from perf.roofline import probes

    step_clk = (run_chain(device, LONG)[0] - run_chain(device, SHORT)[0]) / (LONG - SHORT)
    product = 2 * probes.CHAIN_SEQUENCES * probes.CHAIN_HIDDEN**2
    # The probe is for Hopper, whose wgmma it uses.
    return step_clk - DEVICES["sm_90"].product_clocks(product, "16-bit")


def handoff_us(device: str) -> float:
    """Return the time of an arrival and of the wait for it in another multiprocessor, one way.

    Raises:
        RuntimeError: the two programs did not run at the same time.
    """
    from perf.roofline import probes

    counter, C = torch.zeros(1, dtype=torch.int32, device=device), probes.BarrierConstants()

    def hand_off(round_trips: int) -> None:
        counter.zero_()
        probes.ping_pong_kernel[(2,)](counter, round_trips, MAX_SPINS, C, num_warps=1)

    hand_off(LONG)
    if counter.item() != 2 * LONG:
        raise RuntimeError("a program gave up waiting for the other")
    return slope_us(hand_off) / 2


def launch_us(device: str) -> float:
    """Return the time from one launch of an empty kernel to the next, in a stream.

    Triton launches it from Python, as it launches tritonrnn's kernels; that takes longer than a
    launch by the driver alone.
    """
    from perf.roofline.probes import empty_kernel

    return time_us(lambda: empty_kernel[(1,)](num_warps=1))


def graph_node_us(device: str) -> float:
    """Return the time of one node among many empty kernels of a CUDA graph."""
    from perf.roofline.probes import empty_kernel

    # The first launch compiles, which can't be captured.
    empty_kernel[(1,)](num_warps=1)
    graphs = {nodes: torch.cuda.CUDAGraph() for nodes in (NODES, 2 * NODES)}
    for nodes, graph in graphs.items():
        with torch.cuda.graph(graph):
            for _ in range(nodes):
                empty_kernel[(1,)](num_warps=1)
    return slope_us(lambda nodes: graphs[nodes].replay(), NODES, 2 * NODES)


# What measures each constant of :mod:`perf.roofline.model`, in the unit of its name.
PROBES: dict[str, Callable[[str], float]] = {
    "hbm_TBps": hbm_TBps,
    "bf16_TFLOPps": partial(matrix_TFLOPps, dtype=torch.bfloat16),
    "fp16_TFLOPps": partial(matrix_TFLOPps, dtype=torch.float16),
    "tf32_TFLOPps": partial(matrix_TFLOPps, dtype=torch.float32, fp32_mode="tf32"),
    "fp32_TFLOPps": partial(matrix_TFLOPps, dtype=torch.float32),
    "fp64_TFLOPps": partial(matrix_TFLOPps, dtype=torch.float64),
    "clock_GHz": clock_GHz,
    "chain_clk": chain_clk,
    "handoff_us": handoff_us,
    "launch_us": launch_us,
    "graph_node_us": graph_node_us,
}
ON_GPU_ONLY = ("tf32_TFLOPps", "clock_GHz", "chain_clk", "handoff_us", "launch_us", "graph_node_us")


def run(device: str, out: Path | None) -> pd.DataFrame:
    """Measure every constant that applies; write ``calibration.json`` to ``out``; return the table.

    A run with the same ``out`` uses the measured constants if the device is the same.
    """
    facts = environment.describe(device)
    gpu = model.gpu_at(device)
    measured: dict[str, float] = {}
    missing: dict[str, str] = {}
    for constant, measure in PROBES.items():
        if device == "cpu" and constant in ON_GPU_ONLY:
            missing[constant] = "a CPU has no TF32, multiprocessors, launches or graphs"
            continue
        try:
            measured[constant] = measure(device)
        except Exception as exception:
            # A probe that fails must not lose the results of the others.
            missing[constant] = f"{type(exception).__name__}: {first_line(exception)}"
    content = {
        "device": gpu.name if gpu else facts["cpu"],
        "environment": facts,
        "measured": measured,
        "missing": missing,
        "published": dict(gpu.constants) if gpu else {},
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / tables.CALIBRATION).write_text(json.dumps(content, indent=2) + "\n")
    return table(content)


def table(content: Mapping[str, Any]) -> pd.DataFrame:
    """Return one row for each constant: measured, published, and why it was not measured."""
    names = {"measured": "measured", "published": "published", "missing": "not measured because"}
    columns = {text: pd.Series(content[name], dtype=object) for name, text in names.items()}
    return pd.DataFrame(columns).rename_axis("constant").reset_index()
