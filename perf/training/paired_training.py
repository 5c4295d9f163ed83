"""Train a model three ways, interleaved: with torch.nn.RNN, tritonrnn.RNN and a perturbed twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
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

# Consecutive training steps of one model, before the next one continues: short compared with the
# drift of a machine's speed, long enough that a synchronisation after them costs nothing.
CHUNK_STEPS = 16
WARM_UP_STEPS = 2

# Two runs that differ by rounding alone drift apart at the same rate; only their first differences
# are random. On the CPU, three other perturbations of nn.RNN and a recurrence written by hand
# stayed within 7 times the twin's drift, at learning rates of 2e-3 (no growth), 5e-3 and 1e-2 (up
# to 2e-1). With a wrong gradient, the drift is thousands of times the twin's within a few steps.
ALLOWED_DRIFTS = 10.0
# The difference of two losses before any training, in units of the last place.
ALLOWED_ULPS = 8.0

REFERENCE = "torch.nn.RNN"
CANDIDATE = "tritonrnn.RNN"
TWIN = "torch.nn.RNN, 1 ulp off"

MakeRNN = Callable[..., nn.RNNBase]
Batch = tuple[Any, Tensor]


@dataclass
class Trainee:
    """Train a model, and record its losses and times.

    Attributes:
        losses: Training loss of each step.
        chunk_seconds: Time of each chunk of training steps.
    """

    name: str
    model: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    clip_norm: float
    losses: list[float] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)

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
            loss = self.loss(self.model(input), target)
            loss.backward()
            if self.clip_norm < float("inf"):
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            losses.append(loss.detach())
        self.chunk_seconds.append(synchronized_time() - start)
        self.losses += torch.stack(losses).tolist()


def train(
    build: Callable[[MakeRNN], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterator[Batch],
    *,
    steps: int,
    learning_rate: float,
    clip_norm: float = float("inf"),
    seed: int,
    device: str,
) -> list[Trainee]:
    """Train every model on the same batches, chunk by chunk, each chunk in random order.

    Args:
        build: Returns a model around an RNN.
        loss: Returns the loss of what a model returns, given a target.
        batches: Yields an input and a target for each step, on the device.
        steps: The number of batches.
        learning_rate: Of Adam.
        clip_norm: Largest norm of all gradients.
        seed: Seed of the initial weights, and of the order.
        device: Where to train.

    Returns:
        The reference, the candidate, and the reference's perturbed twin.
    """
    trainees = []
    for name, rnn_class in ((REFERENCE, nn.RNN), (CANDIDATE, tritonrnn.RNN), (TWIN, nn.RNN)):
        torch.manual_seed(seed)
        model = build(rnn_class)
        if name == TWIN:
            perturb(model, rounding_unit(device))
        adam = torch.optim.Adam(model.to(device).parameters(), lr=learning_rate)
        trainees.append(Trainee(name, model, loss, adam, clip_norm))
    random = Random(seed)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("", total=steps)
        # A chunk is built before any model trains on it, so that building batches is not timed.
        while chunk := list(islice(batches, CHUNK_STEPS)):
            if not trainees[0].losses:
                # With copies, so that no start-up cost is timed.
                for one in copy.deepcopy(trainees):
                    one.train(chunk[:WARM_UP_STEPS])
            for one in random.sample(trainees, len(trainees)):
                one.train(chunk)
            shown = f"loss {trainees[0].losses[-1]:.3f}"
            progress.update(bar, advance=len(chunk), description=shown)
    return trainees


def rounding_unit(device: str) -> float:
    """Return the relative spacing of the values that ``nn.RNN`` multiplies in float32."""
    if device != "cpu" and torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
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


def losses_of(trainees: Sequence[Trainee]) -> pd.DataFrame:
    """Return the loss of each trainee at each step."""
    return pd.DataFrame({one.name: one.losses for one in trainees})


def first_departure(losses: pd.DataFrame) -> int | None:
    """Return the first step at which the candidate is further off than rounding explains, if any.

    At every step its loss may be off the reference's by ``ALLOWED_DRIFTS`` times the furthest that
    the reference's own twin has been so far, plus ``ALLOWED_ULPS`` units in the last place of it.
    """
    drift = losses.sub(losses[REFERENCE], axis=0).abs()
    ulp = np.spacing(losses[REFERENCE].abs().astype(np.float32)).astype(np.float64)
    # Negated, so that a NaN on either side is a departure.
    departs = ~(drift[CANDIDATE] <= ALLOWED_DRIFTS * drift[TWIN].cummax() + ALLOWED_ULPS * ulp)
    return int(departs.idxmax()) if departs.any() else None


def conclude(
    name: str,
    trainees: Sequence[Trainee],
    results: pd.DataFrame,
    formats: Sequence[str],
    *,
    facts: dict[str, Any],
    device: str,
    out: Path | None,
) -> bool:
    """Print a row for each trainee and whether the loss curves agree; add them to the tables.

    ``speedup_vs_nn``, the last column, is the median over the chunks, which other work on the
    machine for a while does not change.

    Args:
        name: Names the tables.
        trainees: Those of :func:`train`.
        results: A row for each, without its name and its speedup.
        formats: Those of all columns.
        facts: The columns that say what was run.
        device: Where it was run.
        out: Folder for the tables, if they are wanted.

    Returns:
        Whether the curves agree.
    """
    results.insert(0, "model", [one.name for one in trainees])
    seconds = np.array([one.chunk_seconds for one in trainees])
    results["speedup_vs_nn"] = np.median(seconds[0] / seconds, axis=1)
    losses = losses_of(trainees)
    drift = losses.sub(losses[REFERENCE], axis=0).abs().max(skipna=False)
    departure = first_departure(losses)
    verdict = "agree" if departure is None else f"DISAGREE from step {departure} on"
    print(results.to_markdown(index=False, floatfmt=formats))
    print(
        f"speedup_vs_nn: median over {seconds.shape[1]} chunks of up to {CHUNK_STEPS} steps; the "
        "models train in random order in each chunk.\n"
        f"The loss curves {verdict}: {CANDIDATE} is at most {drift[CANDIDATE]:.1e} from "
        f"{REFERENCE}, which is at most {drift[TWIN]:.1e} from its twin that starts one unit in "
        "the last place away."
    )
    if out is not None:
        run_id = environment.new_run_id()
        curves = losses.melt(var_name="model", value_name="loss", ignore_index=False)
        curves = curves.reset_index(names="step").assign(run_id=run_id)
        tables.append_rows(out, name, results.assign(run_id=run_id, **facts))
        tables.append_rows(out, f"{name}_curves", curves)
        tables.add_environment(out, run_id, environment.describe(device))
    return departure is None
