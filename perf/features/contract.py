"""Try the contract of torch.nn.RNN: options, layouts, dtypes, determinism, memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from perf.features.attempt import Side, WrongError, feature
from perf.features.problem import (
    TWO_LAYERS,
    Problem,
    Run,
    assert_equal,
    assert_right,
    check,
    exactly,
    results,
)


@feature("tanh and relu, bias or none, layers, both directions, dropout")
def _options(side: Side) -> None:
    check(side, Problem({"nonlinearity": "relu", "bias": False}))
    # With a dropout of 1 the result does not depend on the random mask.
    check(side, Problem({"num_layers": 2, "bidirectional": True, "dropout": 1.0}))


@feature("padded, batch_first, unbatched, `PackedSequence`, `hx`")
def _layouts(side: Side) -> None:
    for layout in ("time-major", "batch-first", "unbatched", "packed"):
        check(side, Problem(layout=layout))


@feature("float32, bfloat16, float16")
def _narrow_dtypes(side: Side) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(side, Problem(dtype=dtype))


@feature("float64, complex numbers")
def _wide_dtypes(side: Side) -> None:
    for dtype in (torch.float64, torch.complex64):
        check(side, Problem(dtype=dtype))


@feature("autocast to bfloat16 and float16, `GradScaler`")
def _autocast(side: Side) -> None:
    problem = Problem(layout="packed")
    for dtype in (torch.bfloat16, torch.float16):

        def run(module: Any, input: Any, hx: Any, dtype: torch.dtype = dtype) -> Any:
            with torch.autocast(hx.device.type, dtype):
                output, h_n = module(input, hx)
            if h_n.dtype != dtype:
                raise WrongError(f"under autocast to {dtype} it returned {h_n.dtype}")
            return output, h_n

        got = results(problem, problem.module(side.rnn_class, side.device), run, device=side.device)
        torchs = results(problem, problem.module(nn.RNN), run)
        assert_right(got, results(*exactly(problem)), dtype, torchs)
        _scaled_steps(side, run)


def _scaled_steps(side: Side, run: Run) -> None:
    """Take a step that overflows, which is skipped, and one that does not."""
    problem = Problem()
    module: Any = problem.module(side.rnn_class, side.device)
    scaler = torch.amp.GradScaler(side.device, init_scale=2.0**10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    states = [module.weight_hh_l0.detach().clone()]
    for factor in (1e38, 1.0):
        optimizer.zero_grad()
        _, h_n = run(module, *problem.tensors(side.device))
        scaler.scale(factor * h_n.float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        states.append(module.weight_hh_l0.detach().clone())
    if not torch.equal(states[0], states[1]) or torch.equal(states[1], states[2]):
        raise WrongError("an overflow was not skipped, or a step was")


@feature("`use_deterministic_algorithms(True)`; gradients bitwise equal from run to run")
def _determinism(side: Side) -> None:
    problem = Problem({"bidirectional": True}, layout="packed")
    module = problem.module(side.rnn_class, side.device)
    first = results(problem, module, device=side.device)
    assert_equal(results(problem, module, device=side.device), first)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(results(problem, module, device=side.device), first)
    finally:
        torch.use_deterministic_algorithms(False)


@feature("training keeps no more than each layer's input and output")
def _memory(side: Side) -> None:
    problem = Problem(TWO_LAYERS, T=24, H=8)
    module = problem.module(side.rnn_class, side.device)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Keep the tensor too, so that no other tensor gets its memory.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    data, hx = problem.tensors(side.device)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module(data, hx)
    elements = problem.T * problem.B * (problem.I + 2 * problem.H) + hx.numel()
    found = sum(nbytes for nbytes, _ in kept.values())
    if found > 4 * elements:
        raise MemoryError(f"kept {found} bytes, where input and outputs are {4 * elements}")
