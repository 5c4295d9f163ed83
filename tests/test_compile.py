"""A model around the RNN compiles whole, for every length, and computes what it did before."""

from __future__ import annotations

import pytest
import torch
from cases import Case, plain
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tritonrnn

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # torch's compiler imports modules of its own that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layout", "compiler"),
    [
        ("time-major", "aot_eager"),
        ("batch-first", "aot_eager"),
        ("unsorted", "aot_eager"),
        ("unsorted", "inductor"),
    ],
)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
def test_compiled_model_agrees_whatever_the_length(layout, compiler, hx):
    module = Case(L=2, D=2).module(tritonrnn.RNN)
    module.batch_first = layout == "batch-first"

    def model(input, hx):
        output, h_n = module(input, hx)
        return plain(output).relu().sum(0), h_n * 2

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T in (5, 7, 9, 12):
        case = Case(T=T, L=2, D=2, layout=layout, hx=hx, seed=T)
        data, state = case.tensors()
        leaves = [data, *module.parameters()] + ([state] if hx else [])
        results = []
        for run in (model, compiled):
            first, second = run(case.input(data), state)
            gradients = torch.autograd.grad(first.sum() + second.sum(), leaves)
            results.append([first, second, *gradients])
        torch.testing.assert_close(results[1], results[0])
    # Once for the first length, and once more for all others.
    assert counter.frame_count <= 2


def test_compiled_model_checks_what_it_is_given():
    module = Case().module(tritonrnn.RNN)
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(Exception, match="input_size"):
        compiled(torch.ones(3, 2, 5))


def test_compiled_cell_agrees():
    cell = tritonrnn.RNNCell(3, 5)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    input, hx = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(compiled(input, hx), cell(input, hx))


def test_backward_of_a_compiled_call_does_not_obey_a_later_context():
    module = tritonrnn.RNN(3, 5).double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output, _ = compiled(torch.randn(4, 2, 3, dtype=torch.float64))
    with tritonrnn.backend("triton"):
        output.sum().backward()
    assert module.weight_hh_l0.grad is not None


# Packing is not compiled, and what the compiler has to say of that is a warning.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="2.11 can't trace pad_packed_sequence"
)
@pytest.mark.parametrize("lengths", [[3, 2, 1], [1, 3, 2]], ids=str)
def test_compiled_model_gives_a_packed_sequence_that_can_be_padded(lengths):
    module = tritonrnn.RNN(3, 5)

    def model(padded):
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        output, _ = module(packed)
        return output, pad_packed_sequence(output)[0]

    padded = torch.randn(3, 3, 3)
    output, again = torch.compile(model, backend="aot_eager")(padded)
    expected, expected_again = model(padded)
    torch.testing.assert_close(again, expected_again)
    assert isinstance(output, PackedSequence)
    torch.testing.assert_close(output.data, expected.data)
