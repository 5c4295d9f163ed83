"""Whole calls on a GPU: CUDA graphs, streams, a device that is not the current one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import tritonrnn
from tests.support.cases import Case, assert_accurate_over, exact, plain, run
from tests.support.implementations import implementations
from tests.support.oracle import assert_as_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

Results = TypeVar("Results")
LAYOUTS = ("time-major", "batch-first", "packed", "unsorted")
THROUGH_KERNELS = [
    Case(T=19, B=9, I=6, H=33, L=2, D=2, layout=layout, dtype=dtype, device="cuda")
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.bfloat16)
]
# For cuDNN. Its packed calls are tested in fewer cases.
WIDE = Case(T=9, B=5, I=6, H=512, device="cuda")


def capture(compute: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """Capture ``compute`` after a warm-up, which compiles kernels, both on one stream.

    A replay reads the memory of what ``compute`` has from its caller: that is to live as long.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = compute()
    return graph, results


def captured_call(
    case: Case, module: nn.Module, data: Tensor, hx: Tensor | None, *, trains: bool
) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], list[Tensor | None]]:
    """Capture a call. Return its results too, by the names of :func:`cases.run`, and what to keep.

    That is what lies on the GPU: ``batch_sizes``, and all that is derived from them, live no longer
    than this function.
    """
    input = case.input(data)
    leaves = {"input": data, "hx": hx, **dict(module.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    # No graph is recorded: a leaf's gradient accumulates on the stream of its first graph, and a
    # capture can't wait for another stream.
    with torch.no_grad():
        output, h_n = module(input, hx)
    cotangents = case.cotangents(plain(output), h_n)

    def compute() -> dict[str, Tensor]:
        with torch.set_grad_enabled(trains):
            output, h_n = module(input, hx)
        results = {"output": plain(output).detach(), "h_n": h_n.detach()}
        if trains:
            gradients = torch.autograd.grad((plain(output), h_n), list(leaves.values()), cotangents)
            results |= {f"grad of {name}": g for name, g in zip(leaves, gradients)}
        return results

    order = [input.sorted_indices, input.unsorted_indices] if case.is_packed else []
    return *capture(compute), [*cotangents, *order]


def assert_agrees(
    case: Case, module: nn.Module, data: Tensor, hx: Tensor | None, got: dict[str, Tensor]
) -> None:
    """Check that the results are as accurate as those of the same call without a graph."""
    expected, truth = run(case, module, data, hx), exact(case, module, data, hx)
    for name in got:
        assert_as_accurate([got[name]], [expected[name]], [truth[name]], name)


# Padded and packed, of fewer cases.
FEWER = [THROUGH_KERNELS[0], THROUGH_KERNELS[4]]


@pytest.mark.feature("CUDA graph capture, forward and backward, padded and packed")
@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward-and-backward"])
@implementations("case", nn=FEWER, torch=[*FEWER, WIDE], triton=THROUGH_KERNELS)
def test_captured_call_replays_on_new_inputs(case, trains, implementation):
    module = case.module(implementation.rnn)
    data, hx = case.tensors()
    graph, results, _kept = captured_call(case, module, data, hx, trains=trains)
    # These would overwrite a row map that was freed from pinned memory.
    others = [torch.zeros(1 << power, dtype=torch.int64).pin_memory() for power in range(12)]
    assert all(other.is_pinned() for other in others)
    for seed in (3, 4):
        new_data, new_hx = replace(case, seed=seed).tensors()
        with torch.no_grad():
            data.copy_(new_data)
            hx.copy_(new_hx)
        for result in results.values():
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_agrees(case, module, new_data, new_hx, results)


@implementations("case", torch=[WIDE], triton=THROUGH_KERNELS[::2])
def test_captured_training_step_trains_as_without(case, implementation):
    """Forward, backward and the optimizer's step in one graph; a new batch for each replay."""
    start = case.module(tritonrnn.RNN)
    batches = [replace(case, seed=seed).tensors(1.0) for seed in (3, 4, 5)]
    cotangents = case.cotangents(*map(plain, start(case.input(batches[0][0]), batches[0][1])))

    def stepper(module: nn.Module, data: Tensor, hx: Tensor) -> Callable[[], dict]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        input = case.input(data)

        def step() -> dict:
            optimizer.zero_grad(set_to_none=True)
            output, h_n = module(input, hx)
            weight, other = (c.to(h_n.dtype) for c in cotangents)
            ((plain(output) * weight).mean() + (h_n * other).mean()).backward()
            optimizer.step()
            return {}

        return step

    def weights(module: nn.Module) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    def trained_without_a_graph(module: nn.Module) -> Tensor:
        for data, hx in batches:
            dtype = module.weight_hh_l0.dtype
            stepper(module, data.detach().to(dtype), hx.detach().to(dtype))()
        return weights(module)

    captured = copy.deepcopy(start)
    data, hx = (x.detach().clone() for x in batches[0])
    step = stepper(captured, data, hx)
    graph, _ = capture(step)
    # The warm-up trained it.
    captured.load_state_dict(start.state_dict())
    for new_data, new_hx in batches:
        data.copy_(new_data.detach())
        hx.copy_(new_hx.detach())
        graph.replay()
    torch.cuda.synchronize()
    expected = trained_without_a_graph(copy.deepcopy(start))
    wide = case.module().double()
    wide.load_state_dict(start.state_dict())
    truth = trained_without_a_graph(wide)
    assert_as_accurate([weights(captured)], [expected], [truth])


# torch keeps the graph of its warm-up, on another stream than that of later calls.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("case", [THROUGH_KERNELS[0], WIDE], ids=str)
def test_graphed_callable_agrees(case):
    """By the plan that wins its trial, which the first call of the warm-up makes."""
    module = case.module(tritonrnn.RNN)
    with tritonrnn.backend("auto"):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), case.tensors())
        for seed in (3, 4):
            data, hx = replace(case, seed=seed).tensors()
            assert_agrees(case, module, data, hx, run(case, graphed, data, hx))


@pytest.mark.feature("work is queued on the current stream")
@implementations("case", nn=FEWER[:1], torch=FEWER[:1], triton=THROUGH_KERNELS)
def test_work_is_queued_on_the_current_stream_without_waiting(case, implementation):
    module = case.module(implementation.rnn)
    values, hx = case.tensors()
    # Compiles the kernels, which may wait for the device.
    output, h_n = module(case.input(values), hx)
    cotangents = case.cotangents(plain(output), h_n)
    leaves = {"input": torch.full_like(values, torch.nan).requires_grad_(), "hx": hx}
    leaves |= dict(module.named_parameters())
    torch.autograd.grad((plain(output), h_n), [values, *list(leaves.values())[1:]], cotangents)
    del output, h_n
    input = case.input(leaves["input"])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            # What is not queued behind this reads NaN.
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                leaves["input"].copy_(values)
            output, h_n = module(input, hx)
            gradients = torch.autograd.grad((plain(output), h_n), leaves.values(), cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    results = {"output": plain(output).detach(), "h_n": h_n.detach()}
    results |= {f"grad of {name}": gradient for name, gradient in zip(leaves, gradients)}
    # torch warns of a graph on another stream that lives on.
    del output, h_n
    assert_agrees(case, module, values, hx, results)


@pytest.mark.feature("tensors on a device that is not the current one")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@implementations("case", nn=FEWER, torch=[*FEWER, WIDE], triton=THROUGH_KERNELS)
def test_tensors_on_a_device_that_is_not_the_current_one(case, implementation):
    case = replace(case, device="cuda:1")
    with torch.cuda.device(0):
        assert_accurate_over([case], module_class=implementation.rnn)
        output, _ = case.module(implementation.rnn)(case.input(case.tensors()[0]))
        assert plain(output).device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0


@implementations("case", triton=THROUGH_KERNELS[:1])
def test_lengths_are_read_anew_by_each_call_and_each_replay(case, implementation):
    module = case.module(tritonrnn.RNN)
    data, hx = (tensor.detach() for tensor in case.tensors())
    lengths = torch.full((case.B,), case.T, device="cuda")

    def compute(lengths: Tensor) -> list[Tensor]:
        output, h_n = module(data, hx, lengths=lengths)
        gradients = torch.autograd.grad(output.sum() + h_n.sum(), module.parameters())
        return [output.detach(), h_n.detach(), *gradients]

    compute(lengths)
    # Torch does not count what is done through .data as a change.
    lengths.data.fill_(3)
    torch.testing.assert_close(compute(lengths), compute(lengths.clone()))
    graph, replayed = capture(lambda: compute(lengths))
    for length in (1, 7):
        lengths.data.fill_(length)
        graph.replay()
        torch.testing.assert_close(replayed, compute(lengths.clone()))
