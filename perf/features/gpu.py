"""Try what only a GPU can show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from perf.features.attempt import NotTriedError, Side, feature
from perf.features.derivatives import check_double_backward
from perf.features.problem import (
    Problem,
    assert_right,
    check,
    exactly,
    gradients,
    plain,
    results,
)


@contextmanager
def _side_stream() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


@feature("CUDA graph capture, forward and backward, padded and packed", needs_gpu=True)
def _cuda_graph(side: Side) -> None:
    for layout in ("time-major", "packed"):
        problem = Problem(layout=layout, dtype=torch.bfloat16, T=9)
        module = problem.module(side.rnn_class, side.device)
        with torch.no_grad():
            data, hx = problem.tensors(side.device)
            packed = problem.input(data)
        # Packing happens on the host, outside the graph, so the static input is the packed data.
        static = plain(packed).detach().requires_grad_()
        input = static if packed is data else PackedSequence(static, *packed[1:])  # type: ignore[index]
        leaves = [static, hx, *module.parameters()]
        with torch.no_grad():
            output, h_n = module(input, hx)
        weights = [torch.ones_like(plain(output)), torch.ones_like(h_n)]

        def compute(
            module: Any = module,
            input: Any = input,
            hx: Tensor = hx,
            leaves: Any = leaves,
            weights: Any = weights,
        ) -> list[Tensor]:
            output, h_n = module(input, hx)
            grads = torch.autograd.grad((plain(output), h_n), leaves, weights)
            return [plain(output).detach(), h_n.detach(), *grads]

        with _side_stream() as stream:
            for _ in range(3):
                compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = compute()
        with torch.no_grad():
            static.copy_(torch.randn_like(static))
        graph.replay()
        torch.cuda.synchronize()
        assert_right(got, [value.cpu().double() for value in compute()], torch.bfloat16)


@feature("work is queued on the current stream", needs_gpu=True)
def _streams(side: Side) -> None:
    problem = Problem(dtype=torch.bfloat16)
    module = problem.module(side.rnn_class, side.device)
    values, hx = problem.tensors(side.device)
    with torch.no_grad():
        truth = [value.cpu().double() for value in module(values, hx)]
        late = torch.full_like(values, torch.nan)
        torch.cuda.synchronize()
        with _side_stream():
            # A kernel that is not queued behind this reads NaN.
            torch.cuda._sleep(200_000_000)
            late.copy_(values)
            got = module(late, hx)
        torch.cuda.synchronize()
    assert_right(got, truth, problem.dtype)


@feature("tensors on a GPU that is not the current one", needs_gpu=True)
def _other_device(side: Side) -> None:
    if torch.cuda.device_count() < 2:
        raise NotTriedError("needs two GPUs")
    check(replace(side, device="cuda:1"), Problem(dtype=torch.bfloat16, layout="packed"))


@feature("double backward on a GPU", needs_gpu=True)
def _double_backward_on_gpu(side: Side) -> None:
    torch_switch: Any = torch.backends.cudnn.rnn
    before = torch_switch.fp32_precision
    torch_switch.fp32_precision = "ieee"
    try:
        check_double_backward(side)
    finally:
        torch_switch.fp32_precision = before


@feature("backward in eval mode on a GPU", needs_gpu=True)
def _eval_mode_on_gpu(side: Side) -> None:
    problem = Problem(dtype=torch.bfloat16)
    check(side, problem, lambda module, input, hx: module.eval()(input, hx))


@feature('`torch.compile(mode="reduce-overhead")`', needs_gpu=True)
def _reduce_overhead(side: Side) -> None:
    torch.compiler.reset()
    problem = Problem(dtype=torch.bfloat16)
    module = problem.module(side.rnn_class, side.device)
    run = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    data, hx = problem.tensors(side.device)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        output, h_n = run(data, hx)
        got = [output, h_n, *gradients([data, hx], output, h_n)]
    got = [value.detach().clone() for value in got]
    wide, wide_module = exactly(problem)
    data, hx = wide.tensors()
    output, h_n = wide_module(data, hx)
    truth = [output, h_n, *gradients([data, hx], output, h_n)]
    torchs = results(problem, problem.module(nn.RNN))[:4]
    assert_right(got, truth, problem.dtype, torchs)
    torch.compiler.reset()


@feature("more than 65,535 steps on a GPU", needs_gpu=True)
def _many_steps(side: Side) -> None:
    problem = Problem(dtype=torch.bfloat16, T=70_000, B=1)
    with torch.no_grad():
        data, hx = problem.tensors(side.device)
        output, _ = problem.module(side.rnn_class, side.device)(data, hx)
        wide, wide_module = exactly(problem)
        truth, _ = wide_module(*wide.tensors())
        torchs, _ = problem.module(nn.RNN)(*problem.tensors())
    assert_right([output], [truth], problem.dtype, [torchs])
