"""Run ``python -m perf words``: learn the language of words, with torch.nn.RNN and tritonrnn."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import tritonrnn
from perf.bench import environment
from perf.report import tables
from perf.training import loss_curves
from perf.training.paired_training import (
    CHUNK_STEPS,
    MakeRNN,
    Recipe,
    Trainee,
    curves_table,
    make_trainees,
    speedup,
    train,
)
from perf.training.word_lists import (
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


class WordClassifier(nn.Module):
    """Map letters to languages: an embedding, a bidirectional RNN, a linear head on its ``h_n``.

    Args:
        rnn_class: ``torch.nn.RNN``, or a class with its interface.
        letters: Size of the alphabet.
        hidden_size: Hidden units of the RNN in each direction.
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


def loss_of(model: WordClassifier, batch: Batch) -> Tensor:
    """Return the cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(batch.letters), batch.labels)


RECIPE = Recipe(loss_of, functools.partial(torch.optim.Adam, lr=LEARNING_RATE))


@torch.no_grad()
def accuracy(model: nn.Module, words: EncodedWords, device: torch.device) -> float:
    """Return the share of words whose language the model gets right."""
    right = 0
    for batch in words.batches(BATCH_SIZE):
        batch = batch.to(device)
        right += int((model(batch.letters).argmax(1) == batch.labels).sum())
    return right / len(words)


def majority_accuracy(training: LabelledWords, held_out: LabelledWords) -> float:
    """Return the accuracy of always answering the most frequent language of the training words."""
    [(label, _)] = Counter(training.labels).most_common(1)
    return held_out.labels.count(label) / len(held_out)


def backend_of(trainee: Trainee[WordClassifier], letters: PackedSequence) -> str:
    """Return the back end of a model's recurrence on this batch."""
    embedded = trainee.model.embed(letters)
    rnn = trainee.model.rnn
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
    # One by one, because a batch is sorted by length.
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
    trainees: Sequence[Trainee[WordClassifier]],
    training: LabelledWords,
    held_out: LabelledWords,
    alphabet: Alphabet,
    *,
    epochs: int,
    device: torch.device,
) -> pd.DataFrame:
    """Return one row for each trainee, the reference first.

    ``loss`` is its mean over the last epoch. Other work on the machine for a while changes
    ``seconds``, but not ``speedup_vs_nn``.
    """
    encoded = EncodedWords(held_out.words, held_out.labels, alphabet)
    letters = next(encoded.batches(BATCH_SIZE)).to(device).letters
    majority = majority_accuracy(training, held_out)
    rows = []
    for trainee in trainees:
        seconds = sum(trainee.chunk_seconds)
        last_epoch = trainee.losses[-(len(trainee.losses) // epochs) :]
        rows.append(
            {
                "model": trainee.name,
                "loss": sum(last_epoch) / len(last_epoch),
                "held_out_accuracy": accuracy(trainee.model, encoded, device),
                "majority_accuracy": majority,
                "words_per_s": epochs * len(training) / seconds,
                "seconds": seconds,
                "backend": backend_of(trainee, letters),
                "speedup_vs_nn": speedup(trainees[0], trainee),
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
    """Train, print the results, and write them to ``out``.

    Args:
        epochs: Passes over the training words.
        hidden_size: Hidden units of each direction.
        device: Where to train.
        out: Folder for the tables and the loss curves, if they are wanted.
        own_words: Words to classify at the end.
        seed: Seed of the split, the initial weights and the order of the batches.
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
    trainees = make_trainees(
        lambda rnn_class: WordClassifier(rnn_class, len(alphabet), hidden_size),
        RECIPE,
        seed,
        device,
    )
    encoded = EncodedWords(training.words, training.labels, alphabet)
    generator = torch.Generator().manual_seed(seed)
    train(
        trainees,
        (
            [batch.to(device) for batch in encoded.shuffled(BATCH_SIZE, generator)]
            for _ in range(epochs)
        ),
        steps=epochs * -(-len(encoded) // BATCH_SIZE),
        seed=seed,
        device=device,
        console=console,
    )
    results = results_table(trainees, training, held_out, alphabet, epochs=epochs, device=device)
    reference, ours, twin = trainees
    comparison = loss_curves.compare(reference.losses, twin.losses, ours.losses)

    formats = ("", ".5f", ".3f", ".3f", ",.0f", ".1f", "", ".2f")
    print(results.to_markdown(index=False, floatfmt=formats))
    print(
        f"loss: mean over the last epoch. speedup_vs_nn: median over {len(ours.chunk_seconds)} "
        f"chunks of up to {CHUNK_STEPS} steps; the models train in random order in each chunk."
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
        tables.append_rows(out, "words_curves", curves_table(trainees).assign(run_id=run_id))
        tables.add_environment(out, run_id, environment.describe(device))
    return comparison.agrees
