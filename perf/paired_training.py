"""One model trained three ways, in turns: with torch.nn.RNN, tritonrnn.RNN and a perturbed twin."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import tritonrnn
from perf.timing import synchronize

# Steps that one model takes before the next has its turn: short beside the drift of a machine's
# speed, long enough that waiting for a GPU after them costs nothing.
TURN_STEPS = 16
WARM_UP_STEPS = 2

REFERENCE = "torch.nn.RNN"
OURS = "tritonrnn.RNN"
TWIN = "torch.nn.RNN, 1 ulp off"

MakeRNN = Callable[..., nn.RNNBase]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe(Generic[Model]):
    """How a model is trained.

    Attributes:
        loss: Of a model on a batch.
        optimizer: Made of the parameters.
        clip_norm: What the norm of all gradients is clipped to.
    """

    loss: Callable[[Model, Any], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    clip_norm: float | None = None


@dataclass
class Trainee(Generic[Model]):
    """A model in training.

    Attributes:
        losses: Training loss of each step.
        turn_seconds: Time that each turn's training steps took.
    """

    name: str
    model: Model
    recipe: Recipe[Model]
    losses: list[float] = field(default_factory=list)
    turn_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self.recipe.optimizer(self.model.parameters())

    def warm_up(self, batches: Sequence[Any], device: torch.device) -> None:
        """Take a few steps with a copy, so that no start-up cost is timed."""
        Trainee(self.name, copy.deepcopy(self.model), self.recipe).take_turn(batches, device)

    def take_turn(self, batches: Sequence[Any], device: torch.device) -> None:
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
        self.turn_seconds.append(time.perf_counter() - start)
        self.losses += torch.stack(losses).tolist()


def rounding_unit(device: torch.device) -> float:
    """Return the relative spacing of the numbers that ``nn.RNN`` multiplies in float32."""
    if device.type == "cuda" and torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return 2.0**-10
    return 2.0**-23


@torch.no_grad()
def perturb(model: nn.Module, unit: float) -> None:
    """Move every parameter away from zero by one unit in its last place.

    Args:
        model: Changed in place.
        unit: Spacing of the numbers from 1 to 2.
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
    """Train every trainee on the same batches, taking turns in random order.

    Args:
        trainees: To be trained.
        portions: Batches, on the device. Each portion is built ahead of its turns, for all
            trainees: batches are no part of what is timed.
        steps: How many batches there are in all.
        seed: Of the order.
        device: Where to train.
        console: Shows how far it is.
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
            for share in _in_turns(batches):
                for trainee in random.sample(trainees, len(trainees)):
                    trainee.take_turn(share, device)
                    progress.update(bars[trainee.name], advance=len(share), loss=trainee.losses[-1])


def _in_turns(batches: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(batches), TURN_STEPS):
        yield batches[start : start + TURN_STEPS]


def speedup(reference: Trainee[Model], own: Trainee[Model]) -> float:
    """Return how much faster one trained than the reference.

    The median over the turns, so that it stands when something else takes the machine for a while.
    """
    turns = zip(reference.turn_seconds, own.turn_seconds)
    return float(pd.Series([theirs / its for theirs, its in turns]).median())


def curves_table(trainees: Sequence[Trainee[Model]]) -> pd.DataFrame:
    """Return the loss of every trainee at every step, one row each."""
    return pd.concat(
        [
            pd.DataFrame({"model": c.name, "step": range(len(c.losses)), "loss": c.losses})
            for c in trainees
        ],
        ignore_index=True,
    )
