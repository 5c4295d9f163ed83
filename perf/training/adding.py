"""Run ``python -m perf adding``: learn to add two marked numbers that are far apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perf.report import plots
from perf.training import paired_training as paired

BATCH_SIZE = 128
# With the paper's own recipe (input weights of 1e-3, plain gradient descent at 1e-2), the loss was
# still 0.156 after 2,500 steps of 32 sequences (100 hidden units).
INPUT_WEIGHT_STD = 0.05
LEARNING_RATE = 1e-3
CLIP_NORM = 1.0
# Steps that the loss is averaged over, for the table and the plot.
WINDOW = 50
# The variance of the sum of two uniform numbers: the loss of a model that always answers 1.
BLIND_LOSS = 1 / 6


class Adder(nn.Module):
    """Add numbers with a relu RNN that starts as the identity, and a linear head on ``h_n``.

    Le, Jaitly & Hinton 2015, arXiv:1504.00941.
    """

    def __init__(self, rnn_class: paired.MakeRNN, hidden_size: int) -> None:
        super().__init__()
        self.rnn = rnn_class(2, hidden_size, nonlinearity="relu")
        self.head = nn.Linear(hidden_size, 1)
        nn.init.eye_(self.rnn.weight_hh_l0)  # type: ignore[arg-type]
        nn.init.normal_(self.rnn.weight_ih_l0, std=INPUT_WEIGHT_STD)  # type: ignore[arg-type]
        for bias in (self.rnn.bias_ih_l0, self.rnn.bias_hh_l0):
            nn.init.zeros_(bias)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Return the sums, ``(B,)``."""
        _, h_n = self.rnn(input)
        return self.head(h_n[0]).squeeze(1)


def make_batch(T: int, generator: torch.Generator) -> paired.Batch:
    """Draw numbers uniform in [0, 1); one is marked in each half of a sequence.

    Returns:
        Sequences of (number, mark), ``(T, B, 2)``, and the sums of marked numbers, ``(B,)``.
    """
    numbers = torch.rand(T, BATCH_SIZE, generator=generator)
    marks = torch.zeros(T, BATCH_SIZE)
    sequences = torch.arange(BATCH_SIZE)
    for start, end in ((0, T // 2), (T // 2, T)):
        marks[torch.randint(start, end, (BATCH_SIZE,), generator=generator), sequences] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def draw(trainees: Sequence[paired.Trainee], T: int) -> Figure:
    """Draw the losses, and how far two trainings drift from torch.nn.RNN's."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = paired.losses_of(trainees)
    reference, candidate, twin = losses
    drift = losses.sub(losses[reference], axis=0).abs().cummax()
    styles = {reference: ("tab:gray", 4), candidate: ("tab:blue", 1.2), twin: ("tab:gray", 1.2)}
    for ax, names, curves in (
        (left, (reference, candidate), losses.rolling(WINDOW, min_periods=1).mean()),
        # A logarithmic axis can't show 0.
        (right, (candidate, twin), drift.where(drift > 0)),
    ):
        for name in names:
            colour, width = styles[name]
            ax.plot(curves[name], label=name, color=colour, linewidth=width, alpha=0.7)
        ax.set(xlabel="training step", yscale="log")
    left.axhline(BLIND_LOSS, color="black", linestyle=":", linewidth=1, label="always answer 1")
    left.set_title(f"Adding problem, {T} steps", fontsize=10)
    left.set_ylabel(f"mean squared error, mean of {WINDOW} steps")
    right.set_title(f"Loss, compared with that of {reference}", fontsize=10)
    right.set_ylabel("largest difference so far")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=9, loc="best")
        ax.grid(alpha=0.3)
    return figure


def run(*, steps: int, T: int, hidden_size: int, device: str, out: Path | None, seed: int) -> bool:
    """Train, print the results, and write and draw them to ``out``: the options of the command.

    Returns:
        Whether the loss curves agree.
    """
    print(
        f"Sums of 2 of {T} numbers, {BATCH_SIZE} sequences a batch; {device}, "
        f"{torch.get_num_threads()} threads"
    )
    generator = torch.Generator().manual_seed(seed)
    batches = (make_batch(T, generator) for _ in range(steps))
    trainees = paired.train(
        lambda rnn_class: Adder(rnn_class, hidden_size),
        nn.functional.mse_loss,
        ((input.to(device), sums.to(device)) for input, sums in batches),
        steps=steps,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP_NORM,
        seed=seed,
        device=device,
    )
    results = pd.DataFrame(
        {
            "loss": mean(one.losses[-WINDOW:]),
            "blind_loss": BLIND_LOSS,
            "steps_per_s": steps / one.seconds,
            "seconds": one.seconds,
        }
        for one in trainees
    )
    print(f"loss: mean squared error over the last {WINDOW} steps. blind_loss: of answering 1.")
    agrees = paired.conclude(
        "adding",
        trainees,
        results,
        ("", ".5f", ".3f", ",.0f", ".1f", ".2f"),
        facts={"steps": steps, "T": T, "hidden_size": hidden_size, "seed": seed},
        device=device,
        out=out,
    )
    if out is not None:
        plots.save(draw(trainees, T), out / "adding.png")
    return agrees
