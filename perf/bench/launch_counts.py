"""Run ``python -m perf launches``: count what a layer launches on a GPU that need not be there.

A GPU is fed by the host, which takes some 5 us for each device operation. So a short walk costs
what is launched around it.

Tensors here pass for a GPU's. The layer runs as it would there, one operation of torch after the
other, but for the recurrence itself, of which only the launch is counted. Each operation counts as
many kernels, copies and fills as torch launches for it on CUDA; a view, or memory without a value,
counts nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from tritonrnn import memo, ops
from tritonrnn.kernels import launch
from tritonrnn.kernels.cost import rank_plans
from tritonrnn.kernels.devices import DEVICES
from tritonrnn.kernels.plan import Problem

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
T, B, I, H = 4, 3, 8, 16  # noqa: E741
LENGTHS = (2, 4, 1)
# What describes the sequences: the operator's layout, seq_metadata, and whether a GPU holds that.
LAYOUTS: dict[str, tuple[str, tuple[int, ...] | None, bool]] = {
    "time-major": ("time_major", None, False),
    "batch-first": ("batch_major", None, False),
    "packed": ("packed", (3, 2, 1, 1), False),
    "lengths on the GPU": ("time_major", LENGTHS, True),
    "lengths on the GPU, batch-first": ("batch_major", LENGTHS, True),
    "lengths on the CPU": ("time_major", LENGTHS, False),
    "jagged": ("jagged", (0, 2, 6, 7), True),
    "reset": ("time_major", None, False),
}

# torch's source has what CUDA executes for an operation. All others are one kernel, copy or fill:
# also a product, a concatenation of up to 128 tensors, and a sum that one block a column makes.
_SEVERAL = {
    # A copy, which is then filled.
    "masked_fill.Scalar": 2,
    # A count, a prefix sum, a copy of its end to the host, the indices.
    "nonzero.default": 4,
}
# What torch has on CUDA only.
_CUDA_ONLY = {"bmm.dtype": lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype))}
_ALLOCATES = ("empty.", "new_empty.", "empty_like.", "empty_strided.")


class _OnGPU(Tensor):
    """A tensor on the CPU that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = GPU
    is_cuda = True
    is_cpu = False


class _Operations(TorchDispatchMode):
    """List the operations that run on the GPU, each as often as it launches something there."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        # Whether an operation without arguments there runs there.
        self.makes_on_gpu = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func).removeprefix("aten."), kwargs or {}
        with self:
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        if name.startswith("is_pinned"):
            return True
        result = _CUDA_ONLY.get(name, func)(*args, **kwargs)
        runs_on_gpu = tree_any(lambda value: isinstance(value, _OnGPU), (args, kwargs))
        if not runs_on_gpu and not self.makes_on_gpu:
            return result
        returns = [one.alias_info for one in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if not is_view and not name.startswith(_ALLOCATES):
            self.launches += [name] * _SEVERAL.get(name, 1)
        if func._schema.is_mutable and result is not None:
            return kwargs.get("out", args[0])
        return tree_map(on_gpu, result)


class _Devices(TorchFunctionMode):
    """Have torch make on the CPU what it is told to make on the GPU."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(x is GPU for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: CPU if x is GPU else x, (args, kwargs))
        if func is Tensor.to and args[0].is_cpu:
            # From the CPU to the GPU it is a copy always.
            func, args, kwargs = Tensor.clone, args[:1], {}
        self.operations.makes_on_gpu = True
        try:
            return func(*args, **kwargs)
        finally:
            self.operations.makes_on_gpu = False


def on_gpu(value: Any) -> Any:
    """Return a tensor that passes for a GPU's, or anything else as it is."""
    return value.as_subclass(_OnGPU) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """List the launches of what runs inside, on tensors that pass for a GPU's."""
    operations = _Operations()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **arguments: operations.launches.append("kernel")

    with (
        mock.patch.multiple(
            launch, kernel_of=lambda plan: Kernel(), device_of=lambda device: DEVICES["sm_90"]
        ),
        mock.patch.multiple(
            torch.cuda,
            device=lambda device: contextlib.nullcontext(),
            current_device=lambda: 0,
            current_stream=lambda device=None: 0,
            is_current_stream_capturing=lambda: False,
        ),
        # What is kept for a device.
        mock.patch.dict(ops._unused),
        torch.no_grad(),
        operations,
        _Devices(operations),
    ):
        yield operations.launches


def launches(layout: str, hx: bool, D: int) -> dict[str, list[str]]:
    """Return what one layer launches, by pass, in batches of new lengths and of those seen before.

    In bfloat16, by the plan that comes first. Biases are there, and all weights and both results
    have a gradient; the input and hx have none.
    """
    kind, values, is_on_gpu = LAYOUTS[layout]
    shape = {"time_major": (T, B), "batch_major": (B, T)}.get(kind, (sum(LENGTHS),))

    def zeros(*shape: int) -> Tensor:
        return on_gpu(torch.zeros(shape, dtype=torch.bfloat16))

    metadata = None if values is None else torch.tensor(values)
    if is_on_gpu:
        metadata = on_gpu(metadata)
    reset = on_gpu(torch.eye(T, B, dtype=torch.bool)) if layout == "reset" else None
    weights = [zeros(*shape) for shape in ((H, I), (H, H), (H,), (H,))] * D
    state = zeros(D, B, H) if hx else None
    found = {}
    plan = rank_plans(Problem(T, B, D, H, "bf16"), DEVICES["sm_90"], training=True)[0]
    settings: Any = kind, "tanh", D == 2, f"triton:{plan.name}"
    needs = [False, False] + [True] * len(weights)
    with counting() as listed:
        # A call takes the copies once, and all its layers and both its passes share them.
        described = [None if given is None else memo.take(given) for given in (metadata, reset)]
        for lengths in ("new", "seen"):
            sources: Any = zeros(*shape, I), state, weights
            call: Any = *sources, *described, *settings, True
            output, h_n, *_ = ops._elman_kernel(*call)
            found[f"forward, {lengths}"] = [*listed]
            listed.clear()
            call = output, h_n, *sources, output, *described, *settings, needs
            ops._elman_backward_kernel(*call)
            found[f"backward, {lengths}"] = [*listed]
            listed.clear()
    return found


def table() -> pd.DataFrame:
    """Return a row for every layout and number of directions, without hx and with it."""
    return pd.DataFrame(
        [
            {"layout": layout, "D": D, "hx": hx}
            | {name: len(found) for name, found in launches(layout, hx, D).items()}
            for layout, D, hx in product(LAYOUTS, (1, 2), (False, True))
        ]
    )
