"""DistributedDataParallel and FSDP2 train to the weights that one process trains to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perf.bench.distributed import Tagger, Training, train, train_in_two
from perf.bench.oracle import assert_as_accurate

pytestmark = pytest.mark.slow

WAYS = ("DistributedDataParallel", "fully_shard")
ON_TORCH = [Training(way) for way in WAYS]
# In the interpreter, which does not run where there is a GPU.
ON_TRITON = [Training(way, dtype="float32", backend="triton") for way in WAYS]
UNKNOWN = Training("DistributedDataParallel", rnn="none")

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run natively here, not on the CPU"
)


@pytest.fixture(scope="module")
def together():
    """Return the weights that each training ends with; the two processes are started once."""
    kernels = [] if torch.cuda.is_available() else ON_TRITON
    return train_in_two([*ON_TORCH, *kernels, UNKNOWN])


def alone(training: Training) -> list[torch.Tensor]:
    return train(replace(training, way="alone"), rank=None)


@pytest.mark.parametrize("training", ON_TORCH, ids=lambda training: training.way)
def test_two_processes_train_to_the_weights_of_one(training, together):
    torch.manual_seed(0)
    start = list(Tagger(torch.nn.RNN).double().parameters())
    for module in ("torch.nn.RNN", "tritonrnn.RNN"):
        expected = alone(replace(training, rnn=module))
        torch.testing.assert_close(together[training], expected, rtol=1e-12, atol=1e-14)
    assert not any(map(torch.equal, start, together[training]))


@interpreted
@pytest.mark.parametrize("training", ON_TRITON, ids=lambda training: training.way)
def test_two_processes_train_through_the_kernels(training, together):
    theirs = replace(training, rnn="torch.nn.RNN")
    got, expected, truth = (
        [torch.cat([weight.flatten() for weight in weights])]
        for weights in (
            together[training],
            alone(theirs),
            alone(replace(theirs, dtype="float64")),
        )
    )
    assert_as_accurate(got, expected, truth)


def test_error_of_a_training_is_returned(together):
    assert together[UNKNOWN] == "KeyError: 'none'"


def test_processes_that_take_too_long_are_ended():
    with pytest.raises(RuntimeError, match="did not finish in 0 s"):
        train_in_two(ON_TORCH, limit_s=0)
