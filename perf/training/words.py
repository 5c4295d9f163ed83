"""Run ``python -m perf words``: learn the language of words, with torch.nn.RNN and tritonrnn."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import tritonrnn
from perf.training.paired_training import MakeRNN, Task, Trainee, conclude, train
from perf.training.word_lists import (
    LANGUAGES,
    Batch,
    Word,
    alphabet_of,
    batches,
    load_words,
    normalize,
    split,
)

EMBEDDING_SIZE = 32
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
HELD_OUT = 0.1


class WordClassifier(nn.Module):
    """Map letters to languages: an embedding, a bidirectional RNN, a linear head on its ``h_n``.

    Args:
        rnn_class: ``torch.nn.RNN``, or a class with its interface.
        letters: Size of the alphabet, and one for letters outside it.
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


@torch.no_grad()
def accuracy(model: WordClassifier, held_out: Sequence[Batch]) -> float:
    """Return the share of words whose language the model gets right."""
    right = torch.cat([model(batch.letters).argmax(1) == batch.labels for batch in held_out])
    return right.double().mean().item()


def majority_accuracy(training: Sequence[Word], held_out: Sequence[Word]) -> float:
    """Return the accuracy of always answering the most frequent language of the training words."""
    [(label, _)] = Counter(word.label for word in training).most_common(1)
    return sum(word.label == label for word in held_out) / len(held_out)


def backend_of(model: WordClassifier, letters: PackedSequence) -> str:
    """Return the back end of a model's recurrence on this batch."""
    embedded = model.embed(letters)
    if isinstance(model.rnn, tritonrnn.RNN):
        return tritonrnn.explain(model.rnn, embedded).backend
    return "cuDNN" if torch.backends.cudnn.is_acceptable(embedded.data) else "ATen"


@torch.no_grad()
def classify(
    model: WordClassifier,
    alphabet: Mapping[str, int],
    words: Sequence[str],
    training: Sequence[Word],
    device: torch.device,
) -> pd.DataFrame:
    """Return the two likeliest languages of each word, and whether it was trained on."""
    known = {word.spelling for word in training}
    spelt = [Word(normalize(word), 0) for word in words]
    rows = []
    # One by one, because a batch is sorted by length.
    for word, (spelling, _), batch in zip(words, spelt, batches(spelt, alphabet, 1, device)):
        likelihood, language = model(batch.letters).softmax(1).squeeze(0).topk(2)
        rows.append(
            {
                "word": word,
                "language": LANGUAGES[language[0]],
                "probability": float(likelihood[0]),
                "or": LANGUAGES[language[1]],
                "probability of that": float(likelihood[1]),
                "trained on": "yes" if spelling in known else "no",
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
    training, held_out = split(load_words(top), HELD_OUT, seed)
    alphabet = alphabet_of(training)
    print(
        f"{len(training) + len(held_out):,} words of {len(LANGUAGES)} languages, "
        f"{len(held_out):,} of them held out; {device}, {torch.get_num_threads()} threads"
    )
    pack = functools.partial(batches, alphabet=alphabet, size=BATCH_SIZE, device=device)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(training) // BATCH_SIZE)
    task = Task(
        "words",
        lambda rnn_class: WordClassifier(rnn_class, len(alphabet) + 1, hidden_size),
        loss_of,
        (list(pack(training, generator=generator)) for _ in range(epochs)),
        epochs * steps_per_epoch,
        LEARNING_RATE,
    )
    trainees = train(task, seed=seed, device=device)
    tests = list(pack(held_out))

    def columns(trainee: Trainee[WordClassifier]) -> dict[str, object]:
        last_epoch = trainee.losses[-steps_per_epoch:]
        return {
            "loss": sum(last_epoch) / len(last_epoch),
            "held_out_accuracy": accuracy(trainee.model, tests),
            "majority_accuracy": majority_accuracy(training, held_out),
            "words_per_s": epochs * len(training) / trainee.seconds,
            "seconds": trainee.seconds,
            "backend": backend_of(trainee.model, tests[0].letters),
        }

    print("loss: mean over the last epoch.")
    agrees = conclude(
        trainees,
        columns,
        ("", ".5f", ".3f", ".3f", ",.0f", ".1f", "", ".2f"),
        facts={"epochs": epochs, "hidden_size": hidden_size, "seed": seed, "top": top},
        device=device,
        out=out,
    )
    if own_words:
        table = classify(trainees[1].model, alphabet, own_words, training, device)
        print(table.to_markdown(index=False, floatfmt=".2f"))
    return agrees
