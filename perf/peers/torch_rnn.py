"""Run torch.nn.RNN: at its default, a second time for the noise, and without cuDNN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from perf.bench.cases import Case, Workload, make_cell
from perf.peers.peer import Context, Peer, Runner


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


class NN(Peer):
    """Run ``torch.nn.RNN``, or a loop of ``torch.nn.RNNCell``.

    Args:
        name: The name of the peer.
        on: "cpu" or "cuda", or "" for both.
        context: Switches that are set during the calls.
    """

    def __init__(self, name: str, on: str = "", context: Context = nullcontext) -> None:
        self.name, self._on, self._context = name, on, context

    def supports(self, case: Case) -> str | None:
        """Return None on its device, for all but nested tensors."""
        if not case.device.startswith(self._on):
            return f"it runs on {self._on}"
        return "it takes no nested tensors" if case.layout == "jagged" else None

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Take the module as it is; of a batch with lengths, pack the input and pad the output."""
        if case.layout == "cell":
            forward = partial(workload.run_cell, make_cell(module))
        elif case.layout == "lengths":
            forward = partial(workload.run_packed, module)
        else:
            forward = partial(workload.run, module)
        return Runner(forward, list(module.parameters()), context=self._context)
