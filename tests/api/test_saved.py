"""What an earlier version saved loads and computes what it computed then."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tritonrnn
from tests.support.processes import run_alone
from tests.support.saved import NamedRNN, Tagger
from tritonrnn.conversion import _new_adopted

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


@pytest.mark.slow
def test_exported_program_computes_what_it_did(folder):
    program = torch.export.load(folder / "program.pt2")
    assert sum("tritonrnn.elman" in str(node.target) for node in program.graph.nodes) == 3
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
    saved = {
        "elman": f"({sources}{settings}) -> (Tensor, Tensor)",
        "elman.with_reserve": f"({sources}{settings}, bool needs_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        "elman_backward": f"(Tensor? grad_output, Tensor? grad_h_n, {sources}Tensor output, "
        f"{settings}, bool[] needs) -> Tensor[]",
    }
    for name, schema in saved.items():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.tritonrnn, packet), overload or "default")
        old = torch._C.parse_schema(f"tritonrnn::{name}{schema}")
        assert operator._schema.is_backward_compatible_with(old)


@pytest.mark.parametrize("name", ["rnn", "cell", "converted"])
def test_whole_model_loads_where_one_of_torchs_would(folder, name):
    """Whoever loads it need not know of the classes that convert put into it."""
    with torch.serialization.safe_globals([NamedRNN, nn.RNN, nn.RNNCell]):
        model = torch.load(folder / f"{name}.pt", weights_only=True)
        assert_computes_the_same(model, folder, name)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert_computes_the_same(torch.load(file, weights_only=True), folder, name)
    if name == "converted":
        with pytest.raises(pickle.UnpicklingError, match="NamedRNN was not an allowed global"):
            torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("arguments", [(dict, tritonrnn.RNN), (NamedRNN, dict)], ids=str)
def test_what_loading_calls_makes_nothing_but_rnns(arguments):
    with pytest.raises(TypeError, match="subclass"):
        _new_adopted(*arguments)


@pytest.mark.slow
def test_traced_module_without_the_package_says_what_is_missing(tmp_path):
    """As README says: torch's message names the operator, and so the package."""
    with warnings.catch_warnings():
        # That tracing is deprecated, and what the tracer can't follow.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(tritonrnn.RNN(3, 4), (torch.randn(5, 2, 3),))
    traced.save(tmp_path / "traced.pt")
    program = f"""
        import torch, warnings
        warnings.simplefilter("ignore")
        try:
            torch.jit.load("{tmp_path / "traced.pt"}")
        except RuntimeError as error:
            print(error)
        import tritonrnn
        print(torch.jit.load("{tmp_path / "traced.pt"}")(torch.ones(5, 2, 3))[0].shape)
    """
    printed = run_alone(program)
    assert "Unknown builtin op: tritonrnn::elman" in printed
    assert "[5, 2, 4]" in printed
