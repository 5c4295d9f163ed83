"""What a test of a feature runs on: torch.nn.RNN, and ours on either path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn

import tritonrnn
from tests.support.cases import Case


@dataclass(frozen=True)
class Implementation:
    """A column of the table of features: ``nn``, ``torch`` or ``triton``."""

    name: str
    device: str = "cpu"

    @property
    def rnn(self) -> type[nn.RNNBase]:
        return nn.RNN if self.name == "nn" else tritonrnn.RNN

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype that it serves."""
        return torch.float32 if self.name == "triton" else torch.float64

    @property
    def tolerance(self) -> dict[str, float]:
        """Of results in ``dtype``: on a GPU, products in float32 may round to TF32."""
        return {"rtol": 1e-3, "atol": 1e-4} if self.name == "triton" else {}

    def of(self, case: Case) -> Case:
        """Return the case on this device, in float32 instead of float64 for the kernels."""
        dtype = self.dtype if case.dtype == torch.float64 else case.dtype
        return replace(case, device=self.device, dtype=dtype)


def slow(*values: object) -> ParameterSet:
    """Return values of :func:`implementations` that are not in the quick subset."""
    return pytest.param(*values, marks=pytest.mark.slow)


def implementations(names: str, **values: Iterable) -> pytest.MarkDecorator:
    """Parametrise a test with implementations, and with values of its own for each."""
    several = "," in names
    chosen = [(name, value) for name, of_name in values.items() for value in of_name]
    return pytest.mark.parametrize(
        f"implementation,{names}",
        [
            pytest.param(name, *value.values, marks=value.marks)
            if isinstance(value, ParameterSet)
            else (name, *(value if several else [value]))
            for name, value in chosen
        ],
        indirect=["implementation"],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )


# A test under it proves two rows: what it is about, and the same "on a GPU".
here_and_on_gpu = pytest.mark.parametrize(
    "where", ["here", pytest.param("on-gpu", marks=pytest.mark.gpu)]
)
