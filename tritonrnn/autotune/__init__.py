"""Plans verified and timed on the GPU at hand, before they serve.

A plan serves a class of calls if its kernels compute the right numbers on this device
(``verification.py``), and if it is not slower than torch's own path (``timing.py``). What a trial
finds is remembered on disk (``records.py``, ``store.py``), and decides (``tuner.py``).

Import this package only where Triton is to be used: the rest of tritonrnn works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tritonrnn.autotune.bench import Bench
from tritonrnn.autotune.calls import Call
from tritonrnn.autotune.records import Kernel
from tritonrnn.autotune.store import stored_rows
from tritonrnn.autotune.tuner import SERVING, Decision, Tuner
from tritonrnn.autotune.tuner import standing as standing
from tritonrnn.environment import AUTOTUNE, Mode
from tritonrnn.kernels.cost import rank_plans
from tritonrnn.kernels.devices import device_of
from tritonrnn.kernels.plan import LaunchPlan, Problem

# The devices on which trials run, by torch's type. The interpreter's is added by tests only.
BENCHES: dict[str, Callable[[torch.device], Bench]] = {"cuda": Bench}

_asked = AUTOTUNE


def mode() -> Mode:
    """Return what TRITONRNN_AUTOTUNE asks for, or "verify" where results are to be repeatable.

    A time is never the same twice, and so would a choice by it be, and the rounding of its plan.
    """
    is_repeatable = (
        torch.are_deterministic_algorithms_enabled() or torch._C._get_cudnn_deterministic()
    )
    return "verify" if is_repeatable and _asked == "on" else _asked


def decide(call: Call, asked: Mode, *, forced: bool = False, may_try: bool = False) -> Decision:
    """Decide what serves a call, after trials on its device where some are missing.

    Args:
        call: the call.
        asked: the :func:`mode`.
        forced: whether torch's own path is out of the question, and no trial is to be made.
        may_try: whether trials may be made here and now.

    Raises:
        RuntimeError: ``forced``, and every plan is known to be wrong or to fail here; or a trial
            has left the device unusable for this process.
    """
    tuner = tuner_of(call.device)
    if tuner is not None and forced:
        return tuner.first_possible(call)
    plans = rank_plans(call.problem, device_of(call.device), call.training)
    if tuner is None:
        return Decision(plans[0], "the kernels have a plan for it.")
    return tuner.decide(call, plans, asked, may_try)


_tuners: dict[torch.device, Tuner] = {}


def tuner_of(device: torch.device) -> Tuner | None:
    """Return what makes the trials of a device, or None where none are made."""
    tuner = _tuners.get(device)
    if tuner is None and device.type in BENCHES:
        # Of two threads, the second one's is used by nobody.
        tuner = _tuners.setdefault(device, Tuner(BENCHES[device.type](device)))
    return tuner


def first_possible(
    problem: Problem, device: torch.device, *, mapped: bool, v_0: bool
) -> LaunchPlan:
    """Return the first plan for one recurrence that is not known to be wrong.

    Raises:
        RuntimeError: all are.
    """
    tuner = tuner_of(device)
    refusals = []
    for plan in rank_plans(problem, device_of(device)):
        kernel = Kernel(
            plan.name,
            problem.epilogue,
            problem.dtype,
            problem.tf32,
            problem.G,
            problem.H,
            mapped,
            v_0,
        )
        record = None if tuner is None else tuner.store.get(kernel)
        if record is None or record.verdict in SERVING:
            return plan
        refusals.append(record.cause)
    raise RuntimeError(f"no plan is right on this device: {'; '.join(refusals)}")


def trials() -> list[dict[str, Any]]:
    """Return all records as rows, see :func:`tritonrnn.trials`."""
    found = [*stored_rows(), *(row for tuner in _tuners.values() for row in tuner.store.rows())]
    return sorted(found, key=lambda row: row["when"])
