"""Arguments of the registered operators, for a case of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

import tritonrnn
from tests.support.cases import Case

LAYOUTS = {
    "time_major": "time-major",
    "batch_major": "batch-first",
    "packed": "packed",
    "jagged": "time-major",
}


@dataclass(frozen=True)
class OperatorCall:
    """A call of ``torch.ops.tritonrnn.elman.with_reserve``, and the cotangents of its results."""

    layout: str
    case: Case
    backend: str = "torch"
    lengths: bool = False
    reset: bool = False

    def __str__(self) -> str:
        ragged = "-lengths" * self.lengths + "-reset" * self.reset
        return f"{self.layout}-{self.in_layout}{ragged}-{self.backend}"

    @property
    def in_layout(self) -> Case:
        return replace(self.case, layout=LAYOUTS[self.layout])

    def place(self, tensor: Tensor) -> Tensor:
        """Return a time-major tensor in the layout of the input."""
        return tensor.t() if self.layout == "batch_major" else tensor

    def forward(self, requires_grad: bool = False) -> tuple:
        """Return the arguments of ``elman.with_reserve``."""
        case = self.in_layout
        data, hx = case.tensors(1.0)
        module = case.module(tritonrnn.RNN)
        tensors = [data, hx, *module.parameters()]
        data, hx, *weights = (
            None if x is None else x.detach().requires_grad_(requires_grad) for x in tensors
        )
        seq_metadata = case.input(data).batch_sizes if case.is_packed else None
        if self.layout == "jagged":
            lengths = torch.linspace(case.T, 1, case.B).long().roll(2).tolist()
            seq_metadata = torch.tensor(list(accumulate(lengths, initial=0)))
            data = data.detach().flatten(0, 1)[: sum(lengths)].requires_grad_(requires_grad)
        reset = None
        t, b = torch.arange(case.T)[:, None], torch.arange(case.B)
        if self.lengths:
            seq_metadata = b % (case.T + 1)
            padding = self.place(t >= seq_metadata)[..., None].to(case.device)
            data = data.detach().masked_fill(padding, torch.nan).requires_grad_(requires_grad)
        if self.reset:
            reset = self.place((t + b) % 3 == 0).to(case.device)
        settings = (self.layout, case.nonlinearity, case.D == 2, self.backend, True)
        return (data, hx, weights, seq_metadata, reset, *settings)

    def backward(self, with_grads: tuple[bool, bool] = (True, True)) -> tuple:
        """Return the arguments of ``elman_backward``, every gradient wanted."""
        data, hx, weights, *settings, needs_grad = self.forward()
        with torch.no_grad():
            output, h_n, *reserve = torch.ops.tritonrnn.elman.with_reserve(
                data, hx, weights, *settings, needs_grad
            )
        grads: list[Tensor | None] = [
            grad if given else None
            for grad, given in zip(self.case.cotangents(output, h_n), with_grads)
        ]
        needs = [True, hx is not None, *[True] * len(weights)]
        return (*grads, data, hx, weights, output, *settings, needs, *reserve)
