"""Estimate what a step takes, and rank the plans that fit a problem by it.

A step is a chain of dependent latencies. The device gives its rates; the rest was measured on an
H100 (``python -m perf calibrate``, perf/results/h100-2026-11-26), or is published. These figures
compare Triton's plans with each other only: whether a plan is faster than torch's own path is
measured, by ``../autotune``.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from tritonrnn.kernels.devices import Device
from tritonrnn.kernels.plan import PLANS, LaunchPlan, Problem, cdiv

# What a launch costs the host, in microseconds, from Python: of a stepwise walk on an H100.
LAUNCH_US = 9.0

# The parts of a step on its chain: clocks of shared memory, MMA, epilogue and barrier; a counter
# passed from one multiprocessor to the others through L2, two block barriers included; and, as
# published, bytes a clock that a multiprocessor reads.
STEP_CLOCKS = 266
HANDOFF_US = 0.62
L2_BYTES_PER_CLOCK = 64
SHARED_BYTES_PER_CLOCK = 128


@functools.lru_cache(maxsize=1024)
def rank_plans(problem: Problem, device: Device, training: bool = False) -> tuple[LaunchPlan, ...]:
    """Return all plans that fit, the preferred one first; in training, that fit both passes.

    Plans of one launch come in the order of :data:`PLANS`, and before a launch a step unless a step
    of that is estimated to be faster.
    """
    epilogues = [problem.epilogue, *([f"{problem.epilogue}_grad"] if training else [])]
    passes = [replace(problem, epilogue=epilogue) for epilogue in epilogues]
    fitting = []
    for plan_of in PLANS.values():
        plan, *others = (plan_of(each, device) for each in passes)
        if plan is not None and None not in others:
            fitting.append(plan)
    stepwise_us = stepwise_step_us(problem, device)

    def is_behind_stepwise(plan: LaunchPlan) -> int:
        if plan.name == "stepwise":
            return 1
        # The interpreter is for tests, not for speed.
        return 2 if not device.is_interpreter and step_us(problem, plan) > stepwise_us else 0

    return tuple(sorted(fitting, key=is_behind_stepwise))


def step_us(problem: Problem, plan: LaunchPlan) -> float:
    """Return the time of a step of a plan of one launch, all batch blocks in it."""
    walk_us = _cta_groups_us if plan.name == "cooperative" else _waves_us
    return max(walk_us(problem, plan), _memory_us(problem, plan.device))


def stepwise_step_us(problem: Problem, device: Device) -> float:
    """Return the time of a step that is a launch: the launch, product or memory."""
    flop = 2 * problem.G * problem.B * problem.H**2
    product_us = device.product_us(flop, problem.arithmetic)
    return max(LAUNCH_US, product_us, _memory_us(problem, device))


def programs_at_once(problem: Problem, plan: LaunchPlan) -> int:
    """Return about how many programs of a plan the device runs at the same time."""
    device = plan.device
    if device.is_interpreter:
        return 1
    occupancy = min(
        device.shared_bytes // plan.shared_bytes,
        device.threads // (device.warp_size * plan.num_warps),
    )
    if plan.name == "registers":
        # About a third of a program's registers hold weights.
        weight_bytes = problem.item_bytes * plan.block_h**2
        occupancy = min(occupancy, device.register_bytes // (3 * weight_bytes))
    return device.multiprocessors * max(1, occupancy)


def _waves_us(problem: Problem, plan: LaunchPlan) -> float:
    """Return the time of a step of all programs, in waves where they don't all fit at once."""
    programs = cdiv(problem.B, plan.block_b) * problem.G
    waves = cdiv(programs, programs_at_once(problem, plan))
    return waves * plan.device.clocks_us(STEP_CLOCKS + _product_clocks(problem, plan))


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


def _memory_us(problem: Problem, device: Device) -> float:
    # The drive and aux are read, the state is written; what the next step reads is in the cache.
    matrices = 3 if problem.epilogue.endswith("_grad") else 2
    return device.memory_us(matrices * problem.G * problem.B * problem.H * problem.item_bytes)
