"""Try training in several processes."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from perf.bench import distributed
from perf.features.attempt import TRITON_PATH, NotTriedError, Side, feature, sides
from perf.features.problem import assert_right

WAYS = ("DistributedDataParallel", "fully_shard")


def _training(way: str, side: Side) -> distributed.Training:
    name = "tritonrnn.RNN" if side.is_ours else "torch.nn.RNN"
    if side.column == TRITON_PATH:
        return distributed.Training(way, name, "float32", "triton")
    return distributed.Training(way, name)


@functools.cache
def _trained_in_two() -> dict[distributed.Training, list[Tensor] | str]:
    """Train for all columns at once, because two processes are slow to start."""
    on_cpu = [side for side in sides().values() if side.device == "cpu"]
    return distributed.train_in_two([_training(way, side) for side in on_cpu for way in WAYS])


def _check_distributed(way: str, side: Side) -> str:
    if side.device == "cuda":
        raise NotTriedError("needs a GPU for each process")
    training = _training(way, side)
    got = _trained_in_two()[training]
    if isinstance(got, str):
        raise RuntimeError(got)
    alone = replace(training, way="alone", rnn="torch.nn.RNN", backend="torch")
    truth = distributed.train(replace(alone, dtype="float64"), rank=None)
    dtype = getattr(torch, training.dtype)
    assert_right(got, truth, dtype, distributed.train(alone, rank=None))
    # Not "yes, on torch": the Triton back end was forced in those processes.
    return "yes"


@feature("`DistributedDataParallel`")
def _data_parallel(side: Side) -> str:
    return _check_distributed("DistributedDataParallel", side)


@feature("FSDP2, `fully_shard`")
def _sharded(side: Side) -> str:
    return _check_distributed("fully_shard", side)
