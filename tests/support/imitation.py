"""Triton's interpreter as a GPU on which plans are tried, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tritonrnn import autotune
from tritonrnn.autotune.bench import Bench, neutral
from tritonrnn.kernels import launch

CPU = torch.device("cpu")
# As the interpreter ranks them for the small sizes of these tests.
PLANS = ["resident", "cooperative", "stepwise"]


class Imitation(Bench):
    """The CPU, where a call takes what ``us`` says of the path or plan that serves it.

    Attributes:
        us: microseconds by path or plan; 100 without an entry.
        spread: of the samples of each, as a share.
        timed: the paths and plans that were timed, in order.
        is_capturing: whether a stream is being captured.
        is_unusable: whether a fault has made the device unusable.
        is_captured_elsewhere: whether another thread captures a stream, in mode "global".
    """

    # The interpreter takes its time.
    steps, sequences = 2, 3

    def __init__(self, us: dict[str, float] | None = None) -> None:
        super().__init__(CPU)
        self.us = us or {}
        self.spread = 0.01
        self.timed: list[str] = []
        self.is_capturing = self.is_unusable = self.is_captured_elsewhere = False

    def _name(self) -> str:
        return "Imitation"

    def _driver(self) -> str:
        return "none"

    def may_try(self) -> bool:
        return not self.is_capturing

    def synchronize(self) -> None:
        if self.is_unusable:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.is_captured_elsewhere:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def elapsed_us(self, name: str, run: Callable[[], object], repeats: int) -> float:
        if name not in self.timed:
            # Once is enough to see that it runs.
            run()
        self.timed.append(name)
        return self.us.get(name, 100.0) * (1 + self.spread * (self.timed.count(name) % 4))

    @contextmanager
    def session(self) -> Iterator[None]:
        with neutral(self.device):
            yield


def imitate(folder: Path, patch: Any, us: dict[str, float] | None = None) -> Imitation:
    """Have trials made on the CPU, as in a process that has just started.

    Args:
        folder: of the records.
        patch: pytest's ``monkeypatch``.
        us: of :class:`Imitation`.
    """
    bench = Imitation(us)
    patch.setenv("TRITON_CACHE_DIR", str(folder))
    patch.setattr(autotune, "BENCHES", {"cpu": lambda device: bench})
    patch.setattr(autotune, "_tuners", {})
    patch.setattr(autotune, "_asked", "on")
    autotune.standing.clear()
    return bench


def on_launch(patch: Any, fault: Callable[[Any, dict[str, Any]], None]) -> list[str]:
    """Have each launch followed by ``fault(plan, arguments)``. Return the names of those launched.

    The list grows with each launch, before it is made.
    """
    launched: list[str] = []
    kernel_of = launch.kernel_of

    class Kernel:
        def __init__(self, plan: Any) -> None:
            self.plan, self.kernel = plan, kernel_of(plan)

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def run(**arguments: Any) -> None:
                launched.append(self.plan.name)
                self.kernel[grid](**arguments)
                fault(self.plan, arguments)

            return run

        def warmup(self, **arguments: Any) -> None:
            self.kernel.warmup(**arguments)

    patch.setattr(launch, "kernel_of", Kernel)
    return launched


def spoiled(name: str) -> Callable[[Any, dict[str, Any]], None]:
    """Return a fault for :func:`on_launch`: one wrong element in the results of a plan."""

    def fault(plan: Any, arguments: dict[str, Any]) -> None:
        if plan.name == name:
            arguments["s_ptr"][-1, -1] += 1

    return fault
