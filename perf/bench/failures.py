"""Tell apart the ways in which a peer fails: out of memory, unsupported, an error, a lost GPU."""

from __future__ import annotations

import torch

Row = dict[str, object]


def failure(exception: BaseException) -> Row:
    """Return the columns of a row for an exception."""
    # The CPU's memory is no OutOfMemoryError of torch's.
    is_memory = isinstance(exception, (torch.OutOfMemoryError, MemoryError))
    if is_memory or "can't allocate memory" in str(exception):
        status = "oom"
    elif isinstance(exception, NotImplementedError):
        status = "unsupported"
    else:
        status = "error"
    return {"status": status, "error": f"{type(exception).__name__}: {first_line(exception)}"}


def first_line(exception: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(exception).strip().splitlines()), "")[:300]


def raise_if_gpu_is_lost(exception: BaseException) -> None:
    """Raise an exception again if this process can't use the GPU any more.

    The GPU is asked, because the exception does not show it: torch raises the same one for an
    illegal access, after which the context is lost, and for a call that a CUDA graph can't capture,
    after which it is not. Triton raises exceptions of its own.
    """
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            raise exception from None
