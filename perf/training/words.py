"""Run ``python -m perf words``: learn the language of words, with torch.nn.RNN and tritonrnn."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import tritonrnn
from perf.training.paired_training import Batch, MakeRNN, conclude, train

LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv", "tr", "ro")
SHORTEST, LONGEST = 3, 22
# The index of every letter outside the alphabet; only words that are held out have such letters.
UNKNOWN_LETTER = 0

EMBEDDING_SIZE = 32
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
HELD_OUT = 0.1


class Word(NamedTuple):
    """Hold a spelling, and the index of its language in :data:`LANGUAGES`."""

    spelling: str
    label: int


def load_words(top: int) -> list[Word]:
    """Read the word lists of the package ``wordfreq``; nothing is downloaded.

    Args:
        top: How far down each language's list, from the most frequent word on, to go.
    """
    import wordfreq

    # The small lists exist for every language; they reach down to one word in a million.
    return distinct_words(
        {code: wordfreq.top_n_list(code, top, wordlist="small") for code in LANGUAGES},
        {code: set(wordfreq.get_frequency_dict(code, wordlist="small")) for code in LANGUAGES},
    )


def distinct_words(
    ranked: Mapping[str, Sequence[str]], known: Mapping[str, set[str]]
) -> list[Word]:
    """Keep the words that belong to one language only and are written in Latin letters.

    Args:
        ranked: For each of :data:`LANGUAGES`, the words to choose from.
        known: For each of :data:`LANGUAGES`, every word it has. A word is dropped if another
            language has it too, however rare it is there.
    """
    languages_of = Counter(word for words in known.values() for word in words)
    return [
        Word(word, label)
        for label, language in enumerate(LANGUAGES)
        for word in ranked[language]
        if languages_of[word] == 1
        and SHORTEST <= len(word) <= LONGEST
        and all(unicodedata.name(letter, "").startswith("LATIN ") for letter in word)
    ]


def split(words: Sequence[Word], held_out: float, seed: int) -> tuple[list[Word], list[Word]]:
    """Shuffle words, and return those to train on and a share that is held out."""
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(len(words) * held_out)
    return [words[i] for i in order[cut:]], [words[i] for i in order[:cut]]


def alphabet_of(words: Sequence[Word]) -> dict[str, int]:
    """Return the index of every letter, from 1 on."""
    letters = sorted(set().union(*(word.spelling for word in words)))
    return {letter: index for index, letter in enumerate(letters, start=1)}


def encode(spelling: str, alphabet: Mapping[str, int]) -> Tensor:
    """Return the index of each letter."""
    return torch.tensor([alphabet.get(letter, UNKNOWN_LETTER) for letter in spelling])


def batches(
    words: Sequence[Word], alphabet: Mapping[str, int], device: str, generator: torch.Generator
) -> Iterator[Batch]:
    """Shuffle words, and yield packed letters and languages; the last batch may be smaller.

    The indices of letters are packed, not their embeddings: they are small, and the embedding then
    has no padding to look up. A batch is sorted here, so that no result needs unsorting.
    """
    for chosen in torch.randperm(len(words), generator=generator).split(BATCH_SIZE):
        batch = sorted((words[i] for i in chosen.tolist()), key=lambda word: -len(word.spelling))
        letters = pack_sequence([encode(word.spelling, alphabet) for word in batch])
        labels = torch.tensor([word.label for word in batch])
        # torch declares PackedSequence.to as a function of a tensor's self.
        yield letters.to(device), labels.to(device)  # type: ignore[arg-type]


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


@torch.no_grad()
def accuracy(model: WordClassifier, batches: Iterable[Batch]) -> float:
    """Return the share of words whose language the model gets right."""
    right = torch.cat([model(letters).argmax(1) == labels for letters, labels in batches])
    return right.double().mean().item()


def backend_of(model: WordClassifier, letters: PackedSequence) -> str:
    """Return the back end of a model's recurrence on this batch."""
    embedded = model.embed(letters)
    if isinstance(model.rnn, tritonrnn.RNN):
        return tritonrnn.explain(model.rnn, embedded).backend
    return "cuDNN" if torch.backends.cudnn.is_acceptable(embedded.data) else "ATen"


def run(
    *, epochs: int, hidden_size: int, device: str, out: Path | None, seed: int, top: int
) -> bool:
    """Train, print the results, and write them to ``out``: the options of the command.

    Returns:
        Whether the loss curves agree.
    """
    training, held_out = split(load_words(top), HELD_OUT, seed)
    alphabet = alphabet_of(training)
    print(
        f"{len(training) + len(held_out):,} words of {len(LANGUAGES)} languages, "
        f"{len(held_out):,} of them held out; {device}, {torch.get_num_threads()} threads"
    )
    generator = torch.Generator().manual_seed(seed)
    pack = partial(batches, alphabet=alphabet, device=device, generator=generator)
    steps_per_epoch = -(-len(training) // BATCH_SIZE)
    trainees = train(
        lambda rnn_class: WordClassifier(rnn_class, len(alphabet) + 1, hidden_size),
        nn.functional.cross_entropy,
        (batch for _ in range(epochs) for batch in pack(training)),
        steps=epochs * steps_per_epoch,
        learning_rate=LEARNING_RATE,
        seed=seed,
        device=device,
    )
    tests = list(pack(held_out))
    [(majority, _)] = Counter(word.label for word in training).most_common(1)

    results = pd.DataFrame(
        {
            "loss": mean(one.losses[-steps_per_epoch:]),
            "held_out_accuracy": accuracy(one.model, tests),
            "majority_accuracy": mean(word.label == majority for word in held_out),
            "words_per_s": epochs * len(training) / one.seconds,
            "seconds": one.seconds,
            "backend": backend_of(one.model, tests[0][0]),
        }
        for one in trainees
    )
    print("loss: mean over the last epoch.")
    return conclude(
        "words",
        trainees,
        results,
        ("", ".5f", ".3f", ".3f", ",.0f", ".1f", "", ".2f"),
        facts={"epochs": epochs, "hidden_size": hidden_size, "seed": seed, "top": top},
        device=device,
        out=out,
    )
