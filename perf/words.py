"""``python -m perf words``: learn the language of words, with torch.nn.RNN and with tritonrnn."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import tritonrnn
from perf import environment, loss_curves, tables
from perf.timing import synchronize
from perf.word_lists import (
    LANGUAGES,
    Alphabet,
    Batch,
    EncodedWords,
    LabelledWords,
    load_words,
    normalize,
)

EMBEDDING_SIZE = 32
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
HELD_OUT = 0.1

# Steps that one model takes before the next has its turn: short beside the drift of a machine's
# speed, long enough that waiting for a GPU after them costs nothing.
TURN_STEPS = 16
WARM_UP_STEPS = 2

REFERENCE = "torch.nn.RNN"
OURS = "tritonrnn.RNN"
TWIN = "torch.nn.RNN, 1 ulp off"

MakeRNN = Callable[..., nn.RNNBase]


class WordClassifier(nn.Module):
    """Letters to languages: an embedding, a bidirectional RNN, a linear head on its final states.

    Args:
        rnn_class: ``torch.nn.RNN`` or what stands in for it.
        letters: Size of the alphabet.
        hidden_size: Of the RNN, in each direction.
    """

    def __init__(self, rnn_class: MakeRNN, letters: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, EMBEDDING_SIZE)
        self.rnn = rnn_class(EMBEDDING_SIZE, hidden_size, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, len(LANGUAGES))

    def embed(self, letters: PackedSequence) -> PackedSequence:
        """Return the embedding of every packed letter."""
        return letters._replace(data=self.embedding(letters.data))

    def forward(self, letters: PackedSequence) -> Tensor:
        """Return the languages' scores, ``(B, 14)``."""
        _, h_n = self.rnn(self.embed(letters))
        return self.head(torch.cat(tuple(h_n), dim=1))


@dataclass
class Contender:
    """A model in training.

    Attributes:
        losses: Training loss of each step.
        turn_seconds: Time that each turn's training steps took.
    """

    name: str
    model: WordClassifier
    losses: list[float] = field(default_factory=list)
    turn_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def warm_up(self, batches: Sequence[Batch], device: torch.device) -> None:
        """Take a few steps with a copy, so that no start-up cost is timed."""
        Contender(self.name, copy.deepcopy(self.model)).take_turn(batches, device)

    def take_turn(self, batches: Sequence[Batch], device: torch.device) -> None:
        """Train on the batches, one step each, and record losses and time."""
        losses = []
        synchronize(device)
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(batch.letters), batch.labels)
            loss.backward()
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


def make_contenders(
    letters: int, hidden_size: int, seed: int, device: torch.device
) -> list[Contender]:
    """Build the reference, ours and the reference's perturbed twin from one seed."""
    contenders = []
    for name, rnn_class in ((REFERENCE, nn.RNN), (OURS, tritonrnn.RNN), (TWIN, nn.RNN)):
        torch.manual_seed(seed)
        model = WordClassifier(rnn_class, letters, hidden_size)
        if name == TWIN:
            perturb(model, rounding_unit(device))
        contenders.append(Contender(name, model.to(device)))
    return contenders


def train(
    contenders: Sequence[Contender],
    words: EncodedWords,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    console: Console,
) -> None:
    """Train every contender on the same batches, taking turns in random order."""
    generator = torch.Generator().manual_seed(seed)
    random = Random(seed)
    steps = epochs * -(-len(words) // BATCH_SIZE)
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
            contender.name: progress.add_task(contender.name, total=steps, loss=float("nan"))
            for contender in contenders
        }
        for epoch in range(epochs):
            # Built ahead of the turns, for all contenders: batches are no part of what is timed.
            batches = [batch.to(device) for batch in words.shuffled(BATCH_SIZE, generator)]
            if epoch == 0:
                for contender in contenders:
                    contender.warm_up(batches[:WARM_UP_STEPS], device)
            for share in _in_turns(batches):
                for contender in random.sample(contenders, len(contenders)):
                    contender.take_turn(share, device)
                    progress.update(
                        bars[contender.name], advance=len(share), loss=contender.losses[-1]
                    )


def _in_turns(batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    for start in range(0, len(batches), TURN_STEPS):
        yield batches[start : start + TURN_STEPS]


@torch.no_grad()
def accuracy(model: nn.Module, words: EncodedWords, device: torch.device) -> float:
    """Return the share of words whose language the model tells."""
    right = 0
    for batch in words.batches(BATCH_SIZE):
        batch = batch.to(device)
        right += int((model(batch.letters).argmax(1) == batch.labels).sum())
    return right / len(words)


def majority_accuracy(training: LabelledWords, held_out: LabelledWords) -> float:
    """Return the accuracy of always answering the most frequent language of the training words."""
    [(label, _)] = Counter(training.labels).most_common(1)
    return held_out.labels.count(label) / len(held_out)


def backend_of(contender: Contender, letters: PackedSequence) -> str:
    """Return what computes a contender's recurrence on this batch."""
    embedded = contender.model.embed(letters)
    rnn = contender.model.rnn
    if isinstance(rnn, tritonrnn.RNN):
        return tritonrnn.explain(rnn, embedded).backend
    return "cuDNN" if torch.backends.cudnn.is_acceptable(embedded.data) else "ATen"


@torch.no_grad()
def classify(
    model: WordClassifier,
    alphabet: Alphabet,
    words: Sequence[str],
    training: LabelledWords,
    device: torch.device,
) -> pd.DataFrame:
    """Return the two likeliest languages of each word, and whether it was trained on."""
    spellings = [normalize(word) for word in words]
    # One by one: a batch comes back sorted by length.
    rows = []
    for word, spelling in zip(words, spellings):
        [batch] = EncodedWords([spelling], [0], alphabet).batches(1)
        likelihood = model(batch.to(device).letters).softmax(1).squeeze(0)
        [first, second] = likelihood.topk(2).indices.tolist()
        rows.append(
            {
                "word": word,
                "language": LANGUAGES[first],
                "probability": float(likelihood[first]),
                "or": LANGUAGES[second],
                "probability of that": float(likelihood[second]),
                "trained on": "yes" if spelling in training.words else "no",
            }
        )
    return pd.DataFrame(rows)


def results_table(
    contenders: Sequence[Contender],
    training: LabelledWords,
    held_out: LabelledWords,
    alphabet: Alphabet,
    *,
    epochs: int,
    device: torch.device,
) -> pd.DataFrame:
    """Return one row for each contender, the reference first.

    ``loss`` is its mean over the last epoch. ``speedup_vs_nn`` is the median over the turns, so
    that it stands when something else takes the machine for a while; ``seconds`` does not.
    """
    encoded = EncodedWords(held_out.words, held_out.labels, alphabet)
    letters = next(encoded.batches(BATCH_SIZE)).to(device).letters
    majority = majority_accuracy(training, held_out)
    rows = []
    for contender in contenders:
        seconds = sum(contender.turn_seconds)
        speedups = [
            reference / own
            for reference, own in zip(contenders[0].turn_seconds, contender.turn_seconds)
        ]
        last_epoch = contender.losses[-(len(contender.losses) // epochs) :]
        rows.append(
            {
                "model": contender.name,
                "loss": sum(last_epoch) / len(last_epoch),
                "held_out_accuracy": accuracy(contender.model, encoded, device),
                "majority_accuracy": majority,
                "words_per_s": epochs * len(training) / seconds,
                "seconds": seconds,
                "backend": backend_of(contender, letters),
                "speedup_vs_nn": statistics.median(speedups),
            }
        )
    return pd.DataFrame(rows)


def run(
    *,
    epochs: int,
    hidden_size: int,
    device: torch.device,
    out: Path | None,
    own_words: Sequence[str],
    seed: int,
    top: int,
) -> bool:
    """Train, print what came of it, write it to ``out``.

    Args:
        epochs: Passes over the training words.
        hidden_size: Hidden units of each direction.
        device: Where to train.
        out: Folder for the tables and the loss curves, if they are wanted.
        own_words: To be classified at the end.
        seed: Of the split, the first weights and the order of the batches.
        top: How far down each language's list to go.

    Returns:
        Whether the loss curves agree.
    """
    console = Console()
    training, held_out = load_words(top).split(HELD_OUT, seed)
    alphabet = Alphabet(training.words)
    console.print(
        f"{len(training) + len(held_out):,} words of {len(LANGUAGES)} languages, "
        f"{len(held_out):,} of them held out; {device}, {torch.get_num_threads()} threads"
    )
    contenders = make_contenders(len(alphabet), hidden_size, seed, device)
    train(
        contenders,
        EncodedWords(training.words, training.labels, alphabet),
        epochs=epochs,
        seed=seed,
        device=device,
        console=console,
    )
    results = results_table(contenders, training, held_out, alphabet, epochs=epochs, device=device)
    reference, ours, twin = contenders
    comparison = loss_curves.compare(reference.losses, twin.losses, ours.losses)

    formats = ("", ".5f", ".3f", ".3f", ",.0f", ".1f", "", ".2f")
    print(results.to_markdown(index=False, floatfmt=formats))
    print(
        f"loss: mean over the last epoch. speedup_vs_nn: median over {len(ours.turn_seconds)} "
        f"turns of up to {TURN_STEPS} steps, the models taking turns in random order."
    )
    print(comparison)
    if own_words:
        print(
            classify(ours.model, alphabet, own_words, training, device).to_markdown(
                index=False, floatfmt=".2f"
            )
        )
    if out is not None:
        run_id = environment.new_run_id()
        keys = {"epochs": epochs, "hidden_size": hidden_size, "seed": seed, "top": top}
        tables.append_rows(out, "words", results.assign(run_id=run_id, **keys))
        tables.append_rows(out, "words_curves", curves_table(contenders).assign(run_id=run_id))
        tables.add_environment(out, run_id, environment.describe(device))
    return comparison.agrees


def curves_table(contenders: Sequence[Contender]) -> pd.DataFrame:
    """Return the loss of every contender at every step, one row each."""
    return pd.concat(
        [
            pd.DataFrame({"model": c.name, "step": range(len(c.losses)), "loss": c.losses})
            for c in contenders
        ],
        ignore_index=True,
    )
