"""``python -m perf features``: its verdicts on known modules, and the README's table."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tritonrnn
from perf.__main__ import app
from perf.features import table
from perf.features.attempt import (
    FEATURES,
    TORCH_NN,
    TORCH_PATH,
    TRITON_PATH,
    NotTriedError,
    Outcome,
    Side,
)

README = Path(__file__).parents[2] / "README.md"
# tests/api/test_distributed.py tries these, on both paths of tritonrnn.
PROCESSES = ("`DistributedDataParallel`", "FSDP2, `fully_shard`")


class WrongState(tritonrnn.RNN):
    """Return an ``h_n`` that is off by a thousandth."""

    def forward(self, *args, **kwargs):
        output, h_n = super().forward(*args, **kwargs)
        return output, 1.001 * h_n


class NoGradient(tritonrnn.RNN):
    """Return results without a graph."""

    def forward(self, *args, **kwargs):
        output, h_n = super().forward(*args, **kwargs)
        return output.detach(), h_n.detach()


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells of a markdown table of features by its first column."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("|") and TORCH_NN in line and TORCH_PATH in line:
            break
    else:
        pytest.fail("no table of features")
    assert next(lines).startswith("|:-")
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        wording, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[wording] = cells
    return rows


def verdicts(rnn_class, *parts: str) -> set[str]:
    side = Side(TORCH_PATH, rnn_class, "torch", "cpu")
    on_a_cpu = [feature for feature in FEATURES if not feature.needs_gpu]
    chosen = [feature for feature in on_a_cpu if feature.wording.startswith(parts)]
    assert len(chosen) == len(parts)
    return {feature.attempt(side).word for feature in chosen}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "column"),
    [*enumerate((TORCH_NN, TORCH_PATH, TRITON_PATH))],
    ids=["nn.RNN", "torch-path", "triton-path"],
)
def test_readme_has_the_outcome_of_every_feature(place, column):
    promised = rows_of(README.read_text())
    assert list(promised) == [feature.wording for feature in FEATURES]
    side = table.sides()[column]
    tried = {
        feature.wording: Outcome("yes") if feature.wording in PROCESSES else feature.attempt(side)
        for feature in FEATURES
        if not feature.needs_gpu
    }
    wrong = {
        wording: (promised[wording][place], outcome)
        for wording, outcome in tried.items()
        if promised[wording][place] != outcome.word
    }
    assert not wrong


def test_command_prints_every_feature_and_the_reasons_of_failures(monkeypatch):
    chosen = [feature for feature in FEATURES if feature.wording.startswith(("padded", "`lengths"))]
    chosen += [feature for feature in FEATURES if feature.needs_gpu][:1]

    def refuse(side: Side) -> None:
        raise KeyError("a reason")

    chosen.append(replace(chosen[0], wording="a feature that fails", probe=refuse))
    monkeypatch.setattr(table, "FEATURES", chosen)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(app, ["features"], catch_exceptions=False)
    printed, promised = rows_of(result.output), rows_of(README.read_text())
    assert list(printed) == [feature.wording for feature in chosen]
    assert printed.pop("a feature that fails") == ["no", "no", "no"]
    assert result.output.count("a feature that fails: KeyError: 'a reason'") == 3
    assert f"{TORCH_NN}, `lengths=` of a padded batch" in result.output.partition("failed:")[2]
    if torch.cuda.is_available():
        printed.pop(chosen[2].wording)
    assert all(promised[wording] == cells for wording, cells in printed.items())


JUDGED_BY_VALUES = (
    "tanh and relu",
    "padded",
    "backward in eval mode",
    "activation checkpointing",
    "double backward",
    "jagged",
    "`lengths=`",
    "`reset=`",
    "weights tied",
)


@pytest.mark.parametrize(
    ("rnn_class", "parts", "verdict"),
    [
        (tritonrnn.RNN, ("tanh and relu", "padded", "backward in eval mode"), "yes"),
        (WrongState, JUDGED_BY_VALUES, "silently wrong"),
        (NoGradient, ("padded", "backward in eval mode", "double backward"), "no"),
        (nn.RNN, ("`lengths=`", "`reset=`", "jagged", "weights swapped", "`torch.export`, "), "no"),
        (nn.RNN, ("refuses an `hx`", "refuses a `Packed"), "silently wrong"),
    ],
    ids=["right", "wrong-state", "no-gradient", "nn.RNN-cannot", "nn.RNN-wrong"],
)
def test_verdicts_on_known_modules(rnn_class, parts, verdict):
    assert verdicts(rnn_class, *parts) == {verdict}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_rows_that_need_a_gpu_are_not_tried_without():
    side = table.sides()[TORCH_PATH]
    words = {feature.attempt(side).word for feature in FEATURES if feature.needs_gpu}
    assert words == {"not tried: needs a GPU"}


def test_missing_package_is_no_verdict(monkeypatch):
    feature = next(feature for feature in FEATURES if "ONNX" in feature.wording)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = feature.attempt(table.sides()[TORCH_NN])
    assert outcome.word == "not tried: needs onnxscript"
    with pytest.raises(NotTriedError):
        feature.probe(table.sides()[TORCH_NN])
