"""Try ragged batches beyond PackedSequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from perf.features.attempt import Side, WrongError, feature
from perf.features.problem import Problem, assert_right, exactly, gradients

LENGTHS = (4, 1, 3)


def _each_sequence(
    problem: Problem, data: Tensor, hx: Tensor, lengths: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Return the oracle's outputs of every sequence by itself, and all final states."""
    _, module = exactly(problem)
    outputs, finals = [], []
    for b, length in enumerate(lengths):
        if length:
            output, h_n = module(data[:length, b], hx[:, b])
        else:
            output, h_n = data.new_zeros(0, problem.H), hx[:, b]
        outputs.append(output)
        finals.append(h_n)
    return outputs, torch.stack(finals, 1)


def _check_ragged(side: Side, lengths: Sequence[int], run: Callable[..., Any]) -> None:
    """Check what ``run(module, data, hx)`` returns: each sequence's outputs, and ``h_n``."""
    problem = Problem()
    module = problem.module(side.rnn_class, side.device)

    def everything(data: Tensor, hx: Tensor, outputs: list[Tensor], h_n: Tensor) -> list[Tensor]:
        values = [*(output for output in outputs if len(output)), h_n]
        return [*values, *gradients([data, hx], *values)]

    data, hx = problem.tensors(side.device)
    got = everything(data, hx, *run(module, data, hx))
    data, hx = exactly(problem)[0].tensors()
    truth = everything(data, hx, *_each_sequence(problem, data, hx, lengths))
    assert_right(got, truth, problem.dtype)


@feature("jagged nested tensors")
def _jagged(side: Side) -> None:
    def run(module: Any, data: Tensor, hx: Tensor) -> tuple[list[Tensor], Tensor]:
        sequences = [data[:length, b] for b, length in enumerate(LENGTHS)]
        nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        output, h_n = module(nested, hx)
        return list(output.unbind()), h_n

    _check_ragged(side, LENGTHS, run)


@feature("`lengths=` of a padded batch, zeros allowed")
def _with_lengths(side: Side) -> None:
    lengths = (4, 0, 3)

    def run(module: Any, data: Tensor, hx: Tensor) -> tuple[list[Tensor], Tensor]:
        output, h_n = module(data, hx, lengths=torch.tensor(lengths, device=data.device))
        for b, length in enumerate(lengths):
            if output[length:, b].any():
                raise WrongError("an output past the end of its sequence is not zero")
        return [output[:length, b] for b, length in enumerate(lengths)], h_n

    _check_ragged(side, lengths, run)


@feature("`reset=`: the state put back to zero before a step")
def _with_reset(side: Side) -> None:
    problem = Problem()
    reset = torch.zeros(problem.T, problem.B, dtype=torch.bool)
    reset[2, 0] = reset[0, 1] = True

    def truth_of(module: Any, data: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        states, outputs = hx, []
        for step, begins in zip(data, reset):
            states = torch.where(begins[None, :, None], torch.zeros_like(states), states)
            output, states = module(step[None], states)
            outputs.append(output)
        return torch.cat(outputs), states

    data, hx = problem.tensors(side.device)
    module: Any = problem.module(side.rnn_class, side.device)
    output, h_n = module(data, hx, reset=reset.to(side.device))
    got = [output, h_n, *gradients([data, hx], output, h_n)]
    wide, wide_module = exactly(problem)
    data, hx = wide.tensors()
    output, h_n = truth_of(wide_module, data, hx)
    assert_right(got, [output, h_n, *gradients([data, hx], output, h_n)], problem.dtype)


@feature("refuses an `hx` that is too large for an unsorted packed input")
def _oversized_hx(side: Side) -> str:
    problem = Problem(layout="packed")
    data, _ = problem.tensors(side.device)
    hx = torch.zeros(1, problem.B + 1, problem.H, device=side.device)
    return _refusal(side, problem.input(data), hx)


@feature("refuses a `PackedSequence` of surplus rows, or with a 0 in `batch_sizes`")
def _senseless_packed(side: Side) -> str:
    data = torch.zeros(4, 3, device=side.device)
    for sizes in ([2, 1], [3, 1, 0]):
        word = _refusal(side, PackedSequence(data, torch.tensor(sizes)), None)
    return word


def _refusal(side: Side, input: Any, hx: Tensor | None) -> str:
    module = Problem().module(side.rnn_class, side.device)
    try:
        module(input, hx)
    except (RuntimeError, ValueError):
        return "yes"
    raise WrongError("it computed something")
