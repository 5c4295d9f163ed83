"""What is computed, and what is right: torch.nn.RNN in float64 of the same weights, run plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from perf.features.attempt import Side, WrongError
from perf.oracle import ALLOWED_ERRORS, ALLOWED_ROUNDINGS

# A module, an input and hx to output and h_n, whatever happens on the way.
Run = Callable[[Any, Any, Any], tuple[Any, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A call of an RNN, small, for it is walked in Triton's interpreter."""

    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "time-major"
    dtype: torch.dtype = torch.float32
    T: int = 4
    B: int = 3
    I: int = 3  # noqa: E741
    H: int = 5

    def module(self, rnn_class: Callable[..., nn.RNNBase], device: str = "cpu") -> nn.RNNBase:
        """A module whose weights are the same for every class, dtype and device."""
        torch.manual_seed(0)
        batch_first = self.layout == "batch-first"
        module = rnn_class(self.I, self.H, batch_first=batch_first, **self.options)
        return module.to(device, self.dtype)

    def tensors(self, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
        """Leaves: what the input is made of, and hx."""
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
        """What the module is called with, made of ``data``."""
        if self.layout != "packed":
            return data
        return pack_padded_sequence(data, self.lengths, enforce_sorted=False)

    @property
    def lengths(self) -> Tensor:
        """Of the sequences that are packed, unsorted and with one of a single step."""
        return torch.tensor([1, self.T, max(1, self.T - 1)])


def plain(output: Any) -> Tensor:
    """The tensor in an output."""
    return output.data if isinstance(output, PackedSequence) else output


def call(module: Any, input: Any, hx: Any) -> tuple[Any, Tensor]:
    """Run plainly."""
    return module(input, hx)


def results(
    problem: Problem, module: nn.Module, run: Run = call, *, device: str = "cpu"
) -> list[Tensor]:
    """Output, ``h_n`` and every gradient, of random weights on both."""
    data, hx = problem.tensors(device)
    output, h_n = run(module, problem.input(data), hx)
    leaves = [data, hx, *(p for p in module.parameters() if p.requires_grad)]
    return [plain(output), h_n, *gradients(leaves, plain(output), h_n)]


def gradients(leaves: Sequence[Tensor], *values: Tensor) -> list[Tensor]:
    """The gradients of random combinations of some values."""
    generator = torch.Generator().manual_seed(2)
    weights = [
        torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        for value in values
    ]
    # Not by torch.autograd.grad, which reentrant checkpoints refuse.
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(values, weights)
    found = []
    for leaf in leaves:
        if leaf.grad is None:
            raise WrongError("a gradient is missing")
        found.append(leaf.grad)
        leaf.grad = None
    return found


def error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of any result, relative to the largest number of its truth."""
    if [value.shape for value in got] != [value.shape for value in truth]:
        return float("inf")
    worst = 0.0
    for value, exact in zip(got, truth):
        difference = (value.detach().cpu().to(exact.dtype) - exact.detach()).abs().max()
        relative = float(difference / exact.detach().abs().max().clamp(min=1e-30))
        # A NaN is as wrong as can be.
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def assert_right(
    got: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
    torchs: Sequence[Tensor] | None = None,
) -> None:
    """Of ``dtype``'s accuracy, or at most twice as far off as torch's own.

    Raises:
        WrongError: farther off.
    """
    # In double precision the truth is no more exact than what it judges.
    roundings = 4 * ALLOWED_ROUNDINGS if dtype == torch.float64 else ALLOWED_ROUNDINGS
    allowed = roundings * torch.finfo(dtype).eps
    if torchs is not None:
        allowed = max(allowed, ALLOWED_ERRORS * error(torchs, truth))
    found = error(got, truth)
    if not found <= allowed:
        raise WrongError(f"off by {found:.1e} of the largest number, where {allowed:.1e} is right")


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bitwise.

    Raises:
        WrongError: they differ.
    """
    if not all(map(torch.equal, got, expected)):
        raise WrongError("not bitwise what it is without")


def exactly(problem: Problem) -> Problem:
    """The same in double precision."""
    wide = torch.complex128 if problem.dtype.is_complex else torch.float64
    return replace(problem, dtype=wide)


def check(side: Side, problem: Problem, run: Run = call) -> None:
    """Run a side's module in some way; its numbers are those of torch.nn.RNN run plainly."""
    got = results(problem, problem.module(side.rnn_class, side.device), run, device=side.device)
    wide = exactly(problem)
    truth = results(wide, wide.module(nn.RNN))
    torchs = results(problem, problem.module(nn.RNN))
    assert_right(got, truth, problem.dtype, torchs)


TWO_LAYERS = {"num_layers": 2}
