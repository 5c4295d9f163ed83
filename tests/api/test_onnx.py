"""Exported to ONNX, a model returns in onnxruntime what it returns in torch, for every length."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.onnx._internal._lazy_import import onnxscript_apis

import tritonrnn
from tests.support.cases import Case
from tests.support.exported import Model, arguments_of, dynamic_shapes_of
from tests.support.implementations import implementations

NEEDED = ("onnx", "onnxruntime", "onnxscript")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if not MISSING:
    import onnx
    import onnxruntime

    import tritonrnn.onnx as translation

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.slow,
    pytest.mark.usefixtures("torch_back_end"),
    # torch's exporter and onnxscript use what torch and Python deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    # Of torch.nn.RNN, which sets its weights anew.
    pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning"),
    # Checks of sizes are not traced. torch.nn's modules warn of that as well.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
]


@pytest.fixture(autouse=True, scope="module")
def _read_operators_once() -> Iterator[None]:
    """Keep onnxscript from reading the source of its operators anew, half of an export's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", cache(onnxscript_apis.get_torchlib_ops))
        yield


CASES = [
    Case(layout=layout, L=L, D=D, nonlinearity=nonlinearity, bias=bias, hx=hx)
    for layout, L, D, nonlinearity, bias, hx in [
        ("time-major", 2, 2, "relu", False, True),
        ("batch-first", 2, 1, "tanh", True, False),
        ("unbatched", 1, 1, "relu", True, True),
        ("packed", 1, 2, "relu", False, False),
        ("unsorted", 1, 2, "tanh", True, True),
    ]
]
OLDEST_OPSET = 18


def exported(case: Case, model: nn.Module, table: bool = False, **options):
    """By the plain call, or with the table, as a program that was exported before needs it."""
    options["opset_version"] = OLDEST_OPSET if case.layout == "packed" else None
    arguments, shapes = arguments_of(case), dynamic_shapes_of(case)
    if table:
        model = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
        options["custom_translation_table"] = translation.translation_table()
        shapes = None
    return torch.onnx.export(
        model if table else model.eval(),
        () if table else arguments,
        dynamo=True,
        verbose=False,
        dynamic_shapes=shapes,
        **options,
    ).model_proto


def run_in_onnxruntime(proto, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    assert len(names) == len(arguments)
    feeds = {name: tensor.cpu().numpy() for name, tensor in zip(names, arguments)}
    return [torch.from_numpy(result) for result in session.run(None, feeds)]


@pytest.mark.feature("ONNX export, any number of steps and sequences", nn="no")
@pytest.mark.parametrize("table", [False, True], ids=["plain", "table"])
@implementations("case", nn=CASES[:1], torch=CASES, triton=CASES[:1])
def test_exported_model_agrees_whatever_the_length_and_batch(case, table, implementation):
    case = implementation.of(case)
    model, theirs = (Model(case, rnn).eval() for rnn in (implementation.rnn, nn.RNN))
    proto = exported(case, model, table)
    # A size that may vary has a name.
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for T, B in ((case.T, case.B), (2, 3), (40, 9), (1, 1)):
        arguments = arguments_of(replace(case, T=T, B=B, seed=T))
        with torch.no_grad():
            expected = theirs(*arguments)
        for got, y in zip(run_in_onnxruntime(proto, arguments), expected):
            torch.testing.assert_close(got, y.cpu(), rtol=0, atol=2e-6)
    assert sum(node.op_type == "RNN" for node in proto.graph.node) == case.L
    assert not any(node.domain for node in proto.graph.node)
    assert (proto.opset_import[0].version == OLDEST_OPSET) == (case.layout == "packed")


def test_dtype_that_onnx_does_not_know_is_a_clear_error():
    case = Case(dtype=torch.bfloat16)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="float64, not in BFLOAT16"):
        exported(case, Model(case).bfloat16().eval(), table=True)
    # Step by step, as torch.nn.RNN is exported.
    operators = {
        node.op_type
        for node in torch.onnx.export(
            tritonrnn.RNN(3, 5).bfloat16().eval(),
            (torch.ones(4, 2, 3).bfloat16(),),
            dynamo=True,
            verbose=False,
        ).model_proto.graph.node
    }
    assert "Tanh" in operators


def test_layout_that_onnx_does_not_know_is_a_clear_error():
    case = Case(hx=False)
    weights = list(case.module(tritonrnn.RNN).parameters())

    class Jagged(nn.Module):
        def forward(self, rows, offsets):
            return torch.ops.tritonrnn.elman(
                rows, None, weights, offsets, None, "jagged", "tanh", False, "auto"
            )

    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="whose layout is 'jagged'"):
        torch.onnx.export(
            Jagged().eval(),
            (torch.ones(3, case.I), torch.tensor([0, 1, 3])),
            dynamo=True,
            verbose=False,
            custom_translation_table=translation.translation_table(),
        )


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
def test_cell_becomes_plain_operations(hx, dynamo):
    cell = tritonrnn.RNNCell(3, 5).eval()
    x, state = torch.randn(4, 3), torch.randn(4, 5)
    arguments = (x, state) if hx else (x,)
    file = io.BytesIO()
    shapes = {"dynamic_shapes": ({0: "B"},) * len(arguments)} if dynamo else {}
    torch.onnx.export(cell, arguments, file, dynamo=dynamo, verbose=False, **shapes)
    proto = onnx.load_from_string(file.getvalue())
    for got, y in zip(run_in_onnxruntime(proto, arguments), [cell(*arguments)]):
        torch.testing.assert_close(got, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_packed], ids=str)
def test_torchscript_exporter_agrees_whatever_the_length_and_batch(case):
    model, file = Model(case).eval(), io.BytesIO()
    arguments, (shapes,) = arguments_of(case), dynamic_shapes_of(case)
    names = [f"x{i}" for i in range(len(arguments))]
    torch.onnx.export(
        model,
        arguments,
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes={n: {i: f"{n}_{i}" for i in axes} for n, axes in zip(names, shapes)},
    )
    proto = onnx.load_from_string(file.getvalue())
    assert sum(node.op_type == "RNN" for node in proto.graph.node) == case.L
    for T, B in ((case.T, case.B), (2, 3)):
        arguments = arguments_of(replace(case, T=T, B=B, seed=T))
        for got, y in zip(run_in_onnxruntime(proto, arguments), model(*arguments)):
            torch.testing.assert_close(got, y, rtol=0, atol=2e-6)


def test_torchscript_exporter_takes_a_model_that_packs():
    class Packs(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = tritonrnn.RNN(3, 5, 2, bidirectional=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
            output, h_n = self.rnn(packed)
            return nn.utils.rnn.pad_packed_sequence(output)[0], h_n

    model, file = Packs().eval(), io.BytesIO()
    torch.onnx.export(
        model,
        (torch.randn(4, 3, 3), torch.tensor([4, 2, 1])),
        file,
        dynamo=False,
        input_names=["x", "lengths"],
        dynamic_axes={"x": {0: "T", 1: "B"}, "lengths": {0: "B"}},
    )
    proto = onnx.load_from_string(file.getvalue())
    arguments = torch.randn(6, 2, 3), torch.tensor([6, 5])
    for got, y in zip(run_in_onnxruntime(proto, arguments), model(*arguments)):
        torch.testing.assert_close(got, y, rtol=0, atol=2e-6)


def test_torchscript_exporter_points_to_the_other_for_lengths():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = tritonrnn.RNN(3, 5)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)

    arguments = torch.randn(4, 2, 3), torch.tensor([4, 2])
    with pytest.raises(RuntimeError, match="dynamo=True it takes lengths="):
        torch.onnx.export(Padded().eval(), arguments, io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_lengths_become_the_operators_sequence_lens(batch_first):
    model = tritonrnn.RNN(3, 5, 2, batch_first=batch_first, bidirectional=True).eval()
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    where = {0: B, 1: T} if batch_first else {0: T, 1: B}
    program = torch.onnx.export(
        model,
        (torch.randn(4, 4, 3),),
        kwargs={"lengths": torch.tensor([4, 1, 3, 2])},
        dynamo=True,
        verbose=False,
        dynamic_shapes={"input": where, "lengths": {0: B}},
    )
    x, lengths = torch.randn(5, 6, 3), [4, 1, 3, 2, 2, 4][: 5 if batch_first else 6]
    expected = model(x, lengths=torch.tensor(lengths))
    for got, want in zip(program(x, lengths=torch.tensor(lengths)), expected):
        torch.testing.assert_close(got, want)


def test_reset_is_a_clear_error():
    model = tritonrnn.RNN(3, 5).eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="reset"):
        torch.onnx.export(
            model,
            (torch.randn(4, 2, 3),),
            kwargs={"reset": torch.zeros(4, 2, dtype=torch.bool)},
            dynamo=True,
            verbose=False,
            custom_translation_table=translation.translation_table(),
        )
