"""Try a feature on one side of the table, and return the outcome."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

import tritonrnn
from perf.bench.oracle import InaccurateError

TORCH_NN, TORCH_PATH, TRITON_PATH = (
    "`torch.nn.RNN`",
    "`tritonrnn.RNN` on the torch path",
    "on the Triton path",
)


@dataclass(frozen=True)
class Side:
    """Describe a column of the table: which module is tried, and where.

    Attributes:
        column: The header of the column.
        rnn_class: A class with the interface of torch.nn.RNN.
        backend: An argument of ``tritonrnn.backend``.
        device: "cpu" or "cuda".
    """

    column: str
    rnn_class: Callable[..., nn.RNNBase]
    backend: str
    device: str

    @property
    def is_ours(self) -> bool:
        """Return whether the module is tritonrnn's."""
        return self.column != TORCH_NN


@dataclass(frozen=True)
class Outcome:
    """Hold the outcome of a try: a word for the table, and the reason of a failure."""

    word: str
    reason: str = ""


class WrongError(Exception):
    """A result is wrong, and nothing was raised."""


class NotTriedError(Exception):
    """Something that the try needs is not installed."""


@dataclass(frozen=True)
class Feature:
    """Describe a row of the table.

    Attributes:
        wording: The name of the feature in the README.
        probe: Tries the feature. It returns None for "yes", or another word; it raises
            :class:`WrongError`, ``InaccurateError``, :class:`NotTriedError`, or whatever the module
            raises.
        needs_gpu: Whether the probe runs on a GPU, whatever the side's device.
    """

    wording: str
    probe: Callable[[Side], str | None]
    needs_gpu: bool = False

    def attempt(self, side: Side) -> Outcome:
        """Try the feature on one side."""
        if self.needs_gpu and not torch.cuda.is_available():
            return Outcome("not tried: needs a GPU")
        if self.needs_gpu:
            side = Side(side.column, side.rnn_class, side.backend, "cuda")
        try:
            with (
                _quietly(),
                tritonrnn.backend(side.backend),  # type: ignore[arg-type]
                _kernel_launches(side) as launches,
            ):
                word = self.probe(side)
        except (WrongError, InaccurateError) as error:
            return Outcome("silently wrong", str(error))
        except NotTriedError as error:
            return Outcome(f"not tried: {error}")
        except Exception as error:
            text = " ".join(str(error).split()) or "no message"
            return Outcome("no", f"{type(error).__name__}: {_shortened(text)}")
        if word is None and side.column == TRITON_PATH and not launches.called:
            word = "yes, on torch"
        return Outcome(word or "yes")


def _shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence compilers and exporters; the message of a failure is in its exception too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _kernel_launches(side: Side) -> Iterator[mock.Mock]:
    """Record the launches of kernels."""
    if side.column != TRITON_PATH:
        yield mock.Mock()
        return
    from tritonrnn.kernels import launch

    with mock.patch.object(launch, "recurrence", wraps=launch.recurrence) as launches:
        yield launches


def sides() -> dict[str, Side]:
    """Return the columns. The first two are tried on the CPU, but for rows that need a GPU."""
    kernel_device = "cuda" if torch.cuda.is_available() else "cpu"
    every = [
        Side(TORCH_NN, nn.RNN, "auto", "cpu"),
        Side(TORCH_PATH, tritonrnn.RNN, "torch", "cpu"),
        # "auto", so that calls which the kernels don't serve go to torch, as they do for a user.
        Side(TRITON_PATH, tritonrnn.RNN, "auto", kernel_device),
    ]
    return {side.column: side for side in every}


FEATURES: list[Feature] = []

Probe = Callable[[Side], str | None]


def feature(wording: str, *, needs_gpu: bool = False) -> Callable[[Probe], Probe]:
    """Add a row to the table: a probe, and its name in the README."""

    def add(probe: Probe) -> Probe:
        FEATURES.append(Feature(wording, probe, needs_gpu))
        return probe

    return add
