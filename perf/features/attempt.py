"""A feature, a column and what comes of trying the one on the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

import tritonrnn

TORCH_NN, TORCH_PATH, TRITON_PATH = (
    "`torch.nn.RNN`",
    "`tritonrnn.RNN` on the torch path",
    "on the Triton path",
)


@dataclass(frozen=True)
class Side:
    """Whose features are tried, and where.

    Attributes:
        column: of the table.
        rnn_class: a module of torch.nn's interface.
        backend: of ``tritonrnn.backend``.
        device: "cpu" or "cuda".
    """

    column: str
    rnn_class: Callable[..., nn.RNNBase]
    backend: str
    device: str

    @property
    def is_ours(self) -> bool:
        """Whether this is tritonrnn's."""
        return self.column != TORCH_NN


@dataclass(frozen=True)
class Outcome:
    """What came of a try: a word for the table, and of a failure the reason."""

    word: str
    reason: str = ""


class WrongError(Exception):
    """Numbers are wrong, and nothing was raised."""


class NotTriedError(Exception):
    """What the try needs is not here."""


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        wording: as the README has it.
        probe: tries it. It returns None for "yes", or another word; it raises
            :class:`WrongError`, :class:`NotTriedError`, or whatever the module raises.
        needs_gpu: whether the probe runs on a GPU, whatever the side's device.
    """

    wording: str
    probe: Callable[[Side], str | None]
    needs_gpu: bool = False

    def attempt(self, side: Side) -> Outcome:
        """Try it on one side."""
        if self.needs_gpu and not torch.cuda.is_available():
            return Outcome("not tried: needs a GPU")
        if self.needs_gpu:
            side = Side(side.column, side.rnn_class, side.backend, "cuda")
        try:
            with (
                warnings.catch_warnings(),
                tritonrnn.backend(side.backend),  # type: ignore[arg-type]
                _kernel_launches(side) as launches,
            ):
                warnings.simplefilter("ignore")
                word = self.probe(side)
        except WrongError as error:
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
def _kernel_launches(side: Side) -> Iterator[mock.Mock]:
    """Record what is launched through the kernels' one entrance."""
    if side.column != TRITON_PATH:
        yield mock.Mock()
        return
    from tritonrnn.kernels import launch

    with mock.patch.object(launch, "recurrence", wraps=launch.recurrence) as launches:
        yield launches


def sides() -> dict[str, Side]:
    """The columns. Of the rows that need no GPU, the first two are tried on the CPU."""
    native = "cuda" if torch.cuda.is_available() else "cpu"
    every = [
        Side(TORCH_NN, nn.RNN, "auto", "cpu"),
        Side(TORCH_PATH, tritonrnn.RNN, "torch", "cpu"),
        # What the kernels don't serve goes to torch, as it does for a user.
        Side(TRITON_PATH, tritonrnn.RNN, "auto", native),
    ]
    return {side.column: side for side in every}


FEATURES: list[Feature] = []

Probe = Callable[[Side], str | None]


def feature(wording: str, *, needs_gpu: bool = False) -> Callable[[Probe], Probe]:
    """Add a row to the table: the probe, in the README's words."""

    def add(probe: Probe) -> Probe:
        FEATURES.append(Feature(wording, probe, needs_gpu))
        return probe

    return add
