"""The adding problem: its data, and both modules learn it alike."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tritonrnn
from perf.__main__ import app
from perf.training import adding, paired_training

pytestmark = pytest.mark.usefixtures("torch_back_end")


class SlightlyWrong(tritonrnn.RNN):
    """Return an ``h_n`` that is off by a ten-thousandth, and a right output."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, 1.0001 * h_n


def invoke(*arguments: str):
    return CliRunner().invoke(app, ("adding", *arguments), catch_exceptions=False)


def test_batches_are_sums_of_one_marked_number_of_each_half():
    input, sums = adding.make_batch(9, torch.Generator().manual_seed(0))
    numbers, marks = input.unbind(-1)
    assert numbers.shape == (9, adding.BATCH_SIZE)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert set(marks.unique().tolist()) == {0.0, 1.0}
    for half in (marks[:4], marks[4:]):
        assert (half.sum(0) == 1).all()
        # Anywhere in the half.
        assert half.any(1).all()
    torch.testing.assert_close((numbers * marks).sum(0), sums)


def test_batches_differ_and_repeat_for_a_seed():
    drawn = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        drawn.append([adding.make_batch(5, generator) for _ in range(100)])
    first, again, other = drawn
    assert all(torch.equal(a, b) for a, b in zip(sum(first, ()), sum(again, ())))
    assert not torch.equal(first[0][0], other[0][0])
    assert len({float(sums[0]) for _, sums in first}) == 100


def test_adder_starts_as_the_identity():
    torch.manual_seed(0)
    adder = adding.Adder(nn.RNN, 7)
    assert torch.equal(adder.rnn.weight_hh_l0, torch.eye(7))
    assert not adder.rnn.bias_hh_l0.any()
    assert adder.rnn.nonlinearity == "relu"


@pytest.mark.slow
def test_adding_command_learns_alike_and_draws(tmp_path):
    """Train until the loss is below that of always answering 1."""
    result = invoke("--steps", "200", "--T", "12", "--hidden", "32", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "The loss curves agree" in result.output
    rows = pd.read_parquet(tmp_path / "adding.parquet")
    names = [paired_training.REFERENCE, paired_training.CANDIDATE, paired_training.TWIN]
    assert list(rows["model"]) == names
    assert (rows["loss"] < 0.8 * adding.BLIND_LOSS).all()
    curves = pd.read_parquet(tmp_path / "adding_curves.parquet")
    assert len(curves) == 3 * 200
    assert np.isfinite(curves["loss"]).all()
    assert set(json.loads((tmp_path / "env.json").read_text())) == set(rows["run_id"])
    assert (tmp_path / "adding.png").read_bytes().startswith(b"\x89PNG")


def test_adding_command_fails_when_the_curves_disagree(monkeypatch):
    monkeypatch.setattr(tritonrnn, "RNN", SlightlyWrong)
    result = invoke("--steps", "5", "--hidden", "8")
    assert result.exit_code == 1
    assert "DISAGREE" in result.output
