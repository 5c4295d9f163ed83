"""DistributedDataParallel and FSDP2 train to the weights that one process trains to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.distributed import Tagger, Training, train, train_in_two
from tests.support.implementations import implementations
from tests.support.oracle import assert_as_accurate

pytestmark = pytest.mark.slow

WAYS = ("DistributedDataParallel", "fully_shard")
TRAININGS = {
    "nn": [Training(way, rnn="torch.nn.RNN") for way in WAYS],
    "torch": [Training(way) for way in WAYS],
    # In the interpreter, which does not run where there is a GPU.
    "triton": [Training(way, dtype="float32", backend="triton") for way in WAYS],
}
UNKNOWN = Training("DistributedDataParallel", rnn="none")


@pytest.fixture(scope="module")
def together():
    """Return the weights that each training ends with; the two processes are started once."""
    names = ("nn", "torch") if torch.cuda.is_available() else TRAININGS
    return train_in_two([*(one for name in names for one in TRAININGS[name]), UNKNOWN])


@pytest.mark.feature("`DistributedDataParallel`, FSDP2 (`fully_shard`)")
@implementations("training", **TRAININGS)
def test_two_processes_train_to_the_weights_of_one(training, together, implementation):
    if implementation.device == "cuda":
        pytest.skip("needs a GPU for each process")
    alone = Training("alone", "torch.nn.RNN", training.dtype)
    got, expected, truth = (
        [torch.cat([weight.flatten() for weight in weights])]
        for weights in (
            together[training],
            train(alone, rank=None),
            train(replace(alone, dtype="float64"), rank=None),
        )
    )
    assert_as_accurate(got, expected, truth)
    torch.manual_seed(0)
    start = Tagger(torch.nn.RNN).to(got[0].dtype).parameters()
    assert not any(map(torch.equal, start, together[training]))


def test_error_of_a_training_is_returned(together):
    assert together[UNKNOWN] == "KeyError: 'none'"


def test_processes_that_take_too_long_are_ended():
    with pytest.raises(RuntimeError, match="did not finish in 0 s"):
        train_in_two(TRAININGS["torch"], limit_s=0)
