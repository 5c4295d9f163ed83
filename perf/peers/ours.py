"""Run tritonrnn: with its own choice, on its torch path, and with each plan forced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import tritonrnn
from perf.bench.cases import Case, Workload, make_cell
from perf.peers.peer import Context, Peer, Runner
from tritonrnn.kernels import cost, devices
from tritonrnn.kernels.plan import Problem


class Ours(Peer):
    """Run ``tritonrnn.RNN``, or a loop of ``RNNCell``, by its own choice or as a context has it."""

    def __init__(self, name: str, context: Context = nullcontext) -> None:
        self.name, self._context = name, context

    def supports(self, case: Case) -> str | None:
        """Return None: ``tritonrnn.RNN`` takes every layout."""
        return None

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Convert the module."""
        parameters, context = list(module.parameters()), self._context
        if case.layout == "cell":
            cell = tritonrnn.convert(make_cell(module))
            return Runner(partial(workload.run_cell, cell), parameters, context=context)
        ours = tritonrnn.convert(module)
        assert isinstance(ours, tritonrnn.RNN)

        def plan() -> str:
            given = {} if workload.lengths is None else {"lengths": workload.lengths}
            choice = tritonrnn.explain(ours, workload.input_of(workload.tokens), **given)
            return f"{choice.backend}, {choice.plan}"

        return Runner(partial(workload.run, ours), parameters, plan, context)


class Forced(Ours):
    """Run ``tritonrnn.RNN`` by the plan of a name, whatever it would choose."""

    def __init__(self, plan: str) -> None:
        super().__init__(f"tritonrnn-{plan}", partial(forced_plan, plan))
        self._forced = plan

    def supports(self, case: Case) -> str | None:
        """Return why the plan does not run a case, forward and backward, or None if it does."""
        if not case.on_gpu:
            return "the interpreter is not timed"
        if case.layout == "cell":
            return "a cell has no plan"
        sizes = case.T, case.B, case.directions, case.H
        is_tf32 = case.precision == "tf32"
        problem = Problem(*sizes, case.dtype, is_tf32, case.nonlinearity)
        device = devices.device_of(torch.device(case.device))
        fitting = cost.rank_plans(problem, device, training=True)
        return None if self._forced in [one.name for one in fitting] else "it does not fit"

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Convert the module."""
        runner = super().build(case, module, workload)
        return replace(runner, plan=lambda: f"triton, {self._forced} (forced)")


@contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Launch every recurrence by the plan of this name, those of a backward pass included.

    Raises:
        RuntimeError: from a launch whose problem the plan does not fit.
    """
    from tritonrnn.kernels import launch

    with launch.forced_plan(name), tritonrnn.backend("triton"):
        yield
