"""Which back end serves a call, and in one sentence why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]

_chosen: ContextVar[Backend | None] = ContextVar("tritonrnn_backend", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the back end of every call made inside, in this thread or task only.

    A call keeps the back end of its forward pass for its backward pass, wherever that runs. The
    environment variable ``TRITONRNN_BACKEND`` names the one to use outside of any such context.

    Args:
        name: "triton", the kernels; "torch", the torch path on any device; "auto", the default,
            the kernels for whatever they serve well and torch for the rest.

    Raises:
        ValueError: ``name`` is none of the three.
        RuntimeError: from a call inside which the named back end can't serve.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> Backend:
    """The back end asked for here: by the nearest context, else by the environment."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _checked(os.environ.get("TRITONRNN_BACKEND") or "auto", "TRITONRNN_BACKEND")


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{source}: expected one of {get_args(Backend)}, got {name!r}")
    return name  # type: ignore[return-value]


@dataclass(frozen=True)
class Choice:
    """What serves a call.

    Attributes:
        backend: "triton" or "torch".
        plan: how. On torch: "walk", an operator a layer that walks in place; "recorded", every
            step recorded by autograd; "native", ``torch.rnn_tanh`` and ``rnn_relu`` (cuDNN on
            CUDA).
        reason: why, in one sentence.
    """

    backend: Literal["triton", "torch"]
    plan: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype, *, single_step: bool) -> Choice:
    """Choose for a call of this device and dtype, in the context that it is made in.

    Raises:
        RuntimeError: the back end asked for can't serve the call.
    """
    asked = current_backend()
    obstacle = _obstacle(device)
    if asked == "triton":
        raise RuntimeError(f"the triton back end can't serve this call: {obstacle}")
    recorded = _why_recorded(dtype)
    if recorded:
        return Choice("torch", "recorded", recorded)
    reason = "the torch back end was asked for." if asked == "torch" else obstacle
    # torch's own kernels are as good as any where there is no walk, and on CUDA they are cuDNN.
    return Choice("torch", "native" if single_step or device.type == "cuda" else "walk", reason)


def _obstacle(device: torch.device) -> str:
    return "this version has no Triton kernel yet."


def _why_recorded(dtype: torch.dtype) -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, which needs every step recorded."
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is active, which needs every step recorded."
    if dtype.is_complex:
        return f"{dtype} is differentiated by torch, step by step."
    return None
