"""A cache of values derived from tensors, each valid while its tensors live unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

Derived = TypeVar("Derived")


class Memo(Generic[Derived]):
    """The last value that was derived from each tensor.

    The value must not refer to the tensor or to a view of it, or neither is ever freed.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(
        self,
        tensors: Sequence[Tensor],
        parameters: Hashable,
        derive: Callable[[], Derived],
    ) -> Derived:
        """Return ``derive()``, or what it returned before for the same tensors and parameters.

        Args:
            tensors: one or more. Equal parameters must imply equally many.
            parameters: what else the value depends on.
            derive: computes the value.
        """
        if not all(_can_be_watched(tensor) for tensor in tensors):
            return derive()
        entry = self._entries.get(tensors[0])
        if entry is not None:
            known, snapshots, derived = entry
            if known == parameters and all(
                snapshot.still_holds(tensor) for snapshot, tensor in zip(snapshots, tensors)
            ):
                return derived
        derived = derive()
        snapshots = [_Snapshot(tensor) for tensor in tensors]
        self._entries[tensors[0]] = parameters, snapshots, derived
        return derived


class _Snapshot:
    """What a tensor held.

    On the CPU these are its values, because NumPy can change them without torch's knowledge.
    Reading values on a GPU would wait for it, so there it is the tensor's version and the current
    stream: what was derived on one stream must not be read on another without waiting.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.values: list[int] | Tensor | None = None
        if tensor.device.type != "cpu":
            self.tensor = WeakIdRef(tensor)
            self.version = _version(tensor)
        elif tensor.dim() == 1:
            # One value a sequence or a step: few enough that a list is faster.
            self.values = tensor.tolist()
        else:
            self.values = tensor.detach().clone()

    def still_holds(self, tensor: Tensor) -> bool:
        if self.values is None:
            return self.tensor() is tensor and self.version == _version(tensor)
        if isinstance(self.values, list):
            return tensor.dim() == 1 and self.values == tensor.tolist()
        return torch.equal(self.values, tensor)


def _version(tensor: Tensor) -> Hashable:
    stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
    return tensor._version, stream


def _can_be_watched(tensor: Tensor) -> bool:
    """Return whether a change of the tensor would be noticed.

    While a CUDA graph is captured it would not: each replay must derive its values anew, in the
    graph's own memory.
    """
    if tensor.device.type == "cpu":
        return True
    if tensor.is_inference():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
