"""The parts of a measurement: workloads, rounds, memory, checks, forced plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import tritonrnn
from perf.bench import memory, timing
from perf.bench.cases import LENGTHS, Case, Workload, set_precision
from perf.bench.check import max_relative_error, results_of
from perf.bench.failures import Row, failure, raise_if_gpu_is_lost
from perf.bench.measure import Measurement, Settings
from perf.bench.timing import EventClock, Job, WallClock, make_job
from perf.peers import PEERS, find
from perf.peers.loops import WrittenOut
from perf.peers.ours import forced_plan
from perf.peers.peer import Runner
from perf.peers.torch_rnn import cudnn_off
from tests.support.imitation import imitate
from tests.support.recurrence import PLANS_HERE
from tritonrnn.kernels import devices
from tritonrnn.kernels.plan import PLANS

TINY = Case(T=8, B=4, I=2, H=3)
QUICK = Settings(rounds=2, sample_s=0, max_s=0)


def build(case: Case, name: str) -> tuple[Runner, Workload]:
    workload = Workload.make(case, seed=0)
    return find(name).build(case, case.make_module(0), workload), workload


def test_case_id_names_everything_but_the_device():
    case = Case(T=1, B=2, I=3, H=4, layers=5, directions=2, layout="packed", lengths="words")
    assert case.case_id == "T1-B2-I3-H4-L5-D2-tanh-packed-words-fp32-ieee"
    assert Case(1, 2, 3, 4, dtype="bf16", fp32_mode="none").case_id == (
        "T1-B2-I3-H4-L1-D1-tanh-padded-bf16"
    )


def test_packed_workload_has_lengths_from_t_down_to_a_quarter():
    case = Case(T=8, B=4, I=2, H=3, layout="packed", lengths="linear")
    workload = Workload.make(case, seed=0)
    assert case.ragged_lengths(0) == [8, 6, 4, 2]
    assert workload.batch_sizes is not None
    assert workload.batch_sizes.tolist() == [4, 4, 3, 3, 2, 2, 1, 1]
    assert workload.tokens.shape == (20, 2)
    assert case.tokens(0) == 20
    assert TINY.tokens(0) == 32


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (7, 1), (100, 33)])
def test_ragged_lengths_descend_from_t_and_repeat(lengths, T, B):
    case = Case(T=T, B=B, I=1, H=1, layout="packed", lengths=lengths)
    drawn = case.ragged_lengths(3)
    assert len(drawn) == B
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[0] == T
    assert drawn[-1] >= 1
    assert drawn == case.ragged_lengths(3)


def test_jagged_workload_has_one_sequence_after_the_other():
    case = Case(T=8, B=4, I=2, H=3, layout="jagged", lengths="linear")
    workload = Workload.make(case, seed=0)
    nested = workload.input_of(workload.tokens)
    assert [len(sequence) for sequence in nested.unbind()] == [8, 6, 4, 2]
    assert torch.equal(nested.unbind()[1], workload.tokens[8:14])


def test_workload_with_lengths_is_padded_and_in_no_order():
    case = Case(T=8, B=6, I=2, H=3, layout="lengths", lengths="linear")
    workload = Workload.make(case, seed=0)
    assert workload.tokens.shape == (8, 6, 2)
    assert workload.lengths is not None
    drawn = workload.lengths.tolist()
    assert sorted(drawn, reverse=True) == case.ragged_lengths(0) != drawn
    assert case.tokens(0) == sum(drawn)
    assert workload.to("cpu", torch.float64).lengths is workload.lengths


def take_nested(monkeypatch) -> None:
    """Have ``tritonrnn.RNN`` take nested tensors, if only by packing them."""
    forward = tritonrnn.RNN.forward

    def packing(rnn, data):
        assert data.is_nested
        assert data.layout is torch.jagged
        packed = pack_sequence(data.unbind())
        output, h_n = forward(rnn, packed)
        output, lengths = pad_packed_sequence(output)
        rows = torch.cat([output[:length, place] for place, length in enumerate(lengths)])
        return torch.nested.nested_tensor_from_jagged(rows, data.offsets()), h_n

    monkeypatch.setattr(tritonrnn.RNN, "forward", packing)
    choice = SimpleNamespace(backend="torch", plan="in-place")
    monkeypatch.setattr(tritonrnn, "explain", lambda rnn, data: choice)


def measure_case(case: Case, *names: str, settings: Settings = QUICK) -> dict[tuple[str, str], Row]:
    sent: list[Any] = []
    cells = [(name, mode) for mode in ("infer", "fwdbwd") for name in names]
    Measurement(case, settings, None, sent.append).run(cells)
    rows = [message for message in sent if isinstance(message, dict)]
    return {(row["peer"], row["mode"]): row for row in rows}


@pytest.mark.slow
def test_row_names_the_plan_that_its_own_run_has_tried(tmp_path, monkeypatch):
    imitate(tmp_path, monkeypatch, {"resident": 50.0})
    rows = measure_case(Case(T=2, B=2, I=3, H=4), "tritonrnn")
    for mode in ("infer", "fwdbwd"):
        assert rows["tritonrnn", mode]["plan"].startswith("triton, resident")


def test_jagged_batch_is_checked_and_timed_where_it_is_taken(monkeypatch):
    case = Case(T=5, B=3, I=2, H=4, directions=2, layout="jagged", lengths="linear")
    take_nested(monkeypatch)
    rows = measure_case(case, "nn_aten", "tritonrnn-torch")
    for mode in ("infer", "fwdbwd"):
        assert rows["nn_aten", mode]["status"] == "unsupported"
        assert rows["nn_aten", mode]["error"] == "it takes no nested tensors"
        assert rows["tritonrnn-torch", mode].get("error") is None
        # There is nothing to be faster than.
        assert "speedup_vs_nn" not in rows["tritonrnn-torch", mode]
    # Its tolerance is that of nn.RNN on the same batch, packed.
    assert rows["tritonrnn-torch", "infer"]["tolerance"] >= 8 * 2.0**-23


def test_jagged_batch_that_is_wrong_is_found(monkeypatch):
    case = Case(T=5, B=3, I=2, H=4, layout="jagged", lengths="linear")
    take_nested(monkeypatch)
    right = tritonrnn.RNN.forward

    def swapped(rnn, data):
        output, h_n = right(rnn, data)
        return output, h_n.flip(1)

    monkeypatch.setattr(tritonrnn.RNN, "forward", swapped)
    assert measure_case(case, "tritonrnn-torch")["tritonrnn-torch", "infer"]["status"] == "wrong"


LENGTHS_CASE = Case(T=5, B=3, I=2, H=4, directions=2, layout="lengths", lengths="linear")
CELL_CASE = Case(T=5, B=3, I=2, H=4, layout="cell")


@pytest.mark.parametrize("case", [LENGTHS_CASE, CELL_CASE], ids=lambda case: case.layout)
def test_lengths_and_cells_are_checked_and_timed(case):
    rows = measure_case(case, "nn_aten", "nn_again", "tritonrnn", "loop")
    for mode in ("infer", "fwdbwd"):
        assert rows["loop", mode]["status"] == "unsupported"
        for name in ("nn_aten", "nn_again", "tritonrnn"):
            assert rows[name, mode].get("error") is None
            assert rows[name, mode]["max_rel_err"] <= rows[name, mode]["tolerance"]
            assert rows[name, mode]["speedup_vs_nn"] > 0


def test_lengths_that_are_not_heeded_are_found(monkeypatch):
    right = tritonrnn.RNN.forward
    monkeypatch.setattr(tritonrnn.RNN, "forward", lambda rnn, data, *, lengths: right(rnn, data))
    assert measure_case(LENGTHS_CASE, "tritonrnn")["tritonrnn", "infer"]["status"] == "wrong"


def test_cell_that_is_wrong_is_found(monkeypatch):
    right = tritonrnn.RNNCell.forward
    # The results are right, but no gradient goes from a step to the one before.
    monkeypatch.setattr(
        tritonrnn.RNNCell,
        "forward",
        lambda cell, step, hx: right(cell, step, None if hx is None else hx.detach()),
    )
    rows = measure_case(CELL_CASE, "tritonrnn")
    assert rows["tritonrnn", "infer"]["status"] == "ok"
    assert rows["tritonrnn", "fwdbwd"]["status"] == "wrong"


def test_rounds_time_every_peer_in_random_order():
    names = ["nn_aten", "loop", "tritonrnn"]
    sent: list[Any] = []
    cells = [(name, "infer") for name in names]
    Measurement(TINY, Settings(rounds=5, sample_s=0), None, sent.append).run(cells)
    assert [row["n_samples"] for row in sent if isinstance(row, dict)] == [5, 5, 5]
    timed = [peer for peer, mode, phase in sent[:-3] if phase == "timing"]
    orders = [tuple(timed[start : start + 3]) for start in range(0, 15, 3)]
    assert [sorted(order) for order in orders] == 5 * [sorted(names)]
    assert len(timed) == 15
    assert len(set(orders)) > 1


def test_rounds_stop_early_but_not_at_once():
    row = measure_case(TINY, "loop", settings=Settings(rounds=50, sample_s=0, max_s=0))
    assert row["loop", "infer"]["n_samples"] == 3


def test_peer_that_raises_while_it_is_timed_leaves_the_others():
    tired = "tests.support.faulty_peers:ThrowsLater"
    settings = Settings(rounds=6, sample_s=0)
    rows = measure_case(TINY, "nn_aten", tired, "loop", settings=settings)
    assert rows[tired, "infer"]["error"] == "ArithmeticError: tired"
    assert "wall_us_p50" not in rows[tired, "infer"]
    for name in ("nn_aten", "loop"):
        assert rows[name, "infer"]["status"] == "ok"
        assert rows[name, "infer"]["n_samples"] == 6


def test_wall_clock_drops_gradients_after_every_call():
    leaf = torch.ones(1, requires_grad=True)

    def call() -> None:
        assert leaf.grad is None
        leaf.sum().backward()

    assert WallClock(Job(call, [leaf]), 0.001).sample_us() > 0
    assert leaf.grad is None


def test_footprint_counts_peak_and_what_stays():
    kept = torch.zeros(1)

    def call() -> torch.Tensor:
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        _ = [torch.empty(2**20, dtype=torch.uint8) for _ in range(3)]
        return torch.empty(2**18, dtype=torch.uint8)

    found = memory.footprint(call, kept.device)
    assert isinstance(found.result, torch.Tensor)
    assert found.peak_bytes == 3 * 2**20 + 2**18
    assert found.alive_bytes == 2**18


def test_unique_bytes_count_shared_storage_once():
    storage = torch.empty(100, dtype=torch.uint8)
    assert memory.unique_bytes([storage]) == 100
    assert memory.unique_bytes([storage, storage[:50]]) == 100
    assert memory.unique_bytes([storage[:10], torch.empty(7, dtype=torch.uint8)]) == 17


def test_saved_bytes_of_a_loop_are_those_of_its_states():
    # One product and one tanh a step: each keeps its own result, and the stack of them all is the
    # output. So the drive and every state stay, less what the caller gets.
    case = Case(T=64, B=16, I=8, H=32)
    runner, workload = build(case, "loop")
    found = memory.footprint(make_job(runner, workload, "fwd").call, torch.device("cpu"))
    assert isinstance(found.result, tuple)
    saved = found.alive_bytes - memory.unique_bytes(found.result)
    state_bytes = case.T * case.B * case.H * 4
    assert state_bytes <= saved <= 1.2 * state_bytes


@pytest.mark.parametrize("mode", ["infer", "fwd", "bwd", "fwdbwd"])
@pytest.mark.parametrize("name", ["tritonrnn-torch", "nn_aten", "loop"])
def test_jobs_of_every_mode_repeat(name, mode):
    runner, workload = build(TINY, name)
    job = make_job(runner, workload, mode)
    with job.context():
        for _ in range(3):
            job.call()
            has_gradients = all(leaf.grad is not None for leaf in job.leaves)
            assert has_gradients == (mode in ("bwd", "fwdbwd") or not job.leaves)
            job.reset()
            assert all(leaf.grad is None for leaf in job.leaves)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("name", ["tritonrnn-torch", "nn_aten", "loop"])
def test_peers_compute_what_float64_does(name, nonlinearity, layout):
    case = Case(
        T=5, B=3, I=2, H=4, layers=2, directions=2,
        nonlinearity=nonlinearity, layout=layout, lengths="linear",
    )  # fmt: skip
    if find(name).supports(case):
        pytest.skip("declined")
    rows = measure_case(case, name)
    assert [row["status"] for row in rows.values()] == ["ok", "ok"], rows
    assert all(row["max_rel_err"] <= 8 * 2.0**-23 for row in rows.values())
    # In training, the gradients of the input and of four tensors for each layer and direction too.
    runner, workload = build(case, name)
    assert len(results_of(runner, workload, True)) == 2 + 1 + 16


def test_largest_error_shows_one_wrong_element():
    exact = [torch.ones(3, dtype=torch.float64)]
    assert max_relative_error([torch.ones(4)], exact) == float("inf")
    assert max_relative_error([torch.full((3,), torch.nan)], exact) == float("inf")
    assert max_relative_error([torch.tensor([1.0, 1.0, 1.5])], exact) == 0.5


def test_twice_the_error_of_nn_is_allowed_whichever_peers_run(monkeypatch):
    case = Case(T=5, B=3, I=2, H=4)
    alone = measure_case(case, "tritonrnn-torch")["tritonrnn-torch", "infer"]
    beside = measure_case(case, "nn_aten", "tritonrnn-torch")
    assert alone["tolerance"] == beside["nn_aten", "infer"]["tolerance"]
    forward = nn.RNN.forward

    def coarse(rnn, *arguments):
        output, h_n = forward(rnn, *arguments)
        return (output, h_n) if output.dtype == torch.float64 else (output, 1.01 * h_n)

    monkeypatch.setattr(nn.RNN, "forward", coarse)
    allowed = measure_case(case, "tritonrnn-torch")["tritonrnn-torch", "infer"]["tolerance"]
    largest = measure_case(case, "nn_aten")["nn_aten", "infer"]["max_rel_err"]
    assert allowed == pytest.approx(2 * largest)
    assert largest > 1e-3


def test_rounding_is_allowed_where_nn_cannot_run_the_case(monkeypatch):
    forward = nn.RNN.forward

    def refuse(rnn, input, *arguments):
        if input.dtype == torch.float32:
            raise NotImplementedError
        return forward(rnn, input, *arguments)

    monkeypatch.setattr(nn.RNN, "forward", refuse)
    rows = measure_case(Case(T=5, B=3, I=2, H=4), "loop")
    assert rows["loop", "infer"]["tolerance"] == 8 * 2.0**-23
    assert rows["loop", "infer"]["status"] == "ok"


@pytest.mark.parametrize(
    ("dtype", "fp32_mode", "eps"),
    [("fp32", "ieee", 2.0**-23), ("fp32", "tf32", 2.0**-10), ("bf16", "none", 2.0**-7)],
)
def test_rounding_of_a_case_is_of_its_products(dtype, fp32_mode, eps):
    assert Case(1, 1, 1, 1, dtype=dtype, fp32_mode=fp32_mode).eps == eps


def test_not_implemented_is_unsupported_and_not_an_error():
    assert failure(NotImplementedError("one day"))["status"] == "unsupported"
    assert failure(torch.OutOfMemoryError("too big"))["status"] == "oom"
    assert failure(RuntimeError("bad"))["status"] == "error"


def test_error_is_raised_again_only_if_the_gpu_is_lost(monkeypatch):
    raised = ArithmeticError("no good")
    raise_if_gpu_is_lost(raised)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    raise_if_gpu_is_lost(raised)

    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(ArithmeticError):
        raise_if_gpu_is_lost(raised)


def test_sensors_that_fail_are_left_out(monkeypatch):
    def fails(device: torch.device) -> float:
        raise RuntimeError("no such sensor")

    readings = iter([10.0, 30.0, 20.0])
    sensors = {"sm_MHz": lambda device: next(readings), "power_W": fails}
    monkeypatch.setattr(timing, "SENSORS", sensors)
    on_gpu = timing.Telemetry(torch.device("cuda"))
    for _ in range(3):
        on_gpu.sample()
    assert on_gpu.columns() == {"sm_MHz": 20.0}
    on_cpu = timing.Telemetry(torch.device("cpu"))
    on_cpu.sample()
    assert on_cpu.columns() == {}


@pytest.fixture
def precision() -> Iterator[None]:
    switches = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before):
        switch.fp32_precision = value


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("fp32_mode", ["ieee", "tf32"])
def test_cudnn_is_switched_off_at_whatever_precision_was_set(fp32_mode):
    # After this, as for a case on a GPU, torch.backends.cudnn.flags() raises.
    set_precision(Case(T=1, B=1, I=1, H=1, fp32_mode=fp32_mode, device="cuda"))
    assert torch.backends.cudnn.rnn.fp32_precision == fp32_mode
    before = torch._C._get_cudnn_enabled()
    with cudnn_off():
        assert not torch._C._get_cudnn_enabled()
        assert torch.backends.cudnn.rnn.fp32_precision == fp32_mode
    assert torch._C._get_cudnn_enabled() == before


class FakeEvent:
    """A CUDA event where there is no GPU; its clock is a list of events."""

    happened: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.place = len(self.happened)
        self.happened.append("event")

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.happened[self.place : other.place + 1] == ["event", "call", "event"]
        return 0.004


def test_event_clock_times_each_call_alone_with_a_cold_cache(monkeypatch):
    happened = FakeEvent.happened
    happened.clear()
    filler = SimpleNamespace(zero_=lambda: happened.append("flush"))
    monkeypatch.setattr(timing, "cache_filler", lambda device: filler)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    leaf = torch.ones(1, requires_grad=True)

    def call() -> None:
        assert leaf.grad is None
        leaf.sum().backward()
        happened.append("call")

    clock = EventClock(Job(call, [leaf]), seconds=0)
    happened.clear()
    assert clock.sample_us() == pytest.approx(4.0)
    assert happened == ["flush", "event", "call", "event", "wait"]
    assert leaf.grad is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peers_decline_what_they_cannot_do(device, monkeypatch):
    monkeypatch.setattr(devices, "device_of", lambda device: devices.DEVICES["sm_90"])
    sizes = {"T": 5, "B": 3, "I": 2, "H": 4, "dtype": "bf16", "fp32_mode": "none"}
    padded = Case(**sizes, device=device)
    declined = {name for name, peer in PEERS.items() if peer.supports(padded)}
    flash = {"flashrnn", "flashrnn-alternating"}
    on_gpu = {"nn_cudnn", "nn_no_cudnn", "loop_graphed"}
    on_gpu |= {f"tritonrnn-{plan}" for plan in PLANS}
    assert declined == (on_gpu if device == "cpu" else {"nn_aten"}) | flash
    jagged = replace(padded, layout="jagged")
    takers = {name for name, peer in PEERS.items() if not peer.supports(jagged)}
    assert takers == {name for name in PEERS if name.startswith("tritonrnn")} - declined
    large = replace(padded, H=2048)
    assert bool(PEERS["tritonrnn-resident"].supports(large))
    assert bool(PEERS["tritonrnn-stepwise"].supports(large)) == (device == "cpu")


def test_long_loops_are_not_compiled():
    assert PEERS["loop_compiled"].supports(Case(T=64, B=1, I=1, H=1)) is None
    assert "unrolls" in (PEERS["loop_compiled"].supports(Case(T=65, B=1, I=1, H=1)) or "")


@pytest.mark.slow
def test_loop_compiles_whole():
    case = Case(T=3, B=2, I=2, H=4, layers=2, directions=2)
    module, workload = case.make_module(0), Workload.make(case, seed=0)
    loop = torch.compile(WrittenOut(module, case), fullgraph=True, backend="eager")
    for got, expected in zip(loop(workload.tokens), module(workload.tokens)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["nobody", "perf.peers.loops:Nobody", "no.such.module:Peer"])
def test_unknown_peer_raises(name):
    with pytest.raises(ValueError, match="peer"):
        find(name)


@pytest.mark.parametrize("name", PLANS_HERE)
def test_forced_plan_reaches_the_launch_and_is_undone(name, monkeypatch):
    from tritonrnn.kernels import launch

    launched = []
    grid = launch.grid
    monkeypatch.setattr(
        launch, "grid", lambda problem, plan: launched.append(plan.name) or grid(problem, plan)
    )
    rnn = tritonrnn.RNN(2, 16, dtype=torch.bfloat16)
    input = torch.randn(3, 2, 2, dtype=torch.bfloat16)
    with forced_plan(name):
        output, _ = rnn(input)
        output.sum().backward()
    assert set(launched) == {name}
    launched.clear()
    with tritonrnn.backend("triton"):
        rnn(input)
    assert launched == ["resident"]
