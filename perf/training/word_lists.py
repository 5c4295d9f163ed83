"""Load the words of ``python -m perf words``: spellings, languages, and packed batches of them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv", "tr", "ro")
SHORTEST, LONGEST = 3, 22

# So many words from the top of every list leave about 87,000 words over all languages.
TOP = 9_200

# The index of every letter outside the alphabet; only a user's own words have such letters.
UNKNOWN_LETTER = 0


@dataclass(frozen=True)
class LabelledWords:
    """Hold words, each with the index of its language in :data:`LANGUAGES`."""

    words: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.words)

    def split(self, held_out: float, seed: int) -> tuple[LabelledWords, LabelledWords]:
        """Shuffle the words, and hold a share of them out.

        Args:
            held_out: The share of the words to hold out, between 0 and 1.
            seed: Seed of the split.

        Returns:
            The words to train on and the words held out.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        cut = round(len(self) * held_out)
        return self._take(order[cut:]), self._take(order[:cut])

    def _take(self, indices: Sequence[int]) -> LabelledWords:
        return LabelledWords(
            tuple(self.words[i] for i in indices), tuple(self.labels[i] for i in indices)
        )


@dataclass(frozen=True)
class Batch:
    """Hold packed letters, longest word first, and the language of each word."""

    letters: PackedSequence
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        # torch declares PackedSequence.to as a function of a tensor's self.
        return Batch(self.letters.to(device), self.labels.to(device))  # type: ignore[arg-type]


class Alphabet:
    """Map letters to indices.

    Args:
        words: The words whose letters get an index of their own, from 1 on.
    """

    def __init__(self, words: Sequence[str]) -> None:
        letters = sorted(set().union(*words))
        self._indices = {letter: index for index, letter in enumerate(letters, start=1)}

    def __len__(self) -> int:
        return len(self._indices) + 1

    def indices(self, word: str) -> list[int]:
        """Return the index of each letter of ``word``."""
        return [self._indices.get(letter, UNKNOWN_LETTER) for letter in word]


class EncodedWords:
    """Hold words as one matrix of letter indices, so that a batch of them is cheap to build.

    Args:
        words: At least one word.
        labels: The language of each word.
        alphabet: Maps letters to indices.
    """

    def __init__(self, words: Sequence[str], labels: Sequence[int], alphabet: Alphabet) -> None:
        self.labels = torch.tensor(labels)
        self._lengths = torch.tensor([len(word) for word in words])
        longest = int(self._lengths.max())
        # The padding after a word is never read: packing drops it.
        self._letters = torch.tensor(
            [alphabet.indices(word.ljust(longest)) for word in words], dtype=torch.int64
        )

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """Pack the words, ``size`` at a time.

        The indices of letters are packed, not their embeddings: they are small, and the embedding
        then has no padding to look up. A batch is sorted here, so that no result needs unsorting.

        Args:
            size: Words in a batch; the last one may be smaller.
            order: The words' indices in the order of use; if None, the order of the words.
        """
        if order is None:
            order = torch.arange(len(self))
        for chosen in order.split(size):
            lengths, by_length = self._lengths[chosen].sort(descending=True, stable=True)
            chosen = chosen[by_length]
            letters = self._letters[chosen, : int(lengths[0])]
            yield Batch(
                pack_padded_sequence(letters, lengths, batch_first=True), self.labels[chosen]
            )

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Pack the words as :meth:`batches` does, in random order."""
        return self.batches(size, torch.randperm(len(self), generator=generator))


def distinct_words(
    ranked: Mapping[str, Sequence[str]], known: Mapping[str, set[str]]
) -> LabelledWords:
    """Keep the words that belong to one language only and are written in Latin letters.

    Args:
        ranked: For each of :data:`LANGUAGES`, the words to choose from.
        known: For each of :data:`LANGUAGES`, every word it has. A word is dropped if another
            language has it too, however rare it is there.
    """
    languages_of = Counter(word for words in known.values() for word in words)
    words, labels = [], []
    for label, language in enumerate(LANGUAGES):
        for word in ranked[language]:
            if languages_of[word] == 1 and _is_latin(word) and SHORTEST <= len(word) <= LONGEST:
                words.append(word)
                labels.append(label)
    return LabelledWords(tuple(words), tuple(labels))


def load_words(top: int = TOP) -> LabelledWords:
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


def normalize(word: str) -> str:
    """Return a word as the lists spell it: composed letters, lower case, ``ss`` for ``ß``."""
    return unicodedata.normalize("NFC", word.casefold())


def _is_latin(word: str) -> bool:
    return all(unicodedata.name(letter, "").startswith("LATIN ") for letter in word)
