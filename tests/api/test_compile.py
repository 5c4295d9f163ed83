"""A model around the RNN compiles into one graph for every length, with the same results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tritonrnn
from tests.support.cases import Case, plain
from tests.support.implementations import implementations
from tritonrnn import ops
from tritonrnn.dispatch import recurrence_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("torch_back_end"),
    # torch's compiler imports modules of its own that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Nor do its hints for GPUs matter here: of TF32, of a softmax that it splits.
    pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor"),
    # It captures one graph to hold the memory of the others.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]


class Tagger(nn.Module):
    """A model with something before its RNN and something after it."""

    def __init__(self, case: Case, module_class: type[nn.Module]):
        super().__init__()
        self.embed = nn.Linear(case.I, case.I)
        self.rnn = case.module(module_class)
        self.head = nn.Linear(case.D * case.H, 3)
        self.to(case.device)

    def forward(self, input, hx):
        if isinstance(input, PackedSequence):
            data, *packing = input
            input = PackedSequence(self.embed(data).tanh(), *packing)
        else:
            input = self.embed(input).tanh()
        output, h_n = self.rnn(input, hx)
        return self.head(plain(output)).log_softmax(-1), h_n.square()

    def results(self, run, case: Case) -> list[torch.Tensor]:
        """Return results and every gradient, of the model or of what it was compiled to."""
        data, hx = case.tensors()
        results = run(case.input(data), hx)
        leaves = [x for x in (data, hx, *self.parameters()) if x is not None]
        cotangents = case.cotangents(*results)
        return [*results, *torch.autograd.grad(results, leaves, cotangents)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    # In this process: torch 2.11 may wait minutes for its workers to end.
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


# An embedded packed input is a new one: its rows, and their order, compile as the rest does.
@pytest.mark.feature("`torch.compile(fullgraph=True)`, lengths and batches that vary", nn="no")
@implementations(
    "layout,hx,compiler",
    nn=[("time-major", True, "aot_eager")],
    torch=[
        ("time-major", True, "aot_eager"),
        ("batch-first", False, "aot_eager"),
        ("unsorted", False, "inductor"),
    ],
    triton=[("packed", False, "aot_eager"), ("batch-first", True, "inductor")],
)
def test_compiled_model_is_one_graph_for_every_length_and_batch(
    layout, hx, compiler, implementation
):
    case = Case(L=1 if compiler == "inductor" else 2, D=2, layout=layout, hx=hx)
    case = implementation.of(case)
    model = Tagger(case, implementation.rnn)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def dynamic(input, hx):
        """Mark the sizes that vary, so that one compilation serves all."""
        for tensor in input if isinstance(input, PackedSequence) else [input]:
            torch._dynamo.mark_dynamic(tensor, [0, 1][: tensor.ndim - 1 or 1])
        if hx is not None:
            torch._dynamo.mark_dynamic(hx, 1)
        return compiled(input, hx)

    run, graphs = (dynamic, 1) if compiler == "inductor" else (compiled, 2)
    for T, B in ((3, 4), (5, 3), (4, 6)):
        other = replace(case, T=T, B=B, seed=T)
        expected, got = model.results(model, other), model.results(run, other)
        torch.testing.assert_close(got, expected)
    # Without marks, one graph for the first sizes and one for all others. Each has the layers, what
    # is before them and what is after them.
    assert len(counter.graphs) == counter.frame_count == graphs
    for graph in counter.graphs:
        calls = [str(node.target) for node in graph.graph.nodes]
        assert sum("elman" in call for call in calls) == case.L
        assert {"tanh", "log_softmax", "square"} <= set(calls)


@pytest.mark.feature('`torch.compile(mode="reduce-overhead")`', nn_on_gpu="no")
@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["time-major", "packed"])
def test_compiled_model_runs_as_cuda_graphs(layout, implementation):
    case = implementation.of(Case(L=2, D=2, layout=layout))
    model = Tagger(case, implementation.rnn)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    # Warmed up, captured, and replayed with other values.
    counters["inductor"].clear()
    for seed in range(4):
        other = replace(case, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        got = [result.clone() for result in model.results(compiled, other)]
        torch.testing.assert_close(got, model.results(model, other), rtol=1e-3, atol=1e-4)
    # batch_sizes lie on the CPU, which keeps the layers of packed batches out.
    is_ours = implementation.rnn is not torch.nn.RNN
    assert layout == "packed" or not is_ours or counters["inductor"]["cudagraph_skips"] == 0


class OtherLengths(Case):
    """As many sequences, steps and rows as a packed case has by default."""

    def lengths(self) -> torch.Tensor:
        return torch.tensor([7, 6, 3, 2, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
def test_replayed_program_reads_batch_sizes_anew(implementation):
    case, other = (
        implementation.of(kind(layout="packed", L=2, D=2)) for kind in (Case, OtherLengths)
    )
    assert case.lengths().sum() == other.lengths().sum()
    model = Tagger(case, implementation.rnn)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for given in (case, case, case, other, case):
        torch.compiler.cudagraph_mark_step_begin()
        got = [result.clone() for result in model.results(compiled, given)]
        torch.testing.assert_close(got, model.results(model, given), rtol=1e-3, atol=1e-4)


def test_compiled_model_checks_its_input():
    module = Case().module(tritonrnn.RNN)
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(Exception, match="input_size"):
        compiled(torch.ones(3, 2, 5))


@pytest.mark.parametrize("back_end", ["torch", "triton"])
def test_compiled_cell_is_torchs_own_operations(back_end):
    """The compiler can fuse the steps of a loop with what is around them."""
    cell = tritonrnn.RNNCell(3, 5)

    def loop(input, hx=None):
        for x in input:
            hx = cell(x, hx)
        return hx

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loop, fullgraph=True, backend=counter)
    device = "cuda" if back_end == "triton" and torch.cuda.is_available() else "cpu"
    cell.to(device)
    input, hx = torch.randn(2, 4, 3, device=device), torch.randn(4, 5, device=device)
    with tritonrnn.backend(back_end):
        torch.testing.assert_close(compiled(input), loop(input))
        torch.testing.assert_close(compiled(input, hx), loop(input, hx))
    for graph in counter.graphs:
        assert not any("elman" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("back_end", ["torch", "triton"])
def test_backward_of_a_compiled_call_takes_the_back_end_of_its_forward(back_end, monkeypatch):
    taken = []

    def recorded(backend, *arguments):
        taken.append(backend.partition(":")[0])
        return recurrence_of(backend, *arguments)

    monkeypatch.setattr(ops, "recurrence_of", recorded)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = tritonrnn.RNN(3, 5).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with tritonrnn.backend(back_end):
        output, _ = compiled(torch.randn(4, 2, 3, device=device))
    # Neither the context at hand nor another call's choice counts.
    other = "torch" if back_end == "triton" else "triton"
    with tritonrnn.backend(other):
        compiled(torch.randn(4, 2, 3, device=device))
        taken.clear()
        output.sum().backward()
    assert taken == [back_end]
    assert module.weight_hh_l0.grad is not None


# Packing is not compiled, of which the compiler warns.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="2.11 can't trace pad_packed_sequence"
)
def test_compiled_model_returns_a_packed_sequence_that_can_be_padded():
    module = tritonrnn.RNN(3, 5)

    def model(padded):
        packed = pack_padded_sequence(padded, [1, 3, 2], enforce_sorted=False)
        output, _ = module(packed)
        return output, pad_packed_sequence(output)[0]

    padded = torch.randn(3, 3, 3)
    output, again = torch.compile(model, backend="aot_eager")(padded)
    expected, expected_again = model(padded)
    torch.testing.assert_close(again, expected_again)
    assert isinstance(output, PackedSequence)
    torch.testing.assert_close(output.data, expected.data)
