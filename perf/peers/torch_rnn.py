"""Run torch.nn.RNN: at its default, a second time for the noise, and without cuDNN."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from perf.bench.cases import Case, Workload
from perf.bench.switches import cudnn_off
from perf.peers.peer import Peer, Runner, jagged


class NNCudnn(Peer):
    """Run ``torch.nn.RNN`` at its default on a GPU."""

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
        """Return the switches that are set during the calls."""
        return nullcontext()


class NNAten(NNCudnn):
    """Run ``torch.nn.RNN`` at its default on a CPU."""

    name = "nn_aten"

    def supports(self, case: Case) -> str | None:
        """Return None on a CPU."""
        return "on a GPU nn.RNN is nn_cudnn or nn_no_cudnn" if case.on_gpu else jagged(case)


class NNAgain(NNCudnn):
    """Run ``torch.nn.RNN`` a second time: its speedup over itself is the noise."""

    name = "nn_again"

    def supports(self, case: Case) -> str | None:
        """Return None wherever ``nn.RNN`` runs."""
        return jagged(case)


class NNNoCudnn(NNCudnn):
    """Run ``torch.nn.RNN`` on a GPU with cuDNN switched off."""

    name = "nn_no_cudnn"

    def supports(self, case: Case) -> str | None:
        """Return None on a GPU."""
        return jagged(case) if case.on_gpu else "on a CPU nn.RNN has no cuDNN to switch off"

    def context(self) -> AbstractContextManager[object]:
        """Return the switch."""
        return cudnn_off()
