"""A model whose arguments are all tensors, as an export with dynamic sizes needs it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import tritonrnn
from tests.support.cases import Case, plain


class Model(nn.Module):
    """An RNN with a head, which builds its packed input from tensors."""

    def __init__(self, case: Case, module_class: type[nn.Module] = tritonrnn.RNN):
        super().__init__()
        self.rnn = case.module(module_class)
        self.head = nn.Linear(case.D * case.H, 3).to(case.device, case.dtype)
        self.case = case

    def forward(self, *tensors):
        data, *packing, hx = tensors if self.case.hx else (*tensors, None)
        output, h_n = self.rnn(PackedSequence(data, *packing) if packing else data, hx)
        return self.head(plain(output)), h_n


def arguments_of(case: Case) -> tuple[torch.Tensor, ...]:
    data, hx = case.tensors()
    packing = case.input(data)[1:] if case.is_packed else ()
    return tuple(x.detach() for x in (data, *packing, hx) if x is not None)


def dynamic_shapes_of(case: Case) -> tuple[tuple[dict, ...]]:
    """Return the dynamic sizes: all of the input but its features."""
    T, B, N = (torch.export.Dim(name) for name in "TBN")
    padded = {"time-major": {0: T, 1: B}, "batch-first": {0: B, 1: T}, "unbatched": {0: T}}
    packing = {"packed": [{0: T}], "unsorted": [{0: T}, {0: B}, {0: B}]}
    batch = {} if case.layout == "unbatched" else {1: B}
    data = padded.get(case.layout, {0: N})
    return ((data, *packing.get(case.layout, []), *[batch] * case.hx),)
