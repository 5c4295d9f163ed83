"""The trials of one device: which are missing, making them, and what follows from the records."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritonrnn.autotune import timing, verification
from tritonrnn.autotune.bench import Bench, is_of_capture, is_traced
from tritonrnn.autotune.calls import Call
from tritonrnn.autotune.records import UNTIMED, Kernel, Key, Record, one_line
from tritonrnn.autotune.store import Store, log
from tritonrnn.environment import Mode
from tritonrnn.kernels.cost import rank_plans
from tritonrnn.kernels.devices import device_of
from tritonrnn.kernels.launch import is_plan_forced
from tritonrnn.kernels.plan import LaunchPlan

# Plans of a ranking that are tried at most: the first call of a class waits for them.
MAX_TRIALS = 3
# The verdicts that let a plan serve.
SERVING = ("right", "faster", "tie")
# What does not tell that a plan can't serve another process.
PASSING = (torch.OutOfMemoryError, MemoryError, OSError)
MOST_COMPILERS = 8

# What ``dispatch`` made of decisions that no trial can change, by what it was asked: so that a call
# for which all is known costs a look-up.
standing: dict[Any, Any] = {}


@dataclass(frozen=True)
class Decision:
    """What serves a call.

    Args:
        plan: of the forward pass; None for torch's own path.
        reason: why, in one sentence.
        record: the one that decided, if there is one.
        missing: what is to be tried first, as its record could change the decision; or None.
    """

    plan: LaunchPlan | None
    reason: str
    record: Record | None = None
    missing: Key | None = None


class Tuner:
    """The trials of one device."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.store = Store(bench.identity())
        # Trials of two threads would spoil each other's times. The second thread waits.
        self._lock = threading.Lock()

    def first_possible(self, call: Call) -> Decision:
        """Return the first plan that is not known to be wrong.

        Raises:
            RuntimeError: all are.
        """
        refusals = []
        for plan in rank_plans(call.problem, device_of(call.device), call.training):
            refusal = self._refusal(call, plan)
            if refusal is None:
                return Decision(plan, "triton was asked for.")
            refusals.append(refusal.cause)
        raise RuntimeError(
            "the triton back end can't serve this call: no plan is right on this device: "
            + "; ".join(refusals)
        )

    def decide(
        self, call: Call, plans: Sequence[LaunchPlan], asked: Mode, may_try: bool
    ) -> Decision:
        """Return the first plan that is right and not slower than torch's own path.

        Args:
            call: the call.
            plans: all that fit it, ranked.
            asked: what is asked of trials.
            may_try: whether to make those that are missing, here and now.
        """
        if asked == "off":
            return self._otherwise(call, plans, "TRITONRNN_AUTOTUNE is off.")
        candidates = plans
        if not call.ragged:
            if asked == "verify":
                # One launch a pass. More are for where torch's kernels can't serve.
                candidates = [plan for plan in plans if plan.name != "stepwise"]
            candidates = candidates[:MAX_TRIALS]
        return self.choose_among(candidates, call, plans, asked, may_try)

    def choose_among(
        self,
        candidates: Sequence[LaunchPlan],
        call: Call,
        plans: Sequence[LaunchPlan],
        asked: Mode,
        may_try: bool,
    ) -> Decision:
        """Return the first of some of the plans that is right and not slower."""
        decision = self._look(call, plans, candidates, asked)
        if decision.missing is None or not may_try:
            return decision
        if is_plan_forced() or is_traced() or not self.bench.may_try():
            return decision
        # Within a backward pass this thread does not wait: the other one's trial may wait for it.
        if not self._lock.acquire(blocking=torch._C._current_graph_task_id() == -1):
            return decision
        wrong: list[Record] = []
        try:
            # Another thread may have made the trials meanwhile.
            decision = self._look(call, plans, candidates, asked)
            if decision.missing is not None:
                with self.bench.session():
                    # What the caller's own kernels have done is raised here, and is no trial's.
                    try:
                        self.bench.synchronize()
                    except RuntimeError as error:
                        if is_of_capture(error):
                            return decision
                        raise
                    compiled: dict[Kernel, Future[None]] = {}
                    while decision.missing is not None:
                        record = self._try(decision.missing, call, plans, compiled)
                        if record is None:
                            break
                        if record.verdict == "wrong":
                            wrong.append(record)
                        decision = self._look(call, plans, candidates, asked)
        finally:
            self._lock.release()
            # What was decided before there were these records.
            standing.clear()
        # Last, as a warning may be an error to the caller.
        for record in wrong:
            warnings.warn(
                f"tritonrnn: on {self.store.device['name']}, {record.cause} for {record.key}. It "
                "will not serve there. Please report this, with the rows of tritonrnn.trials()",
                RuntimeWarning,
                stacklevel=2,
            )
        return decision

    def _look(
        self, call: Call, plans: Sequence[LaunchPlan], candidates: Sequence[LaunchPlan], asked: Mode
    ) -> Decision:
        """Decide by the records that there are."""
        missing: Key | None = None
        refusals = []
        for plan in candidates:
            keys: list[Key] = [*call.kernels(plan.name)]
            if asked == "on" and (plan.waits or not call.ragged):
                keys.append(call.shapes(plan.name))
            record = None
            for key in keys:
                record = self.store.get(key)
                if record is None or record.verdict not in SERVING:
                    break
            if record is None:
                missing = missing or key
            elif record.verdict in SERVING:
                return Decision(plan, _why(record), record, missing)
            else:
                refusals.append(record)
        if missing is not None:
            why = "its plans have yet to be tried here, by a call outside of capture and tracing."
            return replace(self._otherwise(call, plans, why), missing=missing)
        if not refusals:
            return self._otherwise(call, plans, "no plan of one launch a pass fits it.")
        return self._otherwise(call, plans, f"{refusals[0].cause}.", refusals[0])

    def _otherwise(
        self, call: Call, plans: Sequence[LaunchPlan], why: str, record: Record | None = None
    ) -> Decision:
        """Return torch's own path, or what comes next to it where that can't serve."""
        return Decision(self._baseline(call, plans), why, record)

    def _baseline(self, call: Call, plans: Sequence[LaunchPlan]) -> LaunchPlan | None:
        """Return the plan that a ragged batch has in place of torch's own path.

        It waits for nobody, neither its programs for each other nor the host for the device.
        """
        for plan in plans if call.ragged else ():
            if not plan.waits and self._refusal(call, plan) is None:
                return plan
        return None

    def _refusal(self, call: Call, plan: LaunchPlan) -> Record | None:
        """Return the record of a kernel of the plan that is wrong or fails, if there is one."""
        for kernel in call.kernels(plan.name):
            record = self.store.get(kernel)
            if record is not None and record.verdict not in SERVING:
                return record
        return None

    def _try(
        self,
        key: Key,
        call: Call,
        plans: Sequence[LaunchPlan],
        compiled: dict[Kernel, Future[None]],
    ) -> Record | None:
        """Make the trial of a key, and remember what it finds; None if a capture hinders it."""
        started = time.perf_counter()
        mark = None
        try:
            if isinstance(key, Kernel):
                if key not in compiled:
                    compiled |= self._compile(key, call)
                compiled[key].result()
            # From here on, a fault may end the process.
            mark = self.store.start(key)
            if isinstance(key, Kernel):
                is_right, why, error = verification.verify(key, self.bench)
                found = Record(key, "right" if is_right else "wrong", why, 0.0, error)
            else:
                baseline = self._baseline(call, plans)
                against = baseline.name if baseline else call.torch_path
                found = timing.compare(key, against, self.bench)
            self.bench.synchronize()
        except Exception as error:
            if is_of_capture(error):
                return None
            found = Record(key, "failed", one_line(error), 0.0)
            # A time may fail for what is wrong with torch's own path.
            lasts = isinstance(key, Kernel) and not isinstance(error, PASSING)
            try:
                self.bench.synchronize()
            except Exception:
                self.store.put(found)
                raise RuntimeError(
                    f"the trial of the plan {key.plan} has left the GPU unusable for this process: "
                    f"{found.reason}. Start it again: no process will try this plan any more. With "
                    "TRITONRNN_AUTOTUNE=off, none will try any"
                ) from error
        else:
            self.store.forget_deaths(key)
            # A tie may be none the next time, and the other path may not fail.
            lasts = isinstance(key, Kernel) or (
                found.verdict != "tie" and found.other_us != UNTIMED
            )
        finally:
            self.store.end(mark)
        found = replace(found, seconds=time.perf_counter() - started)
        found = (self.store.put if lasts else self.store.remember)(found)
        log.info("%s (%s, %.2f s)", found.cause, key, found.seconds)
        return found

    def _compile(self, key: Kernel, call: Call) -> dict[Kernel, Future[None]]:
        """Compile a kernel, and those of its plan that have no record, in parallel; wait for them.

        Not those of the next plan, which is rarely tried: Python's part of the work would go on
        beside the caller's first steps, and take time from them.
        """
        # Another process may have written the record of the first one meanwhile.
        kernels = [key, *(k for k in call.kernels(key.plan) if k != key and not self.store.get(k))]
        with ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1)) as pool:
            return {
                kernel: pool.submit(verification.precompile(kernel, self.bench))
                for kernel in kernels
            }


def _why(record: Record) -> str:
    if record.verdict == "right":
        return "its trial on this device found it right."
    if record.verdict == "tie":
        return f"its trial on this device found it right, and as fast as {record.against}."
    return f"its trial on this device found it right, and faster than {record.against}."
