"""What was derived from tensors, remembered for as long as they live unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

Derived = TypeVar("Derived")


class Memo(Generic[Derived]):
    """One derived value for each tensor, the last one.

    What is derived may not refer to the tensor, a view of it included, or neither is ever freed.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(
        self,
        tensors: Sequence[Tensor],
        parameters: Hashable,
        derive: Callable[[], Derived],
    ) -> Derived:
        """``derive()``, or what it gave for these very tensors and parameters before.

        Parameters say how many tensors there are.
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
    """What a tensor held: on the CPU its numbers, which NumPy may change as well; else a version.

    To read numbers on a GPU is to wait for it. What is derived there is derived on a stream, and
    on no other may it be read without waiting.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.numbers: list[int] | Tensor | None = None
        if tensor.device.type != "cpu":
            self.tensor = WeakIdRef(tensor)
            self.version = _version(tensor)
        elif tensor.dim() == 1:
            # The numbers of a batch's sequences or steps are few: lists are quicker.
            self.numbers = tensor.tolist()
        else:
            self.numbers = tensor.detach().clone()

    def still_holds(self, tensor: Tensor) -> bool:
        if self.numbers is None:
            return self.tensor() is tensor and self.version == _version(tensor)
        if isinstance(self.numbers, list):
            return tensor.dim() == 1 and self.numbers == tensor.tolist()
        return torch.equal(self.numbers, tensor)


def _version(tensor: Tensor) -> Hashable:
    stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
    return tensor._version, stream


def _can_be_watched(tensor: Tensor) -> bool:
    """Whether a change of the tensor would be seen.

    Not while a CUDA graph is captured: the graph is to derive anew what it reads in each replay,
    and what it derives lies in its own memory.
    """
    if tensor.device.type == "cpu":
        return True
    if tensor.is_inference():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
