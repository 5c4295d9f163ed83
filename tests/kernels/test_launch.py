"""What surrounds a launch on the host."""

from __future__ import annotations

import pytest
import torch

from tests.support.imitation import on_launch
from tests.support.recurrence import LAYOUTS, make_case
from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES
from tritonrnn.kernels.plan import Problem, cooperative_plan
from tritonrnn.layout import SequenceLayout


def test_check_barrier_raises_where_a_program_gave_up():
    problem = Problem(T=9, B=16, G=1, H=512, dtype="bf16")
    plan = cooperative_plan(problem, DEVICES["sm_90"])
    counters = launch.barrier_counters(problem, plan, torch.device("cpu"))
    launch.check_barrier(counters, plan)
    counters[0, 0] = 0
    with pytest.raises(RuntimeError, match="gave up waiting for the others of its CTA group"):
        launch.check_barrier(counters, plan)


def test_check_barrier_has_a_message_that_cuda_takes(monkeypatch):
    """On CUDA torch takes 254 characters, whether or not the assertion holds; here any number."""
    messages = []
    monkeypatch.setattr(torch, "_assert_async", lambda word, message: messages.append(message))
    for H, B in [(16, 1), (512, 64), (1024, 10**6), (1664, 10**6)]:
        problem = Problem(T=10**6, B=B, G=4, H=H, dtype="bf16")
        plan = cooperative_plan(problem, DEVICES["sm_90"])
        launch.check_barrier(torch.ones(1, 1), plan)
    assert max(map(len, messages)) < 255


def test_wait_in_vain_in_a_trial_raises_here_and_soon(monkeypatch):
    """Counters begin too low, so that every program waits for one addition more than there is."""
    make = launch.barrier_counters

    def too_low(*arguments):
        counters = make(*arguments)
        counters[1:] -= 1
        return counters

    case = make_case(LAYOUTS["packed"], 5, "tanh")
    right = case.run("cooperative")
    with launch.trial():
        assert torch.equal(case.run("cooperative"), right)
    monkeypatch.setattr(launch, "barrier_counters", too_low)
    monkeypatch.setattr(launch, "MAX_SPINS", None)
    monkeypatch.setattr(launch, "MAX_SPINS_IN_TRIAL", 3)
    with pytest.raises(launch.BarrierTimeoutError), launch.trial():
        case.run("cooperative")


def test_unaligned_rows_are_compiled_for_and_not_launched(monkeypatch):
    launched = on_launch(monkeypatch, lambda plan, arguments: None)
    layout = SequenceLayout.time_major(3, 2)
    a = torch.ones(layout.N * 5 + 1)[1:].view(layout.N, 5)
    arguments = {"epilogue": "tanh", "reverse": (False,), "tf32": False, "plan": "resident"}
    launch.recurrence(a, None, torch.eye(5)[None], None, layout, **arguments, compile_only=True)
    assert launched == []
    assert (a == 1).all()
    launch.recurrence(a, None, torch.eye(5)[None], None, layout, **arguments)
    assert launched == ["resident"]
