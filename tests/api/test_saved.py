"""What an earlier version saved loads and computes what it computed then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tritonrnn
from tests.support.saved import Tagger

FOLDERS = sorted((Path(__file__).parents[1] / "data" / "saved").iterdir())

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # torch's exporter imports modules of its own that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def assert_computes_the_same(model, folder, name):
    arguments, expected = torch.load(folder / "calls.pt")[name]
    torch.testing.assert_close(model(*arguments), expected)


@pytest.mark.parametrize("name", ["rnn", "cell", "converted"])
def test_pickled_module_computes_what_it_did(folder, name):
    model = torch.load(folder / f"{name}.pt", weights_only=False)
    if name == "converted":
        assert model.name == "mine"
        # It runs as tritonrnn's.
        assert tritonrnn.explain(model, torch.zeros(2, 1, 3)).backend == "torch"
    assert_computes_the_same(model, folder, name)


def test_state_dict_loads(folder):
    model = Tagger()
    model.load_state_dict(torch.load(folder / "state_dict.pt"))
    assert_computes_the_same(model, folder, "state_dict")


def test_exported_program_computes_what_it_did(folder):
    program = torch.export.load(folder / "program.pt2")
    assert [str(node.target) for node in program.graph.nodes].count("tritonrnn.elman.default") == 3
    assert_computes_the_same(program.module(), folder, "program")
    lowered = program.run_decompositions(tritonrnn.export.decompositions())
    assert not any("tritonrnn" in str(node.target) for node in lowered.graph.nodes)
    assert_computes_the_same(lowered.module(), folder, "program")


def test_operators_keep_the_schemas_that_saved_programs_name():
    sources = "Tensor input, Tensor? hx, Tensor[] weights, "
    settings = (
        "Tensor? extents, Tensor? reset, str layout, str nonlinearity, bool bidirectional, "
        "str backend"
    )
    operators = torch.ops.tritonrnn
    assert str(operators.elman.default._schema) == (
        f"tritonrnn::elman({sources}{settings}) -> (Tensor, Tensor)"
    )
    assert str(operators.elman_backward.default._schema) == (
        f"tritonrnn::elman_backward(Tensor? grad_output, Tensor? grad_h_n, {sources}"
        f"Tensor output, {settings}, bool[] needs) -> Tensor[]"
    )
