"""Check results against torch.nn.RNN in float64.

A result may be off by twice the error of torch.nn.RNN at the precision of the case. That error is
measured beside it, whichever peers are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from perf.bench.cases import DTYPES, Case, Workload
from perf.bench.failures import raise_if_gpu_is_lost
from perf.bench.timing import make_job
from perf.peers.peer import Runner

ALLOWED_ERRORS = 2.0
# Roundings that are allowed where torch.nn.RNN is exact by chance, or can't run the case.
ALLOWED_ROUNDINGS = 8


class Check:
    """Judge the results of one case, of an input and cotangents drawn on the CPU in float32."""

    def __init__(self, case: Case, drawn: Workload, seed: int) -> None:
        self._case, self._drawn, self._seed = case, drawn, seed
        # Of inference, and of training.
        self._exact = cache(partial(self._nn_results, torch.float64))
        self.tolerance = cache(self._tolerance)

    def error(self, results: Sequence[Tensor], trains: bool) -> float:
        """Return the largest relative error of results, in training with all gradients."""
        return max_relative_error(results, self._exact(trains))

    def _tolerance(self, trains: bool) -> float:
        """Return the largest error that is right."""
        exact, least = self._exact(trains), ALLOWED_ROUNDINGS * self._case.eps
        try:
            results = self._nn_results(DTYPES[self._case.dtype], trains)
        except Exception as exception:
            raise_if_gpu_is_lost(exception)
            return least
        return max(ALLOWED_ERRORS * max_relative_error(results, exact), least)

    def _nn_results(self, dtype: torch.dtype, trains: bool) -> list[Tensor]:
        """Return the results of torch.nn.RNN in some dtype.

        The inputs and weights have the values that a peer gets: rounded to the dtype of the case.
        """
        case, rounded = self._case, DTYPES[self._case.dtype]
        module = case.make_module(self._seed).to(rounded).to(case.device, dtype)
        workload = self._drawn.to(case.device, rounded).to(case.device, dtype)
        # A jagged batch is packed, because nn.RNN takes no nested tensor.
        forward = partial(workload.run_packed, module)
        return results_of(Runner(forward, list(module.parameters())), workload, trains)


def results_of(runner: Runner, workload: Workload, trains: bool) -> list[Tensor]:
    """Run a peer once; return the output, ``h_n``, and in training the gradients."""
    job = make_job(runner, workload, "fwdbwd" if trains else "infer")
    results: Any = job.call()
    # Every parameter of an RNN contributes to its output.
    gradients = [leaf.grad for leaf in job.leaves if leaf.grad is not None]
    job.reset()
    return [*(result.detach().clone() for result in results), *gradients]


def max_relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error of any element, relative to the largest element of its tensor.

    One wrong element among millions shows in it. A NaN, or another shape, is an infinite error.
    """
    if [tensor.shape for tensor in results] != [tensor.shape for tensor in exact]:
        return float("inf")
    errors = [
        (result.double() - truth).abs().max() / truth.abs().max()
        for result, truth in zip(results, exact)
    ]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())
