"""Plans verified and timed on the GPU at hand, before they serve.

A plan serves a class of calls if its kernels compute the right numbers on this device
(``verification.py``), and if it is not slower than torch's own path (``timing.py``). What a trial
finds is remembered on disk (``records.py``).

Import this package only where Triton is to be used: the rest of tritonrnn works without it.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch

from tritonrnn.autotune import timing, verification
from tritonrnn.autotune.bench import Bench
from tritonrnn.autotune.records import Kernel, Key, Record, Shapes, Store, log, stored_rows
from tritonrnn.kernels.cost import rank_plans
from tritonrnn.kernels.devices import device_of
from tritonrnn.kernels.launch import DTYPES
from tritonrnn.kernels.plan import LaunchPlan, Problem

# Plans of a ranking that are tried at most: the first call of a class waits for them.
MAX_TRIALS = 3
# What does not tell that a plan can't serve another process.
PASSING = (torch.OutOfMemoryError, MemoryError, OSError)

Mode = Literal["on", "verify", "off"]

# The devices on which trials run, by torch's type. The interpreter's is added by tests only.
BENCHES: dict[str, Callable[[torch.device], Bench]] = {"cuda": Bench}


class Call(NamedTuple):
    """What is to be known of a call to choose its plan.

    Args:
        device, dtype: of the tensors, and in which it is computed.
        tf32: whether fp32 products may round their operands to TF32.
        T, B, I, G, H, L: the sizes, by the dimension key of ``layout.py``.
        nonlinearity: "tanh" or "relu".
        mapped: whether rows come from a row map: packed or ragged.
        ragged: whether torch's own kernels don't take the layout, or so many steps.
        hx: whether initial states are given.
        training: whether a gradient may be wanted.
        torch_path: what serves it otherwise, "aten" or "in-place".
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool
    T: int
    B: int
    I: int  # noqa: E741 (the dimension key's)
    G: int
    H: int
    L: int
    nonlinearity: str
    mapped: bool
    ragged: bool
    hx: bool
    training: bool
    torch_path: str

    @property
    def problem(self) -> Problem:
        """Return the problem of a layer's forward pass."""
        dtype = DTYPES[self.dtype]
        return Problem(self.T, self.B, self.G, self.H, dtype, self.tf32, self.nonlinearity)

    def kernels(self, plan: str) -> list[Kernel]:
        """Return what a plan compiles for the call, the kernel of the forward pass first."""
        passes = [(self.nonlinearity, self.hx)]
        if self.training:
            # The gradient of h_n may be wanted or not.
            passes += [(f"{self.nonlinearity}_grad", v_0) for v_0 in (False, True)]
        dtype = DTYPES[self.dtype]
        return [
            Kernel(plan, epilogue, dtype, self.tf32, self.G, self.H, self.mapped, v_0)
            for epilogue, v_0 in passes
        ]

    def shapes(self, plan: str) -> Shapes:
        """Return the class of the call."""
        return Shapes(
            plan,
            self.nonlinearity,
            DTYPES[self.dtype],
            self.tf32,
            self.G,
            self.H,
            self.mapped,
            self.hx,
            self.ragged,
            self.training,
            min(_rounded(self.T), timing.MOST_STEPS),
            _rounded(self.B),
            _rounded(self.I),
            min(self.L, 2),
        )


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


# Decisions by what they were made for, so that a call for which all is known costs a look-up.
_decisions: dict[tuple[Call, bool, Mode], Decision] = {}
MOST_DECISIONS = 4096


def decide(call: Call, *, forced: bool = False, may_try: bool = False) -> Decision:
    """Decide what serves a call, after trials on its device where some are missing.

    Args:
        call: the call.
        forced: whether torch's own path is out of the question, and no trial is to be made.
        may_try: whether trials may be made here and now.

    Raises:
        RuntimeError: ``forced``, and every plan is known to be wrong or to fail here; or a trial
            has left the device unusable for this process.
        ValueError: TRITONRNN_AUTOTUNE is none of "on", "verify" and "off".
    """
    asked = mode()
    key = call, forced, asked
    known = _decisions.get(key)
    if known is not None:
        return known
    tuner = tuner_of(call.device)
    plans = rank_plans(call.problem, device_of(call.device), call.training)
    if tuner is None:
        decision = Decision(plans[0], "the kernels have a plan for it.")
    elif forced:
        decision = tuner.first_possible(call, plans)
    else:
        decision = tuner.decide(call, plans, asked, may_try)
    if decision.missing is None:
        if len(_decisions) >= MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = decision
    return decision


def mode() -> Mode:
    """Return what TRITONRNN_AUTOTUNE asks for, or "verify" where results are to be repeatable.

    A time is never the same twice, and so would a choice by it be, and the rounding of its plan.
    """
    asked = os.environ.get("TRITONRNN_AUTOTUNE") or "on"
    if asked not in get_args(Mode):
        raise ValueError(f"TRITONRNN_AUTOTUNE: expected one of {get_args(Mode)}, got {asked!r}")
    if asked == "on" and (
        torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    ):
        return "verify"
    return asked  # type: ignore[return-value]


class Tuner:
    """The trials of one device."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.store = Store(bench.identity())
        # Trials of two threads would spoil each other's times. The second thread waits.
        self._lock = threading.Lock()

    def first_possible(self, call: Call, plans: Sequence[LaunchPlan]) -> Decision:
        """Return the first plan that is not known to be wrong.

        Raises:
            RuntimeError: all are.
        """
        refusals = []
        for plan in plans:
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
        """Return the first plan that is right and not slower than torch's own path."""
        if asked == "off":
            return self._otherwise(call, plans, "TRITONRNN_AUTOTUNE is off.")
        candidates = plans
        if not call.ragged:
            if asked == "verify":
                # One launch a pass. More are for where torch's kernels can't serve.
                candidates = [plan for plan in plans if plan.name != "stepwise"]
            candidates = candidates[:MAX_TRIALS]
        decision = self._look(call, plans, candidates, asked)
        if decision.missing is None or not may_try or not self.bench.may_try():
            return decision
        # Within a backward pass this thread does not wait: the other one's trial may wait for it.
        if not self._lock.acquire(blocking=torch._C._current_graph_task_id() == -1):
            return decision
        wrong: list[Record] = []
        try:
            # Another thread may have made the trials meanwhile.
            decision = self._look(call, plans, candidates, asked)
            if decision.missing is not None:
                with self.bench.session(), self._compiling(call, candidates) as compiled:
                    while decision.missing is not None:
                        record = self._try(decision.missing, call, plans, compiled)
                        if record.verdict == "wrong":
                            wrong.append(record)
                        decision = self._look(call, plans, candidates, asked)
        finally:
            self._lock.release()
            # They are from before there were these records.
            _decisions.clear()
        # Last, as a warning may be an error to the caller.
        for record in wrong:
            warnings.warn(
                f"tritonrnn: {record.cause}, on {self.store.device['name']}. This plan will not "
                "be used here. Please report this, with the rows of tritonrnn.trials()",
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
            why = "a trial of it has yet to be made, and is not made here."
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
        compiled: Mapping[Kernel, Future[None]],
    ) -> Record:
        """Make the trial of a key, and remember what it finds."""
        started = time.perf_counter()
        mark = None
        try:
            if isinstance(key, Kernel) and key in compiled:
                compiled[key].result()
            # From here on, a fault may end the process.
            mark = self.store.start(key)
            if isinstance(key, Kernel):
                is_right, why, error = verification.verify(key, self.bench)
                found = Record(key, "right" if is_right else "wrong", why, 0.0, error)
            else:
                baseline = self._baseline(call, plans)
                against = baseline.name if baseline else call.torch_path
                verdict, plan_us, other_us = timing.compare(key, against, self.bench)
                why = f"{plan_us[1]:.3g} us against {other_us[1]:.3g} us"
                found = Record(key, verdict, why, 0.0, 0.0, plan_us, other_us, against)
            self.bench.synchronize()
        except Exception as error:
            found = Record(key, "failed", _one_line(error), 0.0)
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
            # A tie may be none the next time.
            lasts = found.verdict != "tie"
        finally:
            self.store.end(mark)
        found = replace(found, seconds=time.perf_counter() - started)
        found = (self.store.put if lasts else self.store.remember)(found)
        log.info("%s (%s, %.2f s)", found.cause, key, found.seconds)
        return found

    @contextmanager
    def _compiling(
        self, call: Call, plans: Sequence[LaunchPlan]
    ) -> Iterator[Mapping[Kernel, Future[None]]]:
        """Compile the kernels of all plans in parallel, those of the first plan first."""
        kernels = [kernel for plan in plans for kernel in call.kernels(plan.name)]
        pool = ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1))
        try:
            yield {
                kernel: pool.submit(verification.precompile(kernel, self.bench))
                for kernel in kernels
                if self.store.get(kernel) is None
            }
        finally:
            # Nobody waits for those that are not needed any more.
            pool.shutdown(wait=False, cancel_futures=True)


# The verdicts that let a plan serve.
SERVING = ("right", "faster", "tie")
MOST_COMPILERS = 8

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
    return [*stored_rows(), *(row for tuner in _tuners.values() for row in tuner.store.rows())]


def _why(record: Record) -> str:
    if record.verdict == "right":
        return "its trial on this device found it right."
    if record.verdict == "tie":
        return f"its trial on this device found it right, and as fast as {record.against}."
    return f"its trial on this device found it right, and faster than {record.against}."


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _rounded(n: int) -> int:
    """Return the next power of two."""
    return 1 << max(n - 1, 0).bit_length()
