"""Run tritonrnn: with its own choice, on its torch path, and with each plan forced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

from torch import nn

import tritonrnn
from perf.bench.cases import Case, Workload
from perf.peers.peer import Peer, Runner


class Ours(Peer):
    """Run ``tritonrnn.RNN`` with its own choice."""

    name = "tritonrnn"
    compiles = True

    def supports(self, case: Case) -> str | None:
        """Return None: ``tritonrnn.RNN`` takes every layout."""
        return None

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Convert the module, and ask for the plan that will serve it."""
        ours = tritonrnn.convert(module)
        assert isinstance(ours, tritonrnn.RNN)
        with self.context():
            choice = tritonrnn.explain(ours, workload.input_of(workload.tokens))
        return Runner(
            lambda tokens: workload.run(ours, tokens),
            list(ours.parameters()),
            plan=f"{choice.backend}, {choice.plan}",
            context=self.context,
        )

    def context(self) -> AbstractContextManager[object]:
        """Return the switches that are set during the calls."""
        return nullcontext()


class OnTorch(Ours):
    """Run ``tritonrnn.RNN`` on its torch path."""

    name = "tritonrnn-torch"

    def context(self) -> AbstractContextManager[object]:
        """Return the switch."""
        return tritonrnn.backend("torch")


class Resident(Ours):
    """Run ``tritonrnn.RNN`` with W_hh in one multiprocessor, whatever it would choose."""

    name = "tritonrnn-resident"
    plan: ClassVar[str] = "resident"

    def supports(self, case: Case) -> str | None:
        """Return None on a GPU; a launch raises if the plan does not fit."""
        return None if case.on_gpu else "the interpreter is not timed"

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Convert the module."""
        return replace(super().build(case, module, workload), plan=f"triton, {self.plan} (forced)")

    def context(self) -> AbstractContextManager[object]:
        """Return the switches."""
        return forced_plan(self.plan)


class Registers(Resident):
    """Run ``tritonrnn.RNN`` with W_hh in one multiprocessor's registers."""

    name = "tritonrnn-registers"
    plan = "registers"


class Stepwise(Resident):
    """Run ``tritonrnn.RNN`` with a launch a step."""

    name = "tritonrnn-stepwise"
    plan = "stepwise"


class Cooperative(Resident):
    """Run ``tritonrnn.RNN`` with W_hh spread over the CTAs of a group."""

    name = "tritonrnn-cooperative"
    plan = "cooperative"


@contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Launch every recurrence by the plan of this name, those of a backward pass included.

    Raises:
        RuntimeError: from a launch whose problem the plan does not fit.
    """
    from tritonrnn.kernels import launch

    with launch.forced_plan(name), tritonrnn.backend("triton"):
        yield
