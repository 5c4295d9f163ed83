"""What surrounds a launch on the host."""

import pytest
import torch

from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES
from tritonrnn.kernels.plan import Problem, cooperative_plan


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
