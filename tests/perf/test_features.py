"""python -m perf features: its verdicts on modules that are known, and the README's table."""

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tritonrnn
from perf.__main__ import app
from perf.features import table
from perf.features.attempt import FEATURES, TORCH_NN, TORCH_PATH, NotTriedError, Side

README = Path(__file__).parents[2] / "README.md"


class WrongState(tritonrnn.RNN):
    """Off by a thousandth in ``h_n``."""

    def forward(self, *args, **kwargs):
        output, h_n = super().forward(*args, **kwargs)
        return output, 1.001 * h_n


class NoGradient(tritonrnn.RNN):
    """Returns what nothing can be trained by."""

    def forward(self, *args, **kwargs):
        output, h_n = super().forward(*args, **kwargs)
        return output.detach(), h_n.detach()


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of a markdown table of features, by its first column."""
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


def test_readme_has_the_table_as_the_command_prints_it():
    result = CliRunner().invoke(app, ["features"], catch_exceptions=False)
    printed, promised = rows_of(result.output), rows_of(README.read_text())
    assert list(printed) == list(promised) == [feature.wording for feature in FEATURES]
    for feature in FEATURES:
        if not feature.needs_gpu:
            assert printed[feature.wording] == promised[feature.wording], result.output


NUMBERS = (
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
        (WrongState, NUMBERS, "silently wrong"),
        (NoGradient, ("padded", "backward in eval mode", "double backward"), "no"),
        (nn.RNN, ("`lengths=`", "`reset=`", "jagged", "weights swapped", "`torch.export`, "), "no"),
        (nn.RNN, ("refuses an `hx`", "refuses a `Packed"), "silently wrong"),
    ],
    ids=["right", "wrong-state", "no-gradient", "nn.RNN-cannot", "nn.RNN-wrong"],
)
def test_verdicts_on_modules_that_are_known(rnn_class, parts, verdict):
    assert verdicts(rnn_class, *parts) == {verdict}


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are tried here")
def test_rows_that_need_a_gpu_are_not_tried_without():
    side = table.sides()[TORCH_PATH]
    words = {feature.attempt(side).word for feature in FEATURES if feature.needs_gpu}
    assert words == {"not tried: needs a GPU"}


def test_what_is_not_there_is_no_verdict(monkeypatch):
    feature = next(feature for feature in FEATURES if "ONNX" in feature.wording)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = feature.attempt(table.sides()[TORCH_NN])
    assert outcome.word == "not tried: needs onnxscript"
    with pytest.raises(NotTriedError):
        feature.probe(table.sides()[TORCH_NN])
