"""What is measured: sizes of an RNN, and inputs and gradients to run it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Case:
    """An RNN and the size of its input: T steps, B sequences, I inputs, H hidden units."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int
    directions: int

    @property
    def case_id(self) -> str:
        """The sizes, readable: ``T100-B1-I32-H32-L1-D1``."""
        return f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.layers}-D{self.directions}"

    def make_module(self, rnn_class: Callable[..., nn.RNNBase], seed: int) -> nn.RNNBase:
        """Return an RNN with torch's own initial weights."""
        torch.manual_seed(seed)
        return rnn_class(self.I, self.H, self.layers, bidirectional=self.directions == 2)

    def packed_lengths(self) -> list[int]:
        """Return the lengths of a packed batch: linear from T down to T/4, one sequence T."""
        return torch.linspace(self.T, self.T / 4, self.B).round().int().tolist()


@dataclass(frozen=True)
class Workload:
    """An input, and the gradients that come back to both results.

    Attributes:
        tokens: The input, or the rows of a packed one.
        batch_sizes: Of a packed input.
        output_grad: Gradient of a loss by the output, or by its rows.
        h_n_grad: Gradient of the loss by ``h_n``.
    """

    tokens: Tensor
    batch_sizes: Tensor | None
    output_grad: Tensor
    h_n_grad: Tensor

    @classmethod
    def make(cls, case: Case, *, packed: bool, seed: int) -> Workload:
        """Draw normal random numbers for everything, in float32."""
        generator = torch.Generator().manual_seed(seed)
        rows: tuple[int, ...] = (case.T, case.B)
        batch_sizes = None
        if packed:
            lengths = torch.tensor(case.packed_lengths())
            batch_sizes = (lengths > torch.arange(case.T).unsqueeze(1)).sum(1)
            rows = (int(lengths.sum()),)
        return cls(
            torch.randn(*rows, case.I, generator=generator),
            batch_sizes,
            torch.randn(*rows, case.directions * case.H, generator=generator),
            torch.randn(case.layers * case.directions, case.B, case.H, generator=generator),
        )

    def to(self, dtype: torch.dtype) -> Workload:
        """Return the same numbers in ``dtype``."""
        return Workload(
            self.tokens.to(dtype),
            self.batch_sizes,
            self.output_grad.to(dtype),
            self.h_n_grad.to(dtype),
        )

    def infer(self, module: nn.RNNBase) -> tuple[Tensor, Tensor]:
        """Return the output, or its rows, and ``h_n``, with no gradient to come."""
        with torch.no_grad():
            return self._forward(module, self.tokens)

    def train(self, module: nn.RNNBase, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run forward and backward, as :meth:`infer` but leaving gradients behind.

        Args:
            module: The RNN; its parameters get gradients.
            tokens: Of this workload, requiring a gradient as inside a model.
        """
        results = self._forward(module, tokens)
        torch.autograd.backward(results, (self.output_grad, self.h_n_grad))
        return results

    def _forward(self, module: nn.RNNBase, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.batch_sizes is None:
            return module(tokens)
        output, h_n = module(PackedSequence(tokens, self.batch_sizes))
        return output.data, h_n
