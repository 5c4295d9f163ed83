"""Try weights that were changed after the module was made."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from perf.features.attempt import Side, feature
from perf.features.problem import Problem, assert_right, exactly, results


def _weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module, "weight_hh_l0")


def _spectral_norm(module: nn.Module) -> None:
    torch.manual_seed(3)
    parametrizations.spectral_norm(module, "weight_hh_l0")
    # In training mode, each access of the weight changes it.
    module.eval()


class _Bounded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * torch.tanh(weight)


def _own_parametrisation(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight_hh_l0", _Bounded())


def _prune(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def _tie(module: nn.Module) -> None:
    module.bias_hh_l0 = module.bias_ih_l0


def _freeze(module: nn.Module) -> None:
    module.weight_ih_l0.requires_grad_(False)


@feature("weights tied, frozen, pruned, parametrised (weight_norm, spectral_norm, your own)")
def _changed_weights(side: Side) -> None:
    problem = Problem()
    for change in (_weight_norm, _spectral_norm, _own_parametrisation, _prune, _tie, _freeze):
        # The weights are changed in torch.nn.RNN too, whose results in float64 are the truth.
        outcomes = []
        for rnn_class, dtype in ((side.rnn_class, problem.dtype), (nn.RNN, torch.float64)):
            module = problem.module(rnn_class)
            change(module)
            device = side.device if rnn_class is side.rnn_class else "cpu"
            same = replace(problem, dtype=dtype)
            outcomes.append(results(same, module.to(device, dtype), device=device))
        got, truth = outcomes
        assert_right(got, truth, problem.dtype)
        # Those are held against the oracle with the weights that the change should result in.
        wide, meant = exactly(problem)
        with torch.no_grad():
            for name, parameter in meant.named_parameters():
                parameter.copy_(getattr(module, name))
        assert_right(got[:2], results(wide, meant)[:2], problem.dtype)


@feature("weights swapped: `swap_tensors`, `load_state_dict` with swapping set")
def _swapped_weights(side: Side) -> None:
    problem = Problem()
    wide, other = exactly(problem)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    truth = results(wide, other)

    def swap(module: nn.Module) -> None:
        for mine, its in zip(list(module.parameters()), other.parameters()):
            torch.utils.swap_tensors(mine, nn.Parameter(its.detach().to(mine)))

    def load(module: nn.Module) -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            module.load_state_dict(other.state_dict())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    for change in (swap, load):
        module = problem.module(side.rnn_class, side.device)
        module(*problem.tensors(side.device))
        change(module)
        assert_right(results(problem, module, device=side.device), truth, problem.dtype)
