"""``python -m perf words``: its data, its arithmetic and a tiny run; and tables that grow."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence
from typer.testing import CliRunner

import tritonrnn
from perf.__main__ import app
from perf.report import tables
from perf.training import paired_training, words

wordfreq = pytest.importorskip("wordfreq")
pytestmark = pytest.mark.usefixtures("torch_back_end")

TOP = 400


class SlightlyWrong(tritonrnn.RNN):
    """Return an ``h_n`` that is off by a ten-thousandth, and a right output."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, 1.0001 * h_n


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def few_words() -> list[words.Word]:
    return words.load_words(TOP)


def test_words_are_known_to_one_language_only(few_words):
    known = {code: wordfreq.get_frequency_dict(code, wordlist="small") for code in words.LANGUAGES}
    for word, label in few_words:
        assert [code for code in known if word in known[code]] == [words.LANGUAGES[label]]


def test_words_cover_all_languages_within_the_lengths(few_words):
    assert {word.label for word in few_words} == set(range(14))
    assert len(set(few_words)) == len(few_words)
    assert all(3 <= len(word.spelling) <= 22 for word in few_words)


def test_distinct_words_drops_what_two_languages_share_and_what_is_not_latin():
    nothing: dict[str, list[str]] = {code: [] for code in words.LANGUAGES}
    ranked = nothing | {"de": ["haus", "taxi", "ab", "слово", "ha1s"], "fr": ["maison", "taxi"]}
    known = {code: set(ranked[code]) for code in ranked} | {"en": {"maison"}}
    assert words.distinct_words(ranked, known) == [("haus", 1)]


def test_split_is_disjoint_complete_and_repeatable(few_words):
    training, held_out = words.split(few_words, 0.1, seed=3)
    assert len(held_out) == round(len(few_words) / 10)
    assert not set(training) & set(held_out)
    assert set(training + held_out) == set(few_words)
    assert words.split(few_words, 0.1, seed=3) == (training, held_out)
    assert words.split(few_words, 0.1, seed=4) != (training, held_out)


def test_batches_hold_every_word_once_with_its_letters_and_label(few_words):
    alphabet = words.alphabet_of(few_words)
    shuffled = words.batches(few_words, alphabet, "cpu", torch.Generator().manual_seed(0))
    seen = []
    for packed, labels in shuffled:
        letters, lengths = pad_packed_sequence(packed, batch_first=True)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        for row, length, label in zip(letters, lengths, labels):
            seen.append((row[:length].tolist(), int(label)))
    expected = [(words.encode(spelling, alphabet).tolist(), label) for spelling, label in few_words]
    assert sorted(seen) == sorted(expected)


def test_letters_outside_the_alphabet_share_an_index():
    alphabet = words.alphabet_of([words.Word("ba", 0), words.Word("ca", 0)])
    assert words.encode("abcd", alphabet).tolist() == [1, 2, 3, words.UNKNOWN_LETTER]


def test_perturb_moves_by_one_unit_in_the_last_place():
    model = nn.Linear(30, 20)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    paired_training.perturb(model, paired_training.rounding_unit("cpu"))
    for old, new in zip(before, model.parameters()):
        assert torch.equal(torch.nextafter(old, 2 * old), new)


def drifting(scale: float, *, steps: int = 400) -> np.ndarray:
    """Return losses that fall from 2.6, plus a rounding error that grows tenfold every 80 steps."""
    step = np.arange(steps)
    return 2.6 * np.exp(-step / 300) + scale * 10 ** (step / 80) * np.sin(step)


def curves(candidate: np.ndarray) -> pd.DataFrame:
    names = (paired_training.REFERENCE, paired_training.TWIN, paired_training.CANDIDATE)
    return pd.DataFrame(dict(zip(names, (drifting(0), drifting(3e-7), candidate))))


@pytest.mark.parametrize("scale", [0, 3e-7, -1e-6, 2e-6])
def test_curves_agree_when_rounding_explains_the_drift(scale):
    assert paired_training.first_departure(curves(drifting(scale))) is None


@pytest.mark.parametrize("fault", [1e-4, math.nan, math.inf])
def test_curves_disagree_from_the_faulty_step_on(fault):
    candidate = drifting(3e-7)
    candidate[20:] += fault
    assert paired_training.first_departure(curves(candidate)) == 20


def words_arguments(*more: str) -> tuple[str, ...]:
    return ("words", "--epochs", "1", "--hidden", "8", "--top", str(TOP), *more)


def test_words_command_trains_compares_and_writes(tmp_path):
    result = invoke(*words_arguments("--out", str(tmp_path)))
    assert result.exit_code == 0, result.output
    assert "The loss curves agree" in result.output
    rows = pd.read_parquet(tmp_path / "words.parquet")
    names = [paired_training.REFERENCE, paired_training.CANDIDATE, paired_training.TWIN]
    assert list(rows["model"]) == names
    assert list(rows["backend"]) == ["ATen", "torch", "ATen"]
    assert rows["held_out_accuracy"].between(0, 1).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "words.csv"), rows, check_dtype=False)
    curves = pd.read_parquet(tmp_path / "words_curves.parquet")
    assert np.isfinite(curves["loss"]).all()
    assert set(json.loads((tmp_path / "env.json").read_text())) == set(rows["run_id"])


def test_words_command_fails_when_the_curves_disagree(monkeypatch):
    monkeypatch.setattr(tritonrnn, "RNN", SlightlyWrong)
    result = invoke(*words_arguments())
    assert result.exit_code == 1
    assert "DISAGREE from step 0 on" in result.output


def test_appended_rows_keep_the_old_ones(tmp_path: Path):
    tables.append_rows(tmp_path, "t", pd.DataFrame({"run_id": ["a"], "x": [1]}))
    tables.append_rows(tmp_path, "t", pd.DataFrame({"run_id": ["b"], "y": [2.5]}))
    expected = pd.DataFrame({"run_id": ["a", "b"], "x": [1, None], "y": [None, 2.5]})
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), expected)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "t.csv"}
