"""Trials on the GPU at hand."""

from __future__ import annotations

import time

import pytest
import torch

import tritonrnn
from tests.support.cases import DTYPE_NAMES
from tests.support.processes import run_alone
from tritonrnn import autotune
from tritonrnn.kernels.cost import rank_plans
from tritonrnn.kernels.devices import device_of
from tritonrnn.precision import rounds_to_tf32

pytestmark = pytest.mark.gpu

# On an H100 every plan has every dtype, both nonlinearities and both layouts, cooperative and
# stepwise at more sizes than the others fit. Not their product: each compiles for some seconds.
CALLS = [
    (200, 256, torch.bfloat16, "tanh", "padded"),
    (64, 128, torch.float16, "relu", "packed"),
    (16, 64, torch.float32, "tanh", "packed"),
    (64, 512, torch.float32, "relu", "packed"),
    (33, 1024, torch.float16, "tanh", "padded"),
    (8, 1999, torch.bfloat16, "relu", "packed"),
]


@pytest.fixture(autouse=True)
def _no_records(tmp_path, monkeypatch):
    """Keep records of these tests apart, but not what was compiled: Triton's cache is elsewhere."""
    monkeypatch.setattr(autotune.store, "root", lambda: tmp_path)
    monkeypatch.setattr(autotune, "_tuners", {})
    autotune.standing.clear()
    yield
    autotune.standing.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "H", "dtype", "nonlinearity", "layout"), CALLS, ids=lambda x: DTYPE_NAMES.get(x, str(x))
)
def test_every_plan_is_right_on_this_device(B, H, dtype, nonlinearity, layout):
    device = torch.device("cuda", torch.cuda.current_device())
    call = autotune.Call(
        device, dtype, rounds_to_tf32(device, dtype), T=100, B=B, I=H, G=2, H=H, L=1,
        nonlinearity=nonlinearity, mapped=layout == "packed", ragged=False, hx=True, training=True,
        torch_path="aten",
    )  # fmt: skip
    tuner = autotune.tuner_of(device)
    plans = rank_plans(call.problem, device_of(device), call.training)
    for plan in plans:
        tuner.choose_among((plan,), call, plans, "on", may_try=True)
        verdicts = {str(key): tuner.store.get(key) for key in call.kernels(plan.name)}
        assert {name: record.verdict for name, record in verdicts.items()} == dict.fromkeys(
            verdicts, "right"
        )
        timed = tuner.store.get(call.shapes(plan.name))
        assert timed.verdict in ("faster", "slower", "tie"), timed.reason
        assert timed.against == "aten"


def test_trial_keeps_no_memory_and_draws_no_random_number():
    module = tritonrnn.RNN(64, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(50, 16, 64, device="cuda", dtype=torch.bfloat16)
    with tritonrnn.backend("torch"):
        module(x)[0].sum().backward()
    state = torch.cuda.get_rng_state()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with torch.no_grad():
        module(x)
    assert tritonrnn.trials()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.memory_allocated() == allocated
    # A call's own results are a part of what is reserved.
    assert torch.cuda.memory_reserved() <= reserved + 2**21


def test_capture_after_warm_up_takes_the_plan_of_the_trial():
    module = tritonrnn.RNN(64, 64, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(50, 16, 64, device="cuda", dtype=torch.bfloat16)
    expected, _ = module(x)
    chosen, trials = tritonrnn.explain(module, x), tritonrnn.trials()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = module(x)
        assert tritonrnn.explain(module, x) == chosen
    output.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert tritonrnn.trials() == trials


def test_capture_without_warm_up_makes_no_trial():
    module = tritonrnn.RNN(64, 64, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(50, 16, 64, device="cuda", dtype=torch.bfloat16)
    with tritonrnn.backend("torch"):
        expected, _ = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = module(x)
    graph.replay()
    torch.testing.assert_close(output, expected)
    assert tritonrnn.trials() == []


FIRST_CALL = """
    import os, time
    os.environ["TRITON_CACHE_DIR"] = {folder!r}
    import torch, tritonrnn
    module = tritonrnn.RNN(256, 256, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(100, 64, 256, device="cuda", dtype=torch.bfloat16)
    with tritonrnn.backend("torch"):
        module(x)[0].sum().backward()
    torch.cuda.synchronize()
    started = time.perf_counter()
    output, _ = module(x)
    torch.cuda.synchronize()
    print(time.perf_counter() - started, len(tritonrnn.trials()))
"""


@pytest.mark.slow
def test_first_call_takes_30_seconds_at_most_and_3_once_kernels_are_compiled(tmp_path):
    """The only limits on time here, as wide as a user's patience."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        took, made = run_alone(FIRST_CALL.format(folder=str(tmp_path))).split()
        assert int(made) > 0
        seconds.append(float(took))
        assert time.perf_counter() - started < 120
        # What is compiled stays.
        for path in (tmp_path / "tritonrnn").glob("*/*"):
            path.unlink()
    assert seconds[0] < 30
    assert seconds[1] < 3
