"""Set torch's global switches without disturbing each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from perf.bench.cases import Case


def set_precision(case: Case) -> None:
    """Set the precision of all fp32 products, of every peer, to that of the case."""
    if case.on_gpu and case.dtype == "fp32":
        torch.backends.cudnn.rnn.fp32_precision = case.fp32_mode  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = case.fp32_mode


@contextmanager
def cudnn_off() -> Iterator[None]:
    """Switch cuDNN off inside, so that ATen's own kernels run.

    ``torch.backends.cudnn.flags`` would also read and set the precision of fp32, by an older name
    that raises after :func:`set_precision`; and ``torch.backends.cudnn.enabled`` can't be set after
    torch's own test utilities were imported.
    """
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)
