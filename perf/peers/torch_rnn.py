"""Run torch.nn.RNN: at its default, a second time for the noise, and without cuDNN."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from torch import nn

from perf.bench.cases import Case, Workload, make_cell
from perf.bench.switches import cudnn_off
from perf.peers.peer import Peer, Runner


class NN(Peer):
    """Run ``torch.nn.RNN``, or a loop of ``torch.nn.RNNCell``.

    Args:
        name: The name of the peer.
        on: "cpu" or "cuda", or "" for both.
        cudnn: Whether cuDNN stays switched on.
    """

    def __init__(self, name: str, on: str = "", *, cudnn: bool = True) -> None:
        self.name = name
        self._on = on
        self._context = nullcontext if cudnn else cudnn_off

    def supports(self, case: Case) -> str | None:
        """Return None on its device, for all but nested tensors."""
        if not case.device.startswith(self._on):
            return (
                "on a GPU nn.RNN is nn_cudnn or nn_no_cudnn" if case.on_gpu else "cuDNN is a GPU's"
            )
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
