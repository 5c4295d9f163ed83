"""Copies of the tensors that describe sequences, and what is derived from each copy once.

NumPy, another process, a kernel or a graph that is replayed may write to a caller's tensor at any
time, unnoticed by torch. So a call takes a copy, and reads nothing but that: its forward and its
backward pass see the same values. (Only torch's own kernels on a CPU need none: their backward pass
reads no sizes.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class _ByTensor(Generic[Value]):
    """Values by the identity of a tensor, each for as long as the tensor lives.

    ``torch.utils.weak.WeakIdKeyDictionary`` is the same, but takes three times as long.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        entry = self._entries.get(id(tensor))
        return None if entry is None or entry[0]() is not tensor else entry[1]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)

        def forget(dead: weakref.ref[Tensor]) -> None:
            if key in self._entries and self._entries[key][0] is dead:
                del self._entries[key]

        self._entries[key] = weakref.ref(tensor, forget), value


class _Copy:
    """What is known of a copy: the last value derived from it, and what else that depends on."""

    # Replaced as one, because threads share it.
    derived: tuple[Any, Any] = None, None


# Copies that nobody else can change, because nobody else has them.
_copies: _ByTensor[_Copy] = _ByTensor()
# The copy that was taken last of a caller's tensor.
_last_copy: _ByTensor[Tensor] = _ByTensor()


def take(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor of sizes or marks, or the tensor itself if it is such a copy.

    On the CPU it is the copy that was taken before if that has the same values, so that calls share
    what is derived from it. On a GPU to compare them would be to wait.

    A tracer's tensor is returned as it is: the operator takes its copy when it runs.
    """
    if _copies.get(tensor) is not None or is_traced(tensor):
        return tensor
    # A copy that is made inside of a transform belongs to that.
    if not tensor.is_cpu or torch._C._are_functorch_transforms_active():
        return _copy(tensor)
    last = _last_copy.get(tensor)
    if last is None or last.dtype != tensor.dtype or not torch.equal(last, tensor):
        last = _copy(tensor)
        _last_copy[tensor] = last
    return last


def take_anew(tensor: Tensor) -> Tensor:
    """Return a copy for a compiled program to own. :func:`take` of it copies no more than needed.

    The program may write something else to its memory once it is done with the copy, which is
    noticed on the CPU.
    """
    if not tensor.is_cpu:
        return _copy(tensor)
    last = take(tensor)
    copy = last.clone()
    _last_copy[copy] = last
    return copy


def is_traced(tensor: Tensor) -> bool:
    """Return whether a tracer has the tensor in place of one with values, or records its uses."""
    return (
        type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or torch._C._get_tracing_state() is not None
    )


def _copy(tensor: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():
        # Autograd saves no tensor of inference mode, and a later call may be recorded.
        with torch.inference_mode(False):
            return _copy(tensor)
    copy = tensor.clone()
    _copies[copy] = _Copy()
    return copy


def derive_once(
    tensors: Sequence[Tensor], parameters: Hashable, derive: Callable[..., Value]
) -> Value:
    """Return ``derive(*copies)``, or what it returned before for the same copies and parameters.

    Args:
        tensors: one or more, of which copies are taken. Equal parameters must imply equally many.
        parameters: what else the value depends on.
        derive: computes the value. It must not refer to the copies or to views of them, or they are
            never freed.
    """
    known = [_copies.get(tensor) for tensor in tensors]
    if None in known:
        tensors = [take(tensor) for tensor in tensors]
        known = [_copies.get(tensor) for tensor in tensors]
    on_gpu = [tensor.device for tensor in tensors if tensor.is_cuda]
    # Each replay of a graph must derive its values anew, in the graph's own memory.
    if None in known or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return derive(*tensors)
    first, *others = known
    assert first is not None
    # What was derived on one stream must not be read on another without waiting.
    key = parameters, [torch.cuda.current_stream(device) for device in on_gpu], others
    found, value = first.derived
    if found != key:
        value = derive(*tensors)
        first.derived = key, value
    return value
