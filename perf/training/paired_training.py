"""Train a model three ways, interleaved: with torch.nn.RNN, tritonrnn.RNN and a perturbed twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor, nn

import tritonrnn
from perf.bench import environment
from perf.bench.timing import synchronized_time
from perf.report import tables
from perf.training import loss_curves

# Consecutive training steps of one model, before the next one continues: short compared with the
# drift of a machine's speed, long enough that a synchronisation after them costs nothing.
CHUNK_STEPS = 16
WARM_UP_STEPS = 2

REFERENCE = "torch.nn.RNN"
OURS = "tritonrnn.RNN"
TWIN = "torch.nn.RNN, 1 ulp off"

MakeRNN = Callable[..., nn.RNNBase]
Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Task:
    """Hold what is learned, and how.

    Attributes:
        name: Names the tables of results.
        build: Returns a model around an RNN.
        loss: Returns the loss of what a model returns, given a target.
        portions: Yields batches of an input and a target, on the device. A portion is built before
            any model trains on it, so that building batches is not timed.
        steps: The number of batches in all.
        learning_rate: Of Adam.
        clip_norm: Largest norm of all gradients.
    """

    name: str
    build: Callable[[MakeRNN], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    portions: Iterable[Sequence[Batch]]
    steps: int
    learning_rate: float
    clip_norm: float = float("inf")


@dataclass
class Trainee:
    """Train a model, and record its losses and times.

    Attributes:
        losses: Training loss of each step.
        chunk_seconds: Time of each chunk of training steps.
    """

    name: str
    model: Any
    task: Task
    losses: list[float] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.task.learning_rate)

    @property
    def seconds(self) -> float:
        """Return the time of all training steps."""
        return sum(self.chunk_seconds)

    def train(self, batches: Sequence[Batch]) -> None:
        """Train on the batches, one step each, and record losses and time."""
        losses = []
        start = synchronized_time()
        for input, target in batches:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(input), target)
            loss.backward()
            if self.task.clip_norm < float("inf"):
                nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip_norm)
            self.optimizer.step()
            losses.append(loss.detach())
        self.chunk_seconds.append(synchronized_time() - start)
        self.losses += torch.stack(losses).tolist()


def train(task: Task, *, seed: int, device: torch.device) -> list[Trainee]:
    """Train every model on the same batches, chunk by chunk, each chunk in random order.

    Args:
        task: What is learned.
        seed: Seed of the initial weights, and of the order.
        device: Where to train.

    Returns:
        The reference, ours, and the reference's perturbed twin.
    """
    trainees = []
    for name, rnn_class in ((REFERENCE, nn.RNN), (OURS, tritonrnn.RNN), (TWIN, nn.RNN)):
        torch.manual_seed(seed)
        model = task.build(rnn_class)
        if name == TWIN:
            perturb(model, rounding_unit(device))
        trainees.append(Trainee(name, model.to(device), task))
    random = Random(seed)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("", total=task.steps)
        for index, batches in enumerate(task.portions):
            if index == 0:
                # With copies, so that no start-up cost is timed.
                for one in trainees:
                    copied = Trainee(one.name, copy.deepcopy(one.model), task)
                    copied.train(batches[:WARM_UP_STEPS])
            for start in range(0, len(batches), CHUNK_STEPS):
                chunk = batches[start : start + CHUNK_STEPS]
                for one in random.sample(trainees, len(trainees)):
                    one.train(chunk)
                loss = f"loss {trainees[0].losses[-1]:.3f}"
                progress.update(bar, advance=len(chunk), description=loss)
    return trainees


def rounding_unit(device: torch.device) -> float:
    """Return the relative spacing of the values that ``nn.RNN`` multiplies in float32."""
    if device.type == "cuda" and torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return 2.0**-10
    return 2.0**-23


@torch.no_grad()
def perturb(model: nn.Module, unit: float) -> None:
    """Move every parameter away from zero by one unit in its last place.

    Args:
        model: Is changed in place.
        unit: Spacing of the values from 1 to 2.
    """
    for parameter in model.parameters():
        exponent = torch.frexp(parameter).exponent - 1
        parameter.add_(torch.ldexp(torch.full_like(parameter, unit), exponent) * parameter.sign())


def conclude(
    trainees: Sequence[Trainee],
    results: pd.DataFrame,
    formats: Sequence[str],
    *,
    facts: dict[str, Any],
    device: torch.device,
    out: Path | None,
) -> bool:
    """Print a row for each trainee and whether the loss curves agree; add them to the tables.

    ``speedup_vs_nn``, the last column, is the median over the chunks, which other work on the
    machine for a while does not change.

    Args:
        trainees: Those of :func:`train`.
        results: A row for each, without its name and its speedup.
        formats: Those of all columns.
        facts: The columns that say what was run.
        device: Where it was run.
        out: Folder for the tables, if they are wanted.

    Returns:
        Whether the curves agree.
    """
    reference, ours, twin = trainees
    results.insert(0, "model", [one.name for one in trainees])
    seconds = np.array([one.chunk_seconds for one in trainees])
    results["speedup_vs_nn"] = np.median(seconds[0] / seconds, axis=1)
    comparison = loss_curves.compare(reference.losses, twin.losses, ours.losses)
    print(results.to_markdown(index=False, floatfmt=formats))
    print(
        f"speedup_vs_nn: median over {len(ours.chunk_seconds)} chunks of up to {CHUNK_STEPS} "
        f"steps; the models train in random order in each chunk.\n{comparison}"
    )
    if out is not None:
        run_id, name = environment.new_run_id(), reference.task.name
        curves = pd.concat(
            pd.DataFrame({"model": one.name, "step": range(len(one.losses)), "loss": one.losses})
            for one in trainees
        )
        tables.append_rows(out, name, results.assign(run_id=run_id, **facts))
        tables.append_rows(out, f"{name}_curves", curves.assign(run_id=run_id))
        tables.add_environment(out, run_id, environment.describe(device))
    return comparison.agrees
