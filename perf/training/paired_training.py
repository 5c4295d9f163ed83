"""Train a model three ways, interleaved: with torch.nn.RNN, tritonrnn.RNN and a perturbed twin."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import tritonrnn
from perf.bench.timing import synchronize

# Consecutive training steps of one model, before the next one continues: short compared with the
# drift of a machine's speed, long enough that a synchronisation after them costs nothing.
CHUNK_STEPS = 16
WARM_UP_STEPS = 2

REFERENCE = "torch.nn.RNN"
OURS = "tritonrnn.RNN"
TWIN = "torch.nn.RNN, 1 ulp off"

MakeRNN = Callable[..., nn.RNNBase]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe(Generic[Model]):
    """Hold how a model is trained.

    Attributes:
        loss: Returns the loss of a model on a batch.
        optimizer: Returns an optimizer of the parameters.
        clip_norm: Largest norm of all gradients, if they are clipped.
    """

    loss: Callable[[Model, Any], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    clip_norm: float | None = None


@dataclass
class Trainee(Generic[Model]):
    """Train a model, and record its losses and times.

    Attributes:
        losses: Training loss of each step.
        chunk_seconds: Time of each chunk of training steps.
    """

    name: str
    model: Model
    recipe: Recipe[Model]
    losses: list[float] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self.recipe.optimizer(self.model.parameters())

    def warm_up(self, batches: Sequence[Any], device: torch.device) -> None:
        """Take a few steps with a copy, so that no start-up cost is timed."""
        Trainee(self.name, copy.deepcopy(self.model), self.recipe).train(batches, device)

    def train(self, batches: Sequence[Any], device: torch.device) -> None:
        """Train on the batches, one step each, and record losses and time."""
        losses = []
        synchronize(device)
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            loss = self.recipe.loss(self.model, batch)
            loss.backward()
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
            losses.append(loss.detach())
        synchronize(device)
        self.chunk_seconds.append(time.perf_counter() - start)
        self.losses += torch.stack(losses).tolist()


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


def make_trainees(
    build: Callable[[MakeRNN], Model], recipe: Recipe[Model], seed: int, device: torch.device
) -> list[Trainee[Model]]:
    """Build the reference, ours and the reference's perturbed twin from one seed."""
    trainees = []
    for name, rnn_class in ((REFERENCE, nn.RNN), (OURS, tritonrnn.RNN), (TWIN, nn.RNN)):
        torch.manual_seed(seed)
        model = build(rnn_class)
        if name == TWIN:
            perturb(model, rounding_unit(device))
        trainees.append(Trainee(name, model.to(device), recipe))
    return trainees


def train(
    trainees: Sequence[Trainee[Model]],
    portions: Iterable[Sequence[Any]],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    console: Console,
) -> None:
    """Train every model on the same batches, chunk by chunk, each chunk in random order.

    Args:
        trainees: The models to train.
        portions: Batches, on the device. A portion is built before any model trains on it, so that
            building batches is not timed.
        steps: The number of batches in all.
        seed: Seed of the order.
        device: Where to train.
        console: Shows the progress.
    """
    random = Random(seed)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        console=console,
    ) as progress:
        bars = {
            trainee.name: progress.add_task(trainee.name, total=steps, loss=float("nan"))
            for trainee in trainees
        }
        for index, batches in enumerate(portions):
            if index == 0:
                for trainee in trainees:
                    trainee.warm_up(batches[:WARM_UP_STEPS], device)
            for start in range(0, len(batches), CHUNK_STEPS):
                chunk = batches[start : start + CHUNK_STEPS]
                for trainee in random.sample(trainees, len(trainees)):
                    trainee.train(chunk, device)
                    progress.update(bars[trainee.name], advance=len(chunk), loss=trainee.losses[-1])


def speedup(reference: Trainee[Model], own: Trainee[Model]) -> float:
    """Return how much faster one model trained than the reference.

    It is the median over the chunks, which other work on the machine for a while does not change.
    """
    chunks = zip(reference.chunk_seconds, own.chunk_seconds)
    return float(pd.Series([theirs / its for theirs, its in chunks]).median())


def curves_table(trainees: Sequence[Trainee[Model]]) -> pd.DataFrame:
    """Return the loss of every trainee at every step, one row each."""
    return pd.concat(
        [
            pd.DataFrame({"model": c.name, "step": range(len(c.losses)), "loss": c.losses})
            for c in trainees
        ],
        ignore_index=True,
    )
