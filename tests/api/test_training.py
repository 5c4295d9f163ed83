"""Trained a few steps, a model with our RNN has the weights of the same model with torch.nn.RNN.

On the torch path, and through the kernels: on a GPU where there is one, else in Triton's
interpreter, hence small. Weights are held against torch.nn.RNN trained in float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.support.cases import DTYPE_NAMES, Case, assert_same_results, plain, run, with_gradients
from tests.support.implementations import implementations
from tests.support.oracle import assert_as_accurate

# In the interpreter NumPy warns where IEEE arithmetic is meant to give infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

STEPS = 2
SMALLEST = Case(T=2, B=2, I=3, H=5, L=2, device="cuda" if torch.cuda.is_available() else "cpu")
# Several draws for each path, where they are cheap: in one, rounding may favour either side.
CASES = {
    "torch": [Case(T=6, B=4, I=4, H=7, L=2, D=2, seed=seed) for seed in (0, 10, 20)],
    "triton": [SMALLEST],
}


@pytest.fixture
def cases(implementation):
    """Return the cases of an implementation; those of torch.nn.RNN are those of the torch path."""
    return CASES["triton" if implementation.name == "triton" else "torch"]


def as_they_are(module):
    pass


def weight_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")


def weight_norm_by_a_hook(module):
    nn.utils.weight_norm(module, "weight_hh_l0")


def spectral_norm(module):
    torch.manual_seed(5)
    parametrizations.spectral_norm(module, "weight_hh_l1")


def spectral_norm_by_a_hook(module):
    torch.manual_seed(5)
    nn.utils.spectral_norm(module, "weight_hh_l1")


def orthogonal(module):
    parametrizations.orthogonal(module, "weight_hh_l0", orthogonal_map="cayley")


class Bounded(nn.Module):
    def forward(self, weight):
        return 0.5 * torch.tanh(weight)


def bounded(module):
    parametrize.register_parametrization(module, "weight_hh_l0", Bounded())
    parametrize.register_parametrization(module, "weight_ih_l1", Bounded())


def prune_half(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def tie(module):
    module.weight_hh_l1 = module.weight_hh_l0
    module.bias_hh_l0 = module.bias_ih_l0


def freeze(module):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("l0" not in name)


CHANGES = [
    as_they_are,
    weight_norm,
    weight_norm_by_a_hook,
    spectral_norm,
    spectral_norm_by_a_hook,
    orthogonal,
    bounded,
    prune_half,
    tie,
    freeze,
]


def loss_of(case: Case, module: nn.Module, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the loss of the seed's batch, with random weights on output and final state."""
    data, hx = (x.detach().to(dtype) for x in replace(case, seed=case.seed + seed).tensors(1.0))
    # A parametrised weight is computed once a step, however often a module accesses it.
    with parametrize.cached():
        output, h_n = module(case.input(data), hx)
    weight, other = case.cotangents(plain(output), h_n)
    return (plain(output) * weight).mean() + (h_n * other).mean()


def weights_of(module: nn.Module) -> torch.Tensor:
    """Return all parameters as one vector: errors of the smallest alone are random."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def trained(case: Case, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    # In training each access changes a spectral norm, and torch.nn.RNN accesses it when converted.
    module = module.eval().to(dtype).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(case, module, step, dtype).backward()
        optimizer.step()
    return module


def changed(case: Case, module_class: type[nn.Module], change) -> nn.Module:
    module = case.module(module_class)
    change(module)
    return module


# Through the kernels: weights that are computed at each step, shared, masked or frozen.
FEWER = [as_they_are, weight_norm, bounded, prune_half, tie, freeze]


@pytest.mark.feature(
    "weights tied, frozen, pruned, parametrised (weight_norm, spectral_norm, your own)"
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@implementations("change", nn=CHANGES, torch=CHANGES, triton=FEWER)
def test_trained_weights_agree_with_torchs(change, cases, implementation):
    got, expected, truth = (
        [trained(case, changed(case, module_class, change), dtype) for case in cases]
        for module_class, dtype in (
            (implementation.rnn, torch.float32),
            (nn.RNN, torch.float32),
            (nn.RNN, torch.float64),
        )
    )
    assert_as_accurate(
        *([weights_of(module) for module in modules] for modules in (got, expected, truth))
    )
    before = changed(cases[0], implementation.rnn, change)
    for start, end in zip(before.parameters(), got[0].parameters()):
        assert torch.equal(start, end) == (not start.requires_grad)


@pytest.mark.feature("autocast to bfloat16 and float16, `GradScaler`")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get)
def test_scaled_training_skips_an_overflow_as_torch_does(dtype, cases, implementation):
    """Under autocast with a GradScaler; the second of four steps overflows."""

    def scaled(case: Case, module: nn.Module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(case.device, init_scale=2.0**10, growth_interval=2)
        scales, after = [], []
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast(case.device, dtype):
                loss = loss_of(case, module, step, torch.float32)
            scaler.scale(loss * 1e38 if step == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            after.append(weights_of(module))
        assert torch.equal(after[1], after[0])
        assert (after[2] != after[1]).all()
        assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**10]
        return after[-1]

    def without_scaler(case: Case):
        module = case.module().double()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for step in (0, 2, 3):
            optimizer.zero_grad()
            loss_of(case, module, step, torch.float64).backward()
            optimizer.step()
        return weights_of(module)

    got, expected = (
        [scaled(case, case.module(module_class)) for case in cases]
        for module_class in (implementation.rnn, nn.RNN)
    )
    truth = [without_scaler(case) for case in cases]
    assert_as_accurate(got, expected, truth)


LAYOUTS = ["time-major", "batch-first", "unsorted"]


def ragged(case: Case, layout: str) -> Case:
    """Return a case of the same path with longer sums, whose order could vary."""
    if case is SMALLEST:
        return replace(case, D=2, L=1, layout=layout)
    return replace(case, T=40, B=9, I=33, H=64, layout=layout)


@pytest.mark.feature(
    "`use_deterministic_algorithms(True)`; gradients bitwise equal from run to run"
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_bitwise_equal_from_run_to_run(layout, cases, implementation):
    case = ragged(cases[0], layout)
    module = case.module(implementation.rnn)
    first, *others = (run(case, module, *case.tensors()) for _ in range(3))
    for other in others:
        assert_same_results(other, first, rtol=0, atol=0)


@pytest.mark.feature(
    "`use_deterministic_algorithms(True)`; gradients bitwise equal from run to run"
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_algorithms_hold_and_change_nothing(
    layout, cases, monkeypatch, implementation
):
    # Without it cuBLAS refuses, on a GPU.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    case = ragged(cases[0], layout)
    module = case.module(implementation.rnn)
    data, hx = case.tensors()
    expected = run(case, module, data, hx)
    torch.use_deterministic_algorithms(True)
    try:
        # Memory that is not written to is NaN meanwhile.
        assert torch.utils.deterministic.fill_uninitialized_memory
        output, h_n = module(case.input(data), hx)
        got = with_gradients(case, module, data, hx, plain(output), h_n)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_results(got, expected, rtol=0, atol=0)
