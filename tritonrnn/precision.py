"""The accuracy of fp32 products on CUDA: it follows torch's switch for RNNs, and no other.

``torch.backends.cudnn.rnn.fp32_precision`` is "tf32" by default: ``torch.nn.RNN`` rounds the
operands of its products to TF32, and so does this package. With "ieee", or with TF32 switched off
for all of cuDNN, products have full accuracy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def rounds_to_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the products of a layer of this device and dtype may use TF32."""
    if device.type != "cuda" or dtype != torch.float32:
        return False
    switch: Any = torch.backends.cudnn.rnn
    return switch.fp32_precision == "tf32"


_lock = threading.Lock()
_users = 0
_before = "none"


@contextmanager
def products_as_in_rnn(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make torch's matrix products follow the switch for RNNs, as they do inside cuDNN.

    torch has another switch for matrix products, which this sets. It is the process's, so products
    that another thread launches meanwhile follow it as well. Concurrent users are counted: the
    first one remembers the setting, and the last one restores it.
    """
    global _users, _before
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    switch: Any = torch.backends.cuda.matmul
    with _lock:
        if _users == 0:
            _before = switch.fp32_precision
            # torch returns the value in force, also where it comes from the switch for
            # everything. It must follow that switch again afterwards, by the value "none".
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
