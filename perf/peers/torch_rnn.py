"""torch.nn.RNN: as it comes, once more for the noise, and without cuDNN."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from perf.cases import Case, Workload
from perf.peers.peer import Peer, Runner, jagged
from perf.switches import cudnn_off


class NNCudnn(Peer):
    """``torch.nn.RNN`` at its default on a GPU."""

    name = "nn_cudnn"

    def supports(self, case: Case) -> str | None:
        """Return None on a GPU."""
        return jagged(case) if case.on_gpu else "cuDNN needs a GPU"

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Take the module as it is."""
        return Runner(
            lambda tokens: workload.run(module, tokens),
            list(module.parameters()),
            context=self.context,
        )

    def context(self) -> AbstractContextManager[object]:
        """Return the switches that a call is made under."""
        return nullcontext()


class NNAten(NNCudnn):
    """``torch.nn.RNN`` at its default on a CPU."""

    name = "nn_aten"

    def supports(self, case: Case) -> str | None:
        """Return None on a CPU."""
        return "on a GPU nn.RNN is cuDNN's, or nn_native" if case.on_gpu else jagged(case)


class NNAgain(NNCudnn):
    """``torch.nn.RNN`` a second time: what it gains on itself is the noise."""

    name = "nn_again"

    def supports(self, case: Case) -> str | None:
        """Return None wherever ``nn.RNN`` runs."""
        return jagged(case)


class NNNative(NNCudnn):
    """``torch.nn.RNN`` on a GPU with cuDNN switched off."""

    name = "nn_native"

    def supports(self, case: Case) -> str | None:
        """Return None on a GPU."""
        return jagged(case) if case.on_gpu else "on a CPU nn.RNN has no cuDNN to switch off"

    def context(self) -> AbstractContextManager[object]:
        """Return the switch."""
        return cudnn_off()
