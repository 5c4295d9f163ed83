"""What a peer is: a name, what it can't do, and how it runs a case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from perf.cases import Case, Workload

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Runner:
    """A peer made ready for one case.

    Attributes:
        forward: Takes the tokens, returns the output, or its rows, and ``h_n``.
        parameters: In the order of ``nn.RNN``; they get gradients.
        plan: How it runs the case, in its own words.
        context: Switches that calls are made under, forward and backward. Entered anew for each
            sample, not for each call: entering takes time.
        unrecorded: Does the same where ``forward`` replays memory that was taken before.
    """

    forward: Forward
    parameters: list[Tensor]
    plan: str = ""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    unrecorded: Forward | None = None


class Peer(ABC):
    """A way to run an Elman RNN.

    Attributes:
        compiles: Whether it has kernels that are compiled when first used, and then kept on disk.
    """

    name: ClassVar[str]
    compiles: ClassVar[bool] = False

    @abstractmethod
    def supports(self, case: Case) -> str | None:
        """Return why this peer can't run a case, or None if it can."""

    @abstractmethod
    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Make ready for a case.

        Args:
            case: What to run.
            module: An ``nn.RNN`` with the weights, of the dtype and on the device of the case. It
                is the peer's to keep.
            workload: The input, likewise.
        """


def jagged(case: Case) -> str | None:
    """Return why most peers decline a jagged case."""
    return "it takes no nested tensors" if case.layout == "jagged" else None
