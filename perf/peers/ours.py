"""Run tritonrnn: with its own choice, on its torch path, and with each plan forced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn

import tritonrnn
from perf.bench.cases import Case, Workload
from perf.peers.peer import Peer, Runner


class Ours(Peer):
    """Run ``tritonrnn.RNN`` with its own choice, or as switches have it.

    Args:
        name: The name of the peer.
        context: Returns the switches that are set during the calls.
    """

    compiles = True

    def __init__(
        self, name: str, context: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.name = name
        self._context = context

    def supports(self, case: Case) -> str | None:
        """Return None: ``tritonrnn.RNN`` takes every layout."""
        return None

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Convert the module, and ask for the plan that will serve it."""
        ours = tritonrnn.convert(module)
        assert isinstance(ours, tritonrnn.RNN)
        with self._context():
            choice = tritonrnn.explain(ours, workload.input_of(workload.tokens))
        return Runner(
            lambda tokens: workload.run(ours, tokens),
            list(ours.parameters()),
            plan=self._plan(choice),
            context=self._context,
        )

    def _plan(self, choice: tritonrnn.Explanation) -> str:
        return f"{choice.backend}, {choice.plan}"


class Forced(Ours):
    """Run ``tritonrnn.RNN`` by the plan of a name, whatever it would choose."""

    def __init__(self, plan: str) -> None:
        super().__init__(f"tritonrnn-{plan}", partial(forced_plan, plan))
        self._forced = plan

    def supports(self, case: Case) -> str | None:
        """Return None on a GPU; a launch raises if the plan does not fit."""
        return None if case.on_gpu else "the interpreter is not timed"

    def _plan(self, choice: tritonrnn.Explanation) -> str:
        return f"triton, {self._forced} (forced)"


@contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Launch every recurrence by the plan of this name, those of a backward pass included.

    Raises:
        RuntimeError: from a launch whose problem the plan does not fit.
    """
    from tritonrnn.kernels import launch

    with launch.forced_plan(name), tritonrnn.backend("triton"):
        yield
