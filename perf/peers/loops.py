"""Run the RNN written out: as a Python loop, compiled, and captured in CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perf.bench.cases import Case, Workload
from perf.peers.peer import Peer, Runner

# torch.compile unrolls the loop; with more steps it takes minutes.
MOST_COMPILED_STEPS = 64


class Loop(Peer):
    """Run a Python loop of ``addmm`` and the nonlinearity."""

    name = "loop"

    def supports(self, case: Case) -> str | None:
        """Return None for a padded batch."""
        return None if case.layout == "padded" else "a loop over a padded batch takes no ragged one"

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Write the loop out around the module's weights."""
        return Runner(WrittenOut(module, case), list(module.parameters()))


class CompiledLoop(Loop):
    """Run the loop under ``torch.compile``."""

    name = "loop_compiled"

    def supports(self, case: Case) -> str | None:
        """Return None for a few steps."""
        if case.T * case.layers * case.directions > MOST_COMPILED_STEPS:
            return f"torch.compile unrolls the loop: not over {MOST_COMPILED_STEPS} steps in all"
        return super().supports(case)

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Compile at the first call, which is timed by itself."""
        loop: Any = torch.compile(WrittenOut(module, case), fullgraph=True, dynamic=False)
        return Runner(loop, list(module.parameters()))


class GraphedLoop(Loop):
    """Replay a CUDA graph of the loop's forward pass, and one of its backward pass."""

    name = "loop_graphed"

    def supports(self, case: Case) -> str | None:
        """Return None on a GPU."""
        return super().supports(case) if case.on_gpu else "CUDA graphs need a GPU"

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Capture both graphs."""
        loop = WrittenOut(module, case)
        sample = workload.tokens.detach().clone().requires_grad_()
        # Capturing replaces the forward of the module, so it gets a module of its own.
        graphed: Any = torch.cuda.make_graphed_callables(WrittenOut(module, case), (sample,))
        return Runner(
            graphed,
            list(module.parameters()),
            uncaptured=loop,
            no_graph="it replays some of its own",
        )


class WrittenOut(nn.Module):
    """Run the layers and directions of an ``nn.RNN`` of a case's sizes, step after step."""

    def __init__(self, module: nn.RNNBase, case: Case) -> None:
        super().__init__()
        # Not the module itself: torch.compile refuses an nn.RNN, even one that only holds weights.
        self.weights = nn.ParameterList(module.parameters())
        self.phi = torch.tanh if case.nonlinearity == "tanh" else torch.relu
        self.layers, self.directions = case.layers, case.directions

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output ``(T, B, D * H)`` and ``h_n``."""
        finals = []
        weights = list(self.weights)
        for _ in range(self.layers):
            outputs = []
            for backwards in (False, True)[: self.directions]:
                w_ih, w_hh, b_ih, b_hh = weights[:4]
                weights = weights[4:]
                drive = functional.linear(tokens, w_ih, b_ih + b_hh).unbind(0)
                state = tokens.new_zeros(tokens.shape[1], w_hh.shape[0])
                states = []
                for step in reversed(drive) if backwards else drive:
                    state = self.phi(torch.addmm(step, state, w_hh.t()))
                    states.append(state)
                finals.append(state)
                outputs.append(torch.stack(states[::-1] if backwards else states))
            tokens = outputs[0] if self.directions == 1 else torch.cat(outputs, 2)
        return tokens, torch.stack(finals)
