"""Exported to ONNX, a model returns in onnxruntime what it returns in torch, for every length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tritonrnn
from tests.support.cases import Case
from tests.support.exported import Model, arguments_of, dynamic_shapes_of

onnxruntime = pytest.importorskip("onnxruntime")
translation = pytest.importorskip("tritonrnn.onnx")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("torch_back_end"),
    # torch's exporter and onnxscript use what torch and Python deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
]

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


def exported(case: Case, model: nn.Module):
    return torch.onnx.export(
        model.eval(),
        arguments_of(case),
        dynamo=True,
        verbose=False,
        dynamic_shapes=dynamic_shapes_of(case),
        custom_translation_table=translation.translation_table(),
        opset_version=OLDEST_OPSET if case.layout == "packed" else None,
    ).model_proto


def run_in_onnxruntime(proto, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    assert len(names) == len(arguments)
    feeds = {name: tensor.numpy() for name, tensor in zip(names, arguments)}
    return [torch.from_numpy(result) for result in session.run(None, feeds)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exported_model_agrees_whatever_the_length_and_batch(case):
    model = Model(case)
    proto = exported(case, model)
    assert sum(node.op_type == "RNN" for node in proto.graph.node) == case.L
    assert not any(node.domain for node in proto.graph.node)
    assert (proto.opset_import[0].version == OLDEST_OPSET) == (case.layout == "packed")
    for T, B in ((case.T, case.B), (2, 3), (40, 9), (1, 1)):
        arguments = arguments_of(replace(case, T=T, B=B, seed=T))
        with torch.no_grad():
            expected = model(*arguments)
        for got, y in zip(run_in_onnxruntime(proto, arguments), expected):
            torch.testing.assert_close(got, y, rtol=0, atol=2e-6)


def test_dtype_that_onnx_does_not_know_is_a_clear_error():
    case = Case(dtype=torch.bfloat16)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="float64, not in BFLOAT16"):
        exported(case, Model(case).bfloat16())


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
        custom_translation_table=translation.translation_table(),
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
