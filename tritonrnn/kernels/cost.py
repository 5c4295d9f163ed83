"""Estimate what a step takes, and choose a plan by it.

A step is a chain of dependent latencies. The device gives its rates; the rest are published figures
that nobody has measured here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tritonrnn.kernels.devices import Device
from tritonrnn.kernels.plan import LaunchPlan, Problem, cdiv, rank_plans, stepwise_plan

# What a step costs the host, in microseconds: of a Triton launch from Python, and of torch's own
# launches from C++. Estimates.
TRITON_LAUNCH_US = 8.0
TORCH_STEP_US = 5.0

# The parts of a step on its chain (NVIDIA's and others' published figures): clocks of shared
# memory, MMA, epilogue and barrier; a counter passed from one multiprocessor to the others through
# L2; bytes a clock that a multiprocessor reads.
STEP_CLOCKS = 160
HANDOFF_US = 0.16
L2_BYTES_PER_CLOCK = 64
SHARED_BYTES_PER_CLOCK = 128


@dataclass(frozen=True)
class Declined:
    """No launch is expected to be faster than torch's own path, for the reason given."""

    reason: str


@functools.lru_cache(maxsize=1024)
def choose_plan(problem: Problem, device: Device) -> LaunchPlan | Declined:
    """Return the first plan of the ranking that beats torch's own path, or why none does."""
    torch_us = torch_step_us(problem, device)
    estimates = []
    for plan in rank_plans(problem, device):
        if device.is_interpreter:
            # Which is for tests, not for speed.
            return plan
        if plan.name == "stepwise":
            # The last one. Torch's own launches cost the host less, so it never beats them.
            plan_us, name = stepwise_step_us(problem, device), "a Triton launch a step"
        else:
            plan_us, name = step_us(problem, plan), plan.name
            if plan_us <= torch_us:
                return plan
        estimates.append(f"{name} {plan_us:.3g} us")
    too_large = ""
    if len(estimates) == 1:
        too_large = (
            f"W_hh of {problem.H} x {problem.H} {problem.dtype} and the state do not fit one "
            f"multiprocessor of {device.arch} ({device.shared_bytes / 1024:.0f} KiB of shared "
            "memory); "
        )
    return Declined(
        f"{too_large}a step is estimated to take {', '.join(estimates)}, and {torch_us:.3g} us on "
        "torch's own path"
    )


def best_triton_plan(problem: Problem, device: Device) -> LaunchPlan:
    """Return what to launch where torch's own path is faster but can't serve, or Triton is forced.

    Never cooperative: a plan whose programs wait for each other is to be chosen for its speed only.
    """
    stepwise_us = stepwise_step_us(problem, device)
    for plan in rank_plans(problem, device):
        if plan.name not in ("cooperative", "stepwise") and step_us(problem, plan) <= stepwise_us:
            return plan
    return stepwise_plan(problem, device)


def step_us(problem: Problem, plan: LaunchPlan) -> float:
    """Return the time of a step of a plan of one launch, all batch blocks in it."""
    walk_us = _cta_groups_us if plan.name == "cooperative" else _waves_us
    return max(walk_us(problem, plan), _memory_us(problem, plan.device))


def stepwise_step_us(problem: Problem, device: Device) -> float:
    """Return the time of a step that is a Triton launch: the launch, product or memory."""
    return max(TRITON_LAUNCH_US, _dense_step_us(problem, device))


def torch_step_us(problem: Problem, device: Device) -> float:
    """Return the time of a step of torch's own path: its launches, product or memory."""
    return max(TORCH_STEP_US, _dense_step_us(problem, device))


def _waves_us(problem: Problem, plan: LaunchPlan) -> float:
    """Return the time of a step of all programs, in waves where they don't all fit at once."""
    device = plan.device
    occupancy = min(
        device.shared_bytes // plan.shared_bytes,
        device.threads // (device.warp_size * plan.num_warps),
    )
    if plan.name == "registers":
        # About a third of a program's registers hold weights.
        weight_bytes = problem.item_bytes * plan.block_h**2
        occupancy = min(occupancy, device.register_bytes // (3 * weight_bytes))
    programs = cdiv(problem.B, plan.block_b) * problem.G
    waves = cdiv(programs, device.multiprocessors * max(1, occupancy))
    return waves * device.clocks_us(STEP_CLOCKS + _product_clocks(problem, plan))


def _cta_groups_us(problem: Problem, plan: LaunchPlan) -> float:
    """Return the time of a step of all batch blocks of a CTA group, some of them interleaved."""
    state_clocks = problem.item_bytes * problem.H * plan.block_b / L2_BYTES_PER_CLOCK
    clocks = STEP_CLOCKS + _product_clocks(problem, plan) + state_clocks
    busy_us = plan.device.clocks_us(clocks)
    num_cta_groups = plan.programs // (cdiv(problem.H, plan.block_h) * problem.G)
    blocks = cdiv(cdiv(problem.B, plan.block_b), num_cta_groups)
    interleaved, alone = divmod(blocks, plan.interleave)
    # Of two interleaved blocks, one is handed over while the CTA group is busy with the other.
    interleaved_us = max(plan.interleave * busy_us, HANDOFF_US + busy_us)
    return interleaved * interleaved_us + alone * (HANDOFF_US + busy_us)


def _product_clocks(problem: Problem, plan: LaunchPlan) -> float:
    """Return the clocks that a program's weights cost a step: read or, in registers, multiplied."""
    products = 3 if plan.precision == "tf32x3" else 1
    weights = products * plan.block_h * cdiv(problem.H, plan.block_k) * plan.block_k
    if plan.name != "registers":
        return problem.item_bytes * weights / SHARED_BYTES_PER_CLOCK
    # Products of fp32 accuracy are three of TF32.
    arithmetic = "tf32" if plan.precision == "tf32x3" else problem.arithmetic
    return plan.device.product_clocks(2 * weights * plan.block_b, arithmetic)


def _dense_step_us(problem: Problem, device: Device) -> float:
    flop = 2 * problem.G * problem.B * problem.H**2
    return max(device.product_us(flop, problem.arithmetic), _memory_us(problem, device))


def _memory_us(problem: Problem, device: Device) -> float:
    # The drive and aux are read, the state is written; what the next step reads is in the cache.
    matrices = 3 if problem.epilogue.endswith("_grad") else 2
    return device.memory_us(matrices * problem.G * problem.B * problem.H * problem.item_bytes)
