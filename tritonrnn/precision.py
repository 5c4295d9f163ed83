"""fp32 products follow torch's switch for RNNs, and no other.

``torch.backends.cudnn.rnn.fp32_precision`` is "tf32" by default: on CUDA ``torch.nn.RNN`` rounds
the operands of its products to TF32, and so does whatever replaces it. "ieee", or TF32 switched
off for all of cuDNN, asks for products of full accuracy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def rounds_to_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the products of a layer of this device and dtype may be TF32."""
    if device.type != "cuda" or dtype != torch.float32:
        return False
    switch: Any = torch.backends.cudnn.rnn
    return switch.fp32_precision == "tf32"


_lock = threading.Lock()
_users = 0
_before = "none"


@contextmanager
def products_as_in_rnn(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make torch's own matrix products follow the switch for RNNs, as they do inside cuDNN.

    They follow one of their own otherwise. It is the process's: products that another thread
    launches meanwhile follow it as well, and concurrent users of this are counted, for the last
    one out to put back what the first one in found.
    """
    global _users, _before
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    switch: Any = torch.backends.cuda.matmul
    with _lock:
        if _users == 0:
            _before = switch.fp32_precision
            # What is read is what holds. Where that comes from the switch for everything, it is
            # to come from there again.
            if _before == torch.backends.fp32_precision:  # type: ignore[attr-defined]
                _before = "none"
            switch.fp32_precision = "tf32" if rounds_to_tf32(device, dtype) else "ieee"
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                switch.fp32_precision = _before
