"""The roofline model, against cases worked by hand."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from perf.__main__ import app
from perf.bench.cases import Case
from perf.roofline import calibrate
from perf.roofline import model as roofline
from tritonrnn.kernels.devices import DEVICES

H200 = roofline.GPU(
    "NVIDIA H200", roofline.published(replace(DEVICES["sm_90"], memory_gb_per_s=4800))
)

# Round numbers, for working by hand: clocks are nanoseconds.
ROUND = roofline.GPU(
    "round",
    {
        "multiprocessors": 8,
        "clock_GHz": 1.0,
        "hbm_TBps": 1.0,
        "bf16_TFLOPps": 1.0,
        "bf16_FLOP_per_clk": 1024,
        "fp32_TFLOPps": 0.5,
        "fp32_FLOP_per_clk": 64,
        "shared_bytes": 1024,
        "register_weight_bytes": 1024,
        "shared_bytes_per_clk": 128,
        "chain_clk": 100,
        "cluster_exchange_clk": 200,
        "cluster_barrier_clk": 50,
        "cluster_multiprocessors": 4,
        "handoff_us": 0.3,
        "l2_bytes_per_clk": 64,
        "graph_node_us": 2.0,
    },
)


def bf16(**sizes: int) -> Case:
    return Case(**{"T": 10, "B": 8, "I": 32, "H": 32} | sizes, dtype="bf16", fp32_mode="none")


def test_work_of_one_layer():
    # 10 * 8 tokens, 32 * (32 + 32) weights.
    forward = roofline.work(bf16(), "infer", seed=0)
    assert forward.flop == 2 * 80 * 32 * 64 == 327_680
    # Rows read and written, weights read once, two bytes each.
    assert forward.min_bytes == 2 * (80 * (32 + 32) + 32 * 64) == 14_336
    assert roofline.work(bf16(), "fwd", seed=0) == forward
    backward = roofline.work(bf16(), "bwd", seed=0)
    assert backward.flop == 2 * forward.flop
    assert backward.min_bytes == 2 * (80 * (2 * 32 + 2 * 32) + 2 * 32 * 64) == 2 * forward.min_bytes
    both = roofline.work(bf16(), "fwdbwd", seed=0)
    assert (both.flop, both.min_bytes) == (3 * forward.flop, 3 * forward.min_bytes)


def test_work_of_layers_and_directions():
    work = roofline.work(bf16(layers=2, directions=2), "infer", seed=0)
    # The second layer reads both directions: 64 features.
    assert work.flop == 2 * 80 * 2 * 32 * (32 + 32) + 2 * 80 * 2 * 32 * (64 + 32)
    first = 80 * (32 + 64) + 2 * 32 * 64
    second = 80 * (64 + 64) + 2 * 32 * 96
    assert work.min_bytes == 2 * (first + second)


def test_work_of_a_ragged_batch_counts_its_tokens():
    case = Case(T=8, B=4, I=2, H=3, layout="packed", lengths="linear")
    assert roofline.work(case, "infer", seed=0).flop == 2 * 20 * 3 * 5


def test_limit_of_weights_in_one_multiprocessor():
    limit = roofline.limit(bf16(), "infer", ROUND, seed=0)
    assert limit.compute_us == pytest.approx(0.32768)
    assert limit.hbm_us == pytest.approx(0.014336)
    # 2048 bytes of weights: half in registers, half read at 128 a clock, 8 clocks. The product of
    # one sequence, rounded to 8: 2 * 8 * 32 * 32 / 1024 = 16 clocks, which cover the reading.
    assert limit.limit_strategy == "multiprocessor"
    assert limit.serial_us == pytest.approx(10 * (100 + 16) / 1000)
    assert limit.limit_us == limit.serial_us
    assert limit.limit_kind == "serial"


def test_limit_of_both_passes_and_of_layers_in_a_wavefront():
    assert roofline.limit(bf16(), "fwdbwd", ROUND, seed=0).serial_us == pytest.approx(2 * 1.16)
    stack = roofline.limit(bf16(layers=3, I=32), "infer", ROUND, seed=0)
    # 8 multiprocessors for three layers are 2 each: two slices of four sequences, still 8.
    assert stack.serial_us == pytest.approx((10 + 3 - 1) * 0.116)


def test_limit_of_weights_spread_over_a_cluster():
    # 8192 bytes: 2048 on each of 4. Two such clusters, four sequences each, rounded to 8:
    # 2 * 8 * 64 * 64 / (4 * 1024) = 16 clocks; 1024 bytes from shared memory, 8 clocks.
    limit = roofline.limit(bf16(H=64, I=64), "infer", ROUND, seed=0)
    assert limit.limit_strategy == "cluster"
    assert limit.serial_us == pytest.approx(10 * (100 + 16 + 200 + 50) / 1000)


def test_limit_of_weights_spread_over_the_grid():
    # 16200 bytes fit 8 multiprocessors (2048 each), not 4: one slice.
    limit = roofline.limit(bf16(H=88, I=88), "infer", ROUND, seed=0)
    assert limit.limit_strategy == "grid"
    # 11 rows * 88 * 2 = 1936 bytes each, 912 from shared memory: 7.125 clocks, less than the
    # product's 2 * 8 * 88 * 88 / (8 * 1024) = 15.125; 2 * 88 * 8 / 64 = 22 to read the state.
    assert limit.serial_us == pytest.approx(10 * (300 + 100 + 15.125 + 22) / 1000)


def test_limit_of_weights_that_fit_nowhere():
    limit = roofline.limit(bf16(H=512, I=512), "infer", ROUND, seed=0)
    assert limit.limit_strategy == "launches"
    assert limit.serial_us == pytest.approx(10 * (2.0 + 2 * 8 * 512**2 / (8 * 1024) / 1000))


def test_fp32_is_slower_than_tf32_on_a_gpu():
    ieee, tf32 = (
        roofline.limit(Case(T=64, B=256, I=1024, H=1024, fp32_mode=mode), "infer", H200, seed=0)
        for mode in ("ieee", "tf32")
    )
    assert ieee.compute_us / tf32.compute_us == pytest.approx(495 / 67, rel=1e-3)
    assert ieee.hbm_us == tf32.hbm_us


def test_serial_part_outweighs_the_others():
    # T 1024, B 16, H 256, bf16: compute and memory take 4 us each.
    case = Case(T=1024, B=16, I=256, H=256, dtype="bf16", fp32_mode="none")
    limit = roofline.limit(case, "infer", H200, seed=0)
    assert limit.compute_us == pytest.approx(2 * 1024 * 16 * 256 * 512 / 989e6, rel=1e-3)
    assert 4 < limit.compute_us < 5
    assert 3 < limit.hbm_us < 4
    # At 1.98 GHz, and with the weights, 128 KiB, in registers:
    least = {}
    for us, strategy in roofline.chains(case, H200):
        least[strategy] = min(us, least.get(strategy, us))
    assert least == pytest.approx(
        {
            # Eight sequences: 2 * 8 * 256 * 256 / 4096.
            "multiprocessor": (160 + 256) / 1980,
            # A sixteenth of that; the state exchanged, and a barrier.
            "cluster": (160 + 16 + 195 + 180) / 1980,
            # Slices of two sequences, padded to eight, on 16 multiprocessors each: a sixteenth of
            # the product, and 2 * 256 * 2 / 64 to read the state.
            "grid": 0.16 + (160 + 16 + 16) / 1980,
            # The whole device: 2 * 16 * 256 * 256 / (132 * 4096).
            "launches": 1.3 + 2 * 16 * 256 * 256 / (132 * 4096) / 1980,
        }
    )
    assert limit.limit_strategy == "multiprocessor"
    assert limit.serial_us == pytest.approx(1024 * (160 + 256) / 1980)


@pytest.mark.parametrize("arch", DEVICES)
def test_every_device_has_a_limit(arch):
    gpu = roofline.GPU(arch, roofline.published(DEVICES[arch]))
    for H in (16, 256, 2048, 16384):
        case = Case(T=3, B=5, I=7, H=H, dtype="fp16", fp32_mode="none")
        assert math.isfinite(roofline.limit(case, "fwdbwd", gpu, seed=0).limit_us)


def test_peaks_are_those_of_the_datasheet():
    # NVIDIA's datasheets of the H100 SXM and the A100 80GB: 16 bits, TF32, fp32, TB/s.
    for arch, peaks in {"sm_90": (989, 495, 67, 3.35), "sm_80": (312, 156, 19.5, 2.039)}.items():
        constants = roofline.published(DEVICES[arch])
        names = ("bf16_TFLOPps", "tf32_TFLOPps", "fp32_TFLOPps", "hbm_TBps")
        assert [constants[name] for name in names] == pytest.approx(peaks, rel=2e-3)


def test_cpu_has_no_limit():
    assert roofline.gpu_at("cpu") is None


def test_measured_constants_replace_the_published():
    device = H200.measured({"hbm_TBps": 4.3, "no such constant": 1.0})
    assert device["hbm_TBps"] == 4.3
    assert device["bf16_TFLOPps"] == H200["bf16_TFLOPps"]
    assert (H200.origin, device.origin) == ("published", "measured")
    assert "no such constant" not in device.constants


def test_calibration_on_a_cpu_names_what_does_not_apply(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "CPU_COPY_BYTES", 2**12)
    monkeypatch.setattr(calibrate, "CPU_MATRIX_SIZE", 16)
    monkeypatch.setattr(calibrate, "SAMPLE_S", 0.0)
    table = calibrate.run("cpu", tmp_path).set_index("constant")
    for constant in ("hbm_TBps", "bf16_TFLOPps", "fp32_TFLOPps"):
        assert table["measured"][constant] > 0
    for constant in ("chain_clk", "handoff_us", "launch_us", "graph_node_us", "tf32_TFLOPps"):
        assert math.isnan(table["measured"][constant])
        assert "a CPU" in table["not measured because"][constant]
    assert table["published"].isna().all()
    # On a GPU, where all apply, the command fails.
    monkeypatch.setattr(calibrate, "run", lambda device, out: table.reset_index())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, exit_code in (("cpu", 0), ("cuda", 1)):
        result = CliRunner().invoke(app, ["calibrate", "--device", device])
        assert result.exit_code == exit_code
        assert "; missing: chain_clk, " in result.output


def test_calibration_measures_what_the_model_uses():
    # The time of a launch is no part of a limit; the choice of a plan assumes one.
    assert set(calibrate.PROBES) - {"launch_us"} <= set(H200.constants)


@pytest.fixture(scope="module")
def probe_instructions() -> dict[str, list[str]]:
    """Return the instructions of the probes, compiled for a GPU that need not be there."""
    program = """
    import json, re
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from perf.roofline import probes
    from perf.compile.listing import listing_of

    found = {}
    for name, signature, constants, warps in (
        ("empty_kernel", {}, {}, 1),
        (
            "chain_kernel",
            {"matrix_ptr": "*bf16", "state_ptr": "*bf16", "ticks_ptr": "*i64", "steps": "i32"}
            | {"HIDDEN": "constexpr", "SEQUENCES": "constexpr"},
            {"HIDDEN": probes.CHAIN_HIDDEN, "SEQUENCES": probes.CHAIN_SEQUENCES},
            probes.CHAIN_WARPS,
        ),
        (
            "ping_pong_kernel",
            {"counter_ptr": "*i32", "round_trips": "i32", "max_spins": "i32", "C": "constexpr"},
            {"C": probes.BarrierConstants()},
            1,
        ),
    ):
        source = ASTSource(getattr(probes, name), signature, constants)
        target = GPUTarget("cuda", 90, 32)
        compiled = compile(source, target=target, options={"num_warps": warps})
        listing = listing_of(compiled.asm["cubin"])
        found[name] = re.findall(r"^ +/[*][0-9a-f]+[*]/ +(.*?) ;", listing, re.MULTILINE)
    print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def places(instructions: list[str], what: str) -> list[int]:
    return [place for place, one in enumerate(instructions) if re.search(what, one)]


@pytest.mark.slow
def test_chain_probe_runs_the_chain_of_the_model(probe_instructions):
    sass = probe_instructions["chain_kernel"]
    begun, ended = places(sass, "SR_CLOCK")
    store = places(sass, "STSM")[0]
    [barrier] = [place for place in places(sass, "BAR.SYNC") if place > store][:1]
    product, epilogue = places(sass, "HGMMA")[0], places(sass, "MUFU.TANH")[-1]
    [again] = [place for place in places(sass, "BRA") if place > epilogue][:1]
    # One iteration of the loop, with the counter read before and after the whole loop.
    assert begun < store < barrier < product < epilogue < again < ended
    assert not places(sass[store:again], "LDG|STG")


@pytest.mark.slow
def test_flag_probe_acquires_and_releases_at_the_scope_of_the_gpu(probe_instructions):
    sass = probe_instructions["ping_pong_kernel"]
    assert places(sass, "LDG.E.STRONG.GPU")
    [release] = places(sass, "MEMBAR.ALL.GPU")
    [add] = places(sass, "REDG?.E.ADD.STRONG.GPU")
    assert release < add


@pytest.mark.slow
def test_empty_probe_does_nothing(probe_instructions):
    sass = probe_instructions["empty_kernel"]
    assert not places(sass[: places(sass, "EXIT")[0]], "ST|LD[GS]|MMA|BAR")


def test_measured_chain_leaves_out_what_the_model_counts_beside_it(monkeypatch):
    # 300 cycles a step at 1.5 GHz, and a launch.
    run_chain = lambda device, steps: (5000 + 300 * steps, (5000 + 300 * steps) / 1.5)  # noqa: E731
    monkeypatch.setattr(calibrate, "run_chain", run_chain)
    # 16 sequences by 64 x 64: 2 * 16 * 64 * 64 / 4096.
    assert calibrate.chain_clk("cuda") == pytest.approx(300 - 32)
    assert calibrate.clock_GHz("cuda") == pytest.approx(1.5)
