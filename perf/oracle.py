"""What is right: a run in float64, and how far from it a result may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perf.cases import DTYPES, Case, Workload
from perf.peers.peer import Runner
from perf.switches import cudnn_off

# A result may be off by twice the error of nn.RNN, or by rounding where nn.RNN happens to be exact.
ALLOWED_ERRORS = 2.0
ALLOWED_ROUNDINGS = 8
TF32_EPS = 2.0**-10


def results_of(runner: Runner, workload: Workload, *, trains: bool) -> list[Tensor]:
    """Return all that a run computes: output, ``h_n``, and in training the gradients."""
    if not trains:
        with torch.no_grad():
            return list(runner.forward(workload.tokens))
    tokens = workload.tokens.detach().clone().requires_grad_()
    leaves = (tokens, *runner.parameters)
    results = runner.forward(tokens)
    torch.autograd.backward(results, (workload.output_grad, workload.h_n_grad))
    # Every parameter of an RNN has a part in its output.
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    return [*(result.detach().clone() for result in results), *gradients]


def exact_results(case: Case, workload: Workload, seed: int, *, trains: bool) -> list[Tensor]:
    """Run ``nn.RNN`` in float64 by torch's own kernels, on the device of the case.

    Args:
        case: What to run.
        workload: In float32 on the CPU.
        seed: Of the weights.
        trains: Whether gradients are wanted.

    The numbers are those that a peer gets: rounded to the dtype of the case first.
    """
    with cudnn_off():
        return nn_results(case, workload, seed, torch.float64, trains=trains)


def nn_results(
    case: Case, workload: Workload, seed: int, dtype: torch.dtype, *, trains: bool
) -> list[Tensor]:
    """Run ``nn.RNN`` in a dtype of its own on the numbers of a case; see :func:`exact_results`."""
    module = case.make_module(nn.RNN, seed).to(DTYPES[case.dtype]).to(case.device, dtype)
    rounded = workload.to(case.device, DTYPES[case.dtype]).to(case.device, dtype)
    # A jagged batch is packed for it, as nn.RNN takes no nested tensor.
    runner = Runner(lambda tokens: rounded.run_packed(module, tokens), list(module.parameters()))
    return results_of(runner, rounded, trains=trains)


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error of any result, each relative to its own largest number."""
    if [tensor.shape for tensor in results] != [tensor.shape for tensor in exact]:
        return float("inf")
    errors = [
        (result.double() - truth).abs().max() / truth.abs().max()
        for result, truth in zip(results, exact)
    ]
    error = float(torch.stack(errors).max())
    # A NaN is as wrong as can be, and compares as such.
    return error if error == error else float("inf")


def tolerance(case: Case, reference_error: float | None) -> float:
    """Return how large an error is right.

    Args:
        case: For its precision.
        reference_error: Of ``nn.RNN`` at the same precision, if it ran.
    """
    tf32 = case.dtype == "fp32" and case.fp32_mode == "tf32"
    rounding = TF32_EPS if tf32 else torch.finfo(DTYPES[case.dtype]).eps
    least = ALLOWED_ROUNDINGS * rounding
    return least if reference_error is None else max(ALLOWED_ERRORS * reference_error, least)
