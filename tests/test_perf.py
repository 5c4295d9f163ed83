"""The measurements themselves: their data, their arithmetic, and tiny runs of each command."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wordfreq
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence
from typer.testing import CliRunner

import tritonrnn
from perf import cpu, loss_curves, tables, word_lists, words
from perf.__main__ import app
from perf.cases import Case, Workload
from perf.timing import Job, time_in_rounds

pytestmark = pytest.mark.usefixtures("torch_back_end")

TOP = 400
TINY = Case(T=5, B=3, I=4, H=6, layers=1, directions=1)


class SlightlyWrong(tritonrnn.RNN):
    """Off by a ten-thousandth, and nowhere but in ``h_n``."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, 1.0001 * h_n


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


# Words


@pytest.fixture(scope="module")
def few_words() -> word_lists.LabelledWords:
    return word_lists.load_words(TOP)


def test_words_are_known_to_one_language_only(few_words):
    known = {
        code: wordfreq.get_frequency_dict(code, wordlist="small") for code in word_lists.LANGUAGES
    }
    for word, label in zip(few_words.words, few_words.labels):
        assert [code for code in known if word in known[code]] == [word_lists.LANGUAGES[label]]


def test_words_cover_all_languages_within_the_lengths(few_words):
    assert set(few_words.labels) == set(range(14))
    assert len(set(few_words.words)) == len(few_words)
    assert all(3 <= len(word) <= 22 for word in few_words.words)


def test_distinct_words_drops_what_two_languages_share_and_what_is_not_latin():
    nothing: dict[str, list[str]] = {code: [] for code in word_lists.LANGUAGES}
    ranked = nothing | {"de": ["haus", "taxi", "ab", "слово", "ha1s"], "fr": ["maison", "taxi"]}
    known = {code: set(ranked[code]) for code in ranked} | {"en": {"maison"}}
    assert word_lists.distinct_words(ranked, known) == word_lists.LabelledWords(("haus",), (1,))


def test_split_is_disjoint_complete_and_repeatable(few_words):
    training, held_out = few_words.split(0.1, seed=3)
    assert len(held_out) == round(len(few_words) / 10)
    assert not set(training.words) & set(held_out.words)
    pairs = zip(training.words + held_out.words, training.labels + held_out.labels)
    assert set(pairs) == set(zip(few_words.words, few_words.labels))
    assert few_words.split(0.1, seed=3) == (training, held_out)
    assert few_words.split(0.1, seed=4) != (training, held_out)


def test_batches_hold_every_word_once_with_its_letters_and_label(few_words):
    alphabet = word_lists.Alphabet(few_words.words)
    encoded = word_lists.EncodedWords(few_words.words, few_words.labels, alphabet)
    seen = []
    for batch in encoded.shuffled(32, torch.Generator().manual_seed(0)):
        letters, lengths = pad_packed_sequence(batch.letters, batch_first=True)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        for row, length, label in zip(letters, lengths, batch.labels):
            seen.append((tuple(row[:length].tolist()), int(label)))
    expected = [
        (tuple(alphabet.numbers(word)), label)
        for word, label in zip(few_words.words, few_words.labels)
    ]
    assert sorted(seen) == sorted(expected)


def test_normalize_spells_as_the_lists_do():
    assert word_lists.normalize("Straße") == "strasse"
    assert word_lists.normalize("E\N{COMBINING ACUTE ACCENT}T\u00c9") == "\u00e9t\u00e9"


def test_perturb_moves_by_one_unit_in_the_last_place():
    model = nn.Linear(30, 20)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    words.perturb(model, words.rounding_unit(torch.device("cpu")))
    for old, new in zip(before, model.parameters()):
        assert torch.equal(torch.nextafter(old, 2 * old), new)


# Loss curves


def drifting(scale: float, *, steps: int = 400) -> np.ndarray:
    """Losses that fall from 2.6, plus a rounding error that grows tenfold every 80 steps."""
    step = np.arange(steps)
    return 2.6 * np.exp(-step / 300) + scale * 10 ** (step / 80) * np.sin(step)


@pytest.mark.parametrize("scale", [0, 3e-7, -1e-6, 2e-6])
def test_curves_agree_when_rounding_explains_the_drift(scale):
    comparison = loss_curves.compare(drifting(0), drifting(3e-7), drifting(scale))
    assert comparison.agrees
    assert comparison.first_departure is None
    assert "agree" in str(comparison)


@pytest.mark.parametrize("fault", [1e-4, math.nan, math.inf])
def test_curves_disagree_from_the_faulty_step_on(fault):
    candidate = drifting(3e-7)
    candidate[20:] += fault
    comparison = loss_curves.compare(drifting(0), drifting(3e-7), candidate)
    assert not comparison.agrees
    assert comparison.first_departure == 20
    assert "DISAGREE from step 20" in str(comparison)


def test_curves_of_different_lengths_raise():
    with pytest.raises(ValueError, match="one length, got 3, 3 and 2 steps"):
        loss_curves.compare([1, 1, 1], [1, 1, 1], [1, 1])


# python -m perf words


def words_arguments(*more: str) -> tuple[str, ...]:
    return ("words", "--epochs", "1", "--hidden", "8", "--top", str(TOP), *more)


def test_words_command_trains_compares_and_writes(tmp_path):
    arguments = words_arguments("--out", str(tmp_path), "--try", "Schmetterling papillon")
    for _ in range(2):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        assert "The loss curves agree" in result.output
        assert "papillon" in result.output
    rows = pd.read_parquet(tmp_path / "words.parquet")
    assert list(rows["model"]) == 2 * [words.REFERENCE, words.OURS, words.TWIN]
    assert list(rows["backend"][:3]) == ["ATen", "torch", "ATen"]
    assert rows["held_out_accuracy"].between(0, 1).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "words.csv"), rows, check_dtype=False)
    curves = pd.read_parquet(tmp_path / "words_curves.parquet")
    assert np.isfinite(curves["loss"]).all()
    assert set(json.loads((tmp_path / "env.json").read_text())) == set(rows["run_id"])


def test_words_command_fails_when_the_curves_disagree(monkeypatch):
    monkeypatch.setattr(tritonrnn, "RNN", SlightlyWrong)
    result = invoke(*words_arguments())
    assert result.exit_code == 1
    assert "DISAGREE" in result.output


# Timing and python -m perf cpu


def test_rounds_time_every_peer_and_reset_after_every_call():
    calls: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.job = Job(lambda: calls.append(name), lambda: calls.append(f"reset {name}"))

    jobs = {name: Recorder(name).job for name in ("a", "b", "c")}
    samples = time_in_rounds(jobs, rounds=5, seconds=0.0, random=cpu.Random(0))
    assert [set(sample) for sample in samples] == 5 * [{"a", "b", "c"}]
    assert all(seconds > 0 for sample in samples for seconds in sample.values())
    assert calls[1::2] == [f"reset {name}" for name in calls[::2]]
    orders = {
        tuple(calls[start : start + 6 : 2]) for start in range(len(calls) - 30, len(calls), 6)
    }
    assert len(orders) > 1


def test_packed_workload_has_lengths_from_t_down_to_a_quarter():
    case = Case(T=8, B=4, I=2, H=3, layers=1, directions=1)
    workload = Workload.make(case, packed=True, seed=0)
    assert case.packed_lengths() == [8, 6, 4, 2]
    assert workload.batch_sizes is not None
    assert workload.batch_sizes.tolist() == [4, 4, 3, 3, 2, 2, 1, 1]
    assert workload.tokens.shape == (20, 2)
    assert Case(T=8, B=1, I=2, H=3, layers=1, directions=1).packed_lengths() == [8]


def made_up_rows(cases: Iterable[tuple[str, str, float, float]]) -> pd.DataFrame:
    """Rows of ``cpu.measure`` from (case_id, mode, median speedup, p10 of the noise)."""
    rows = []
    for case_id, mode, speedup, noise_p10 in cases:
        for peer, p10, p50 in (
            (cpu.REFERENCE, 1.0, 1.0),
            (cpu.AGAIN, noise_p10, 1.0),
            (cpu.OURS, 0.9 * speedup, speedup),
        ):
            rows.append(
                {
                    "case_id": case_id,
                    "mode": mode,
                    "peer": peer,
                    "status": "ok" if p50 == p50 else "wrong",
                    "wall_us_p50": 100 / p50,
                    "speedup_vs_nn_p10": p10,
                    "speedup_vs_nn_p50": p50,
                    "speedup_vs_nn_p90": 1.1 * p50,
                }
            )
    return pd.DataFrame(rows)


def test_summary_means_and_verdict():
    summary = cpu.summarize(
        made_up_rows(
            [
                ("A", "train", 4.0, 0.9),
                ("B", "train", 1.0, 0.9),
                ("A", "infer", 1.3, 0.9),
                ("B", "infer", 0.8, 0.9),
                ("C", "infer", 0.95, 0.9),
            ]
        )
    )
    assert summary["nn_us"].tolist() == 5 * [100.0]
    assert summary["tritonrnn_us"].tolist() == pytest.approx([25, 100, 100 / 1.3, 125, 100 / 0.95])
    assert summary["slower"].tolist() == [False, False, False, True, False]
    means = cpu.geometric_means(summary)
    assert means == pytest.approx({"train": 2.0, "infer": (1.3 * 0.8 * 0.95) ** (1 / 3)})
    met, missed, slower = cpu.verdict(summary)
    assert met.startswith("train: 2.00 times")
    assert met.endswith("target of 1.8 is met.")
    assert missed.endswith("target of 1.1 is NOT met.")
    assert slower.startswith("SLOWER: infer B runs at 0.800")


def test_verdict_meets_no_target_with_a_case_that_was_not_timed():
    summary = cpu.summarize(made_up_rows([("A", "train", 4.0, 0.9), ("B", "train", math.nan, 0.9)]))
    wrong, missed, _ = cpu.verdict(summary)
    assert wrong.startswith("WRONG: train B")
    assert missed.endswith("NOT met.")


def cpu_arguments(monkeypatch, *more: str) -> tuple[str, ...]:
    monkeypatch.setattr(cpu, "CASES", (TINY,))
    return ("cpu", "--rounds", "2", "--seconds", "0", *more)


def test_cpu_command_checks_times_and_writes(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    result = invoke(*cpu_arguments(monkeypatch, "--threads", "2", "--out", str(tmp_path)))
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    rows = pd.read_parquet(tmp_path / "cpu.parquet")
    assert len(rows) == len(cpu.TARGETS) * len(cpu.PEERS)
    assert set(rows["status"]) == {"ok"}
    assert (rows["max_rel_err"] <= rows["tolerance"]).all()
    assert (rows.loc[rows["peer"] == cpu.REFERENCE, "speedup_vs_nn_p50"] == 1).all()
    [facts] = json.loads((tmp_path / "env.json").read_text()).values()
    assert facts["threads"] == 2


def test_cpu_command_times_no_wrong_result(monkeypatch):
    monkeypatch.setitem(cpu.PEERS, cpu.OURS, SlightlyWrong)
    result = invoke(*cpu_arguments(monkeypatch))
    assert result.exit_code == 1
    assert f"WRONG: infer {TINY.case_id}" in result.output


def test_appended_rows_keep_the_old_ones(tmp_path: Path):
    tables.append_rows(tmp_path, "t", pd.DataFrame({"run_id": ["a"], "x": [1]}))
    tables.append_rows(tmp_path, "t", pd.DataFrame({"run_id": ["b"], "y": [2.5]}))
    expected = pd.DataFrame({"run_id": ["a", "b"], "x": [1, None], "y": [None, 2.5]})
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), expected)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "t.csv"}
