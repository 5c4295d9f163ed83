"""Load the words of ``python -m perf words``: spellings, languages, and packed batches of them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv", "tr", "ro")
SHORTEST, LONGEST = 3, 22

# So many words from the top of every list leave about 87,000 words over all languages.
TOP = 9_200

# The index of every letter outside the alphabet; only a user's own words have such letters.
UNKNOWN_LETTER = 0


class Word(NamedTuple):
    """Hold a spelling, and the index of its language in :data:`LANGUAGES`."""

    spelling: str
    label: int


class Batch(NamedTuple):
    """Hold packed letters, longest word first, and the language of each word."""

    letters: PackedSequence
    labels: Tensor


def load_words(top: int = TOP) -> list[Word]:
    """Read the word lists of the package ``wordfreq``; nothing is downloaded.

    Args:
        top: How far down each language's list, from the most frequent word on, to go.

    Raises:
        ModuleNotFoundError: ``wordfreq`` is not installed.
    """
    try:
        import wordfreq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the words come from the package wordfreq: pip install -e '.[perf]'"
        ) from error

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
        if languages_of[word] == 1 and _is_latin(word) and SHORTEST <= len(word) <= LONGEST
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


def batches(
    words: Sequence[Word],
    alphabet: Mapping[str, int],
    size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """Pack words, ``size`` at a time; the last batch may be smaller.

    The indices of letters are packed, not their embeddings: they are small, and the embedding then
    has no padding to look up. A batch is sorted here, so that no result needs unsorting.

    Args:
        words: What to pack.
        alphabet: Maps letters to indices.
        size: Words in a batch.
        device: Where the batches are to be.
        generator: Shuffles the words, if they are to be.
    """
    order = torch.arange(len(words))
    if generator is not None:
        order = torch.randperm(len(words), generator=generator)
    for chosen in order.split(size):
        batch = sorted((words[i] for i in chosen.tolist()), key=lambda word: -len(word.spelling))
        letters = pack_sequence([encode(word.spelling, alphabet) for word in batch])
        labels = torch.tensor([word.label for word in batch])
        # torch declares PackedSequence.to as a function of a tensor's self.
        yield Batch(letters.to(device), labels.to(device))  # type: ignore[arg-type]


def encode(spelling: str, alphabet: Mapping[str, int]) -> Tensor:
    """Return the index of each letter."""
    return torch.tensor([alphabet.get(letter, UNKNOWN_LETTER) for letter in spelling])


def normalize(word: str) -> str:
    """Return a word as the lists spell it: composed letters, lower case, ``ss`` for ``ß``."""
    return unicodedata.normalize("NFC", word.casefold())


def _is_latin(word: str) -> bool:
    return all(unicodedata.name(letter, "").startswith("LATIN ") for letter in word)
