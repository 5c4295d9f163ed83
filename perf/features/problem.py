"""Define the small problems that features are tried on, and check results against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from perf.bench import oracle
from perf.features.attempt import Side, WrongError

# From a module, an input and hx to output and h_n, in the way that a feature is about.
Run = Callable[[Any, Any, Any], tuple[Any, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Describe a call of an RNN, small enough for Triton's interpreter."""

    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "time-major"
    dtype: torch.dtype = torch.float32
    T: int = 4
    B: int = 3
    I: int = 3  # noqa: E741
    H: int = 5

    def module(self, rnn_class: Callable[..., nn.RNNBase], device: str = "cpu") -> nn.RNNBase:
        """Return a module whose weights are the same for every class, dtype and device."""
        torch.manual_seed(0)
        batch_first = self.layout == "batch-first"
        module = rnn_class(self.I, self.H, batch_first=batch_first, **self.options)
        return module.to(device, self.dtype)

    def tensors(self, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
        """Return two leaves: the data of the input, and hx."""
        generator = torch.Generator().manual_seed(seed)
        L = self.options.get("num_layers", 1) * (2 if self.options.get("bidirectional") else 1)
        shape: tuple[int, ...] = (self.T, self.B, self.I)
        state: tuple[int, ...] = (L, self.B, self.H)
        if self.layout == "batch-first":
            shape = (self.B, self.T, self.I)
        elif self.layout == "unbatched":
            shape, state = (self.T, self.I), (L, self.H)
        kind = torch.complex128 if self.dtype.is_complex else torch.float64
        return tuple(
            torch.randn(size, generator=generator, dtype=kind)
            .to(device, self.dtype)
            .requires_grad_()
            for size in (shape, state)
        )  # type: ignore[return-value]

    def input(self, data: Tensor) -> Tensor | PackedSequence:
        """Return the input of the module, made of ``data``."""
        if self.layout != "packed":
            return data
        return pack_padded_sequence(data, self.lengths, enforce_sorted=False)

    @property
    def lengths(self) -> Tensor:
        """Return the lengths of a packed batch: unsorted, and one of a single step."""
        return torch.tensor([1, self.T, max(1, self.T - 1)])


def plain(output: Any) -> Tensor:
    """Return the tensor in an output."""
    return output.data if isinstance(output, PackedSequence) else output


def call(module: Any, input: Any, hx: Any) -> tuple[Any, Tensor]:
    """Call a module."""
    return module(input, hx)


def results(
    problem: Problem, module: nn.Module, run: Run = call, *, device: str = "cpu"
) -> list[Tensor]:
    """Return output, ``h_n`` and every gradient, for random cotangents of both."""
    data, hx = problem.tensors(device)
    output, h_n = run(module, problem.input(data), hx)
    leaves = [data, hx, *(p for p in module.parameters() if p.requires_grad)]
    return [plain(output), h_n, *gradients(leaves, plain(output), h_n)]


def gradients(leaves: Sequence[Tensor], *values: Tensor) -> list[Tensor]:
    """Return the gradients of the leaves for random cotangents of some values."""
    generator = torch.Generator().manual_seed(2)
    cotangents = [
        torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        for value in values
    ]
    # Not by torch.autograd.grad, which reentrant checkpoints refuse.
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(values, cotangents)
    found = []
    for leaf in leaves:
        if leaf.grad is None:
            raise WrongError("a gradient is missing")
        found.append(leaf.grad)
        leaf.grad = None
    return found


def assert_right(
    got: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
    torchs: Sequence[Tensor] | None = None,
) -> None:
    """Check each result by :func:`perf.bench.oracle.assert_as_accurate`.

    Raises:
        InaccurateError: a result is too far off.
    """
    for index, (one, exact) in enumerate(zip(got, truth, strict=True)):
        reference = None if torchs is None else [torchs[index]]
        oracle.assert_as_accurate([one], reference, [exact], f"result {index}", dtype)


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that results are bitwise equal.

    Raises:
        WrongError: they differ.
    """
    if not all(map(torch.equal, got, expected)):
        raise WrongError("not bitwise equal")


def exactly(problem: Problem) -> tuple[Problem, nn.RNN]:
    """Return the same problem in double precision, and the oracle for it."""
    wide = torch.complex128 if problem.dtype.is_complex else torch.float64
    problem = replace(problem, dtype=wide)
    module = problem.module(oracle.RNN)
    assert isinstance(module, oracle.RNN)
    return problem, module


def check(side: Side, problem: Problem, run: Run = call) -> None:
    """Run a side's module in some way, and check its results and gradients."""
    got = results(problem, problem.module(side.rnn_class, side.device), run, device=side.device)
    torchs = results(problem, problem.module(nn.RNN))
    assert_right(got, results(*exactly(problem)), problem.dtype, torchs)


TWO_LAYERS = {"num_layers": 2}
