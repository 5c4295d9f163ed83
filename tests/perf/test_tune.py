"""``python -m perf tune``, with Triton's interpreter for the GPU, and times that the test sets."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import tritonrnn
from perf.__main__ import app
from perf.bench import presets
from perf.session import tune
from tests.support import imitation
from tritonrnn import autotune
from tritonrnn.kernels.plan import PLANS

# Triton's interpreter does not know Gluon.
TRIED = {name for name in PLANS if name != "registers"}


def invoke(*arguments: object):
    given = ("tune", "--device", "cpu", "--preset", "smoke", *arguments)
    return CliRunner().invoke(app, [str(one) for one in given], catch_exceptions=False)


@pytest.mark.slow
def test_tuning_tries_every_plan_once_and_shows_what_the_choice_loses(tmp_path, monkeypatch):
    us = {"resident": 90.0, "cooperative": 50.0, "stepwise": 300.0}
    bench = imitation.imitate(tmp_path / "cache", monkeypatch, us)
    # Padded only.
    monkeypatch.setitem(presets.PRESETS, "smoke", presets.PRESETS["smoke"][:1])
    result = invoke("--out", tmp_path)
    assert result.exit_code == 0
    trials = pd.read_parquet(tmp_path / "trials.parquet")
    assert set(trials["plan"]) == TRIED
    assert (trials.groupby("plan")["verdict"].value_counts().unstack()["right"] > 0).all()
    # Inference and training.
    fast = trials[trials["kind"] == "fast"].groupby("plan")["verdict"]
    assert fast.unique().map(list).to_dict() == {
        "resident": ["faster"],
        "cooperative": ["faster"],
        "stepwise": ["slower"],
    }
    assert fast.size().eq(2).all()
    beside = pd.read_parquet(tmp_path / "plans.parquet")
    assert beside["serves"].eq("resident").all()
    assert beside["regret"].tolist() == pytest.approx([90 / 50 - 1] * 2, rel=0.1)
    assert "80.0 % longer than the best in the geometric mean over 2 classes" in result.output
    # All are remembered, and are those that the calls themselves would make.
    timed = len(bench.timed)
    assert invoke("--out", tmp_path).exit_code == 0
    for trains in (False, True):
        module, input = tritonrnn.RNN(4, 8), torch.randn(12, 3, 4)
        with torch.set_grad_enabled(trains):
            module(input)
            assert tritonrnn.explain(module, input).plan.startswith("resident")
    assert len(bench.timed) == timed


def test_plan_that_is_wrong_is_named_and_fails_the_command(tmp_path, monkeypatch):
    imitation.imitate(tmp_path / "cache", monkeypatch)
    imitation.on_launch(monkeypatch, lambda plan, arguments: arguments["s_ptr"].zero_())
    monkeypatch.setattr(autotune, "_asked", "verify")
    with pytest.warns(RuntimeWarning, match="wrong numbers"):
        result = invoke("--out", tmp_path, "--plan", "resident")
    assert result.exit_code == 1
    assert "- resident wrong:" in result.output
    assert "No plan was timed" in result.output
    trials = tune.read(tmp_path)
    assert set(trials["plan"]) == {"resident"}
    assert set(trials["kind"]) == {"right"}
    # Of another plan, whose table is a newer one.
    assert invoke("--out", tmp_path, "--plan", "registers").exit_code == 5


def test_device_without_trials_is_refused(tmp_path):
    result = invoke("--out", tmp_path)
    assert result.exit_code == 2
    assert "No plan is tried on cpu" in result.output
