"""torch's global switches, set without disturbing each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from perf.cases import Case


def set_precision(case: Case) -> None:
    """Give all products of fp32, of every peer, the precision of the case."""
    if case.on_gpu and case.dtype == "fp32":
        torch.backends.cudnn.rnn.fp32_precision = case.fp32_mode  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = case.fp32_mode


@contextmanager
def cudnn_off() -> Iterator[None]:
    """Run torch's own kernels inside.

    ``torch.backends.cudnn.flags`` would read and set the precision of fp32 as well, by a name that
    raises once :func:`set_precision` has used the newer one; and ``torch.backends.cudnn.enabled``
    can't be set where torch's own test utilities were imported.
    """
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)
