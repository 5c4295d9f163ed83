"""Define a peer: its name, what it can't do, and how it runs a case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from perf.bench.cases import Case, Workload

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
# Returns switches that are set while it is entered.
Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Runner:
    """Hold a peer that is ready to run one case.

    Attributes:
        forward: Takes the tokens, returns the output, or its rows, and ``h_n``.
        parameters: In the order of ``nn.RNN``; they get gradients.
        plan: Returns the plan by which it runs the case. It is asked after a run, which may have
            made trials, and as that ran: in the context, with or without gradients.
        context: Switches that are set during the calls, forward and backward. It is entered for
            each sample, not for each call, because entering takes time.
        uncaptured: Does the same as ``forward``, if that replays a CUDA graph.
        no_graph: Why its calls can't be captured in a CUDA graph; empty if they can.
    """

    forward: Forward
    parameters: Sequence[Tensor]
    plan: Callable[[], str] = str
    context: Context = nullcontext
    uncaptured: Forward | None = None
    no_graph: str = ""


class Peer(ABC):
    """Run an Elman RNN in one way."""

    name: str

    @abstractmethod
    def supports(self, case: Case) -> str | None:
        """Return why this peer can't run a case, or None if it can."""

    @abstractmethod
    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Return a runner for a case.

        Args:
            case: What to run.
            module: An ``nn.RNN`` with the weights, in the dtype and on the device of the case. The
                peer may keep it and change it.
            workload: The input, in the same dtype and on the same device.
        """
