"""Count the floating point operations of the operators, for ``torch.utils.flop_counter``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tritonrnn.layer import split_weights

_COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Register the operators' formulas now, or as soon as the counter's module is imported.

    They can be registered with that module only, and importing it here would import Triton.
    """
    if _COUNTER not in sys.modules:
        sys.meta_path.insert(0, _AfterImport())
        return
    from torch.utils.flop_counter import register_flop_formula

    operators = torch.ops.tritonrnn
    register_flop_formula(operators.elman, get_raw=True)(_count_forward)
    register_flop_formula(operators.elman_backward, get_raw=True)(_count_backward)


class _AfterImport(MetaPathFinder):
    """Call :func:`register` when the counter's module has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _count_forward(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *settings: Any, out_val: Any = None
) -> int:
    """Return the operations of a layer's products: two for each weight and row of the input.

    It is the count of torch.nn.RNN. Padding counts as well.
    """
    rows = input.shape[:-1].numel()
    return 2 * rows * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _count_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    seq_metadata: Tensor | None,
    reset: Tensor | None,
    layout: str,
    *settings: Any,
    out_val: Any = None,
) -> int:
    """Return the operations of the gradients that are wanted, by :func:`tritonrnn.layer.backward`.

    The gradient is taken on to the state before each step, at the first step of a sequence only if
    that of hx is wanted. It is the count of torch.nn.RNN, which drops fewer first steps only where
    it walks a packed batch backwards.
    """
    _, bidirectional, _, (needs_input, needs_hx, *needs_weights), *_ = settings
    rows = input.shape[:-1].numel()
    first_steps = 0 if needs_hx else _num_sequences(input, hx, grad_h_n, seq_metadata, layout)
    groups = split_weights(weights, bidirectional)
    each = len(weights) // len(groups)
    products = 0
    for group, needs_w_ih, needs_w_hh in zip(groups, needs_weights[::each], needs_weights[1::each]):
        products += rows * group.w_ih.numel() * (needs_input + needs_w_ih)
        products += rows * group.w_hh.numel() * (1 + needs_w_hh)
        products -= first_steps * group.w_hh.numel()
    return 2 * products


def _num_sequences(
    input: Tensor,
    hx: Tensor | None,
    grad_h_n: Tensor | None,
    seq_metadata: Tensor | None,
    layout: str,
) -> int:
    """Return B, or 0 where it is a value that a tracer does not see."""
    states = hx if hx is not None else grad_h_n
    if states is not None:
        return states.shape[1]
    if layout in ("time_major", "batch_major"):
        return input.shape[1 if layout == "time_major" else 0]
    assert seq_metadata is not None
    if layout == "jagged":
        return len(seq_metadata) - 1
    return 0 if isinstance(seq_metadata, FakeTensor) else int(seq_metadata[0])
