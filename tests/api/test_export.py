"""An exported program serves every length and batch, trains, and runs without tritonrnn."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import tritonrnn
from tests.support.cases import Case
from tests.support.exported import Model, arguments_of, dynamic_shapes_of
from tests.support.implementations import implementations, slow
from tests.support.operators import OperatorCall
from tests.support.processes import run_alone

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # torch's exporter imports modules of its own that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
    # Of torch.nn.RNN, which sets its weights anew.
    pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning"),
]

CASES = [
    Case(layout=layout, L=L, D=D, nonlinearity=nonlinearity, bias=bias, hx=hx, dtype=torch.float64)
    for layout, L, D, nonlinearity, bias, hx in [
        ("time-major", 2, 2, "tanh", True, True),
        ("batch-first", 1, 2, "relu", False, False),
        ("unbatched", 2, 1, "tanh", True, False),
        ("packed", 2, 1, "tanh", True, False),
        ("unsorted", 1, 2, "relu", True, True),
    ]
]


def exported(case: Case, model: Model) -> torch.export.ExportedProgram:
    return torch.export.export(
        model, arguments_of(case), dynamic_shapes=dynamic_shapes_of(case), strict=False
    )


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def operators_of(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def results_of(case: Case, module: torch.nn.Module) -> list[torch.Tensor]:
    """Return the results, and the gradient of every argument and parameter."""
    arguments = [x.requires_grad_(x.is_floating_point()) for x in arguments_of(case)]
    results = module(*arguments)
    leaves = [x for x in (*arguments, *module.parameters()) if x.requires_grad]
    cotangents = case.cotangents(*results)
    return [*results, *torch.autograd.grad(results, leaves, cotangents)]


def assert_agrees(case: Case, program: torch.export.ExportedProgram, model: Model) -> None:
    expected, got = results_of(case, model), results_of(case, program.module())
    # Each an output, h_n, the data, ..., and the parameters in their order.
    assert [x.shape for x in got] == [x.shape for x in expected]
    torch.testing.assert_close(got, expected)


@pytest.mark.feature(
    "`torch.export`, padded and packed, any number of steps and sequences", nn="no"
)
@implementations("case", nn=CASES, torch=CASES, triton=map(slow, CASES[2:]))
def test_exported_program_agrees_and_trains_whatever_the_length_and_batch(case, implementation):
    case = implementation.of(case)
    model = Model(case, implementation.rnn)
    program = saved_and_loaded(exported(case, model))
    for T, B in ((2, 3), (11, 4)):
        assert_agrees(replace(case, T=T, B=B, seed=T), program, model)
    if case.layout in ("time-major", "batch-first"):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            program.module()(*arguments_of(replace(case, T=0)))
    assert operators_of(program).count("tritonrnn.elman.with_reserve") == case.L


def test_decompositions_of_torch_keep_the_operator():
    case = CASES[0]
    model = Model(case)
    program = exported(case, model).run_decompositions()
    assert operators_of(program).count("tritonrnn.elman.with_reserve") == case.L
    assert_agrees(case, program, model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_lowered_program_agrees_and_trains_whatever_the_length_and_batch(case):
    model = Model(case)
    lowered = exported(case, model).run_decompositions(tritonrnn.export.decompositions())
    lowered = saved_and_loaded(lowered)
    names = operators_of(lowered)
    assert not any("tritonrnn" in name for name in names)
    assert names.count("scan") == case.L * case.D
    assert_agrees(replace(case, T=11, B=4, seed=1), lowered, model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_lowered_program_of_static_length_is_unrolled(case):
    model = Model(case)
    program = torch.export.export(model, arguments_of(case), strict=False)
    lowered = program.run_decompositions(tritonrnn.export.decompositions())
    assert all(name.startswith(("aten.", "<built-in")) for name in operators_of(lowered))
    assert_agrees(case, lowered, model)


def test_packing_inside_the_model_points_to_lengths():
    class Packs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = tritonrnn.RNN(3, 4)

        def forward(self, x, lengths):
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
            return self.rnn(packed)[1], self.rnn(x, lengths=lengths)[1]

    arguments = torch.randn(5, 3, 3), torch.tensor([5, 3, 2])
    torch.testing.assert_close(*Packs()(*arguments))
    with pytest.raises(RuntimeError, match=r"pack_padded_sequence.* lengths="):
        torch.export.export(Packs(), arguments, strict=False)


@pytest.fixture(scope="module")
def table():
    return tritonrnn.export.decompositions()


def lowered_calls() -> list[OperatorCall]:
    return [
        OperatorCall(layout, Case(T=4, D=D, nonlinearity=nonlinearity, hx=hx, dtype=torch.float64))
        for layout in ("time_major", "batch_major", "packed")
        for D, nonlinearity, hx in [(1, "tanh", False), (2, "relu", True), (2, "tanh", True)]
    ] + [
        OperatorCall(
            layout, Case(T=4, D=2, hx=hx, dtype=torch.float64), lengths=lengths, reset=reset
        )
        for layout in ("time_major", "batch_major")
        for lengths, reset, hx in [(True, False, True), (False, True, True), (True, True, False)]
    ]


@pytest.mark.parametrize("with_grads", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("call", lowered_calls(), ids=str)
def test_decompositions_agree_with_the_operators(call, with_grads, table):
    operators = torch.ops.tritonrnn
    with torch.no_grad():
        for operator, arguments in (
            (operators.elman.with_reserve, call.forward()),
            (operators.elman_backward.default, call.backward(with_grads)),
        ):
            # Without the reserve, which is empty.
            got, expected = table[operator](*arguments), operator(*arguments)
            torch.testing.assert_close(
                [x for x in got if x.numel()], [x for x in expected if x.numel()]
            )


@pytest.mark.slow
@pytest.mark.parametrize("call", lowered_calls()[4::5], ids=str)
def test_backward_of_dynamic_length_is_lowered(call):
    """A lowered training step has both operators in it."""
    operator, arguments = torch.ops.tritonrnn.elman_backward, call.backward()
    table = tritonrnn.export.decompositions()
    with torch.no_grad():
        traced = make_fx(operator, tracing_mode="symbolic", decomposition_table=table)(*arguments)
        targets = [str(node.target) for node in traced.graph.nodes]
        assert "scan" in targets
        assert not any("tritonrnn" in target for target in targets)
        torch.testing.assert_close(traced(*arguments), operator(*arguments))


def test_nan_of_one_sequence_stays_out_of_the_others():
    operator = torch.ops.tritonrnn.elman_backward.default
    arguments = OperatorCall("packed", Case(D=2, dtype=torch.float64)).backward()
    grad_output, _, data, _, _, output, *_ = arguments
    # The first row is read in place of rows that do not exist.
    for tensor in (grad_output, data, output):
        tensor[0] = torch.nan
    with torch.no_grad():
        got = tritonrnn.export.decompositions()[operator](*arguments)
        expected = operator(*arguments)
    torch.testing.assert_close(got, expected, equal_nan=True)
    grad_input, grad_hx, *_ = got
    assert grad_input[1].isfinite().all()
    assert grad_hx[:, 1:].isfinite().all()


def test_layout_that_can_not_be_lowered_is_a_clear_error():
    arguments = OperatorCall("jagged", Case()).forward()
    table = tritonrnn.export.decompositions()
    with pytest.raises(NotImplementedError, match="the layout 'jagged'"):
        make_fx(torch.ops.tritonrnn.elman.with_reserve, decomposition_table=table)(*arguments)


@pytest.mark.slow
def test_lowered_program_runs_where_there_is_no_tritonrnn(tmp_path):
    case = Case(layout="packed", hx=False, dtype=torch.float64)
    model = Model(case)
    program = exported(case, model)
    torch.export.save(program, tmp_path / "program.pt2")
    lowered = program.run_decompositions(tritonrnn.export.decompositions())
    torch.export.save(lowered, tmp_path / "lowered.pt2")
    arguments = arguments_of(replace(case, T=9))
    torch.save([arguments, model(*arguments)[0].detach()], tmp_path / "expected.pt")
    run_alone(f"""
        import sys, torch, warnings
        warnings.simplefilter("ignore")
        torch.set_grad_enabled(False)
        arguments, expected = torch.load({str(tmp_path / "expected.pt")!r})
        lowered = torch.export.load({str(tmp_path / "lowered.pt2")!r}).module()
        torch.testing.assert_close(lowered(*arguments)[0], expected)
        assert "tritonrnn" not in sys.modules
        import tritonrnn
        program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
        torch.testing.assert_close(program(*arguments)[0], expected)
    """)
