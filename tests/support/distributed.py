"""Train a model around an RNN in two processes on the CPU: DistributedDataParallel, FSDP2."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritonrnn
from tests.support.processes import copies, print_to

PROCESSES = 2
STEPS = 3
INPUT_SIZE, HIDDEN_SIZE, CLASSES = 3, 5, 2
LENGTHS = (4, 1, 3, 2)

RNNS: dict[str, Callable[..., nn.RNNBase]] = {
    "torch.nn.RNN": nn.RNN,
    "tritonrnn.RNN": tritonrnn.RNN,
}


@dataclass(frozen=True)
class Training:
    """Describe a training.

    Attributes:
        way: "DistributedDataParallel" or "fully_shard", or "alone" in one process.
        rnn: "torch.nn.RNN" or "tritonrnn.RNN".
        dtype: "float64" or "float32".
        backend: An argument of ``tritonrnn.backend``.
    """

    way: str
    rnn: str = "tritonrnn.RNN"
    dtype: str = "float64"
    backend: str = "torch"


class Tagger(nn.Module):
    """Score every step of ragged sequences: ``(T, B, C)``."""

    def __init__(self, rnn_class: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = rnn_class(INPUT_SIZE, HIDDEN_SIZE, num_layers=2)
        self.head = nn.Linear(HIDDEN_SIZE, CLASSES)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        """Pack, run the RNN, unpack, and apply the head."""
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, h_n = self.rnn(packed)
        padded, _ = pad_packed_sequence(output, total_length=len(input))
        return self.head(padded + h_n[-1])


def train(training: Training, rank: int | None) -> list[Tensor]:
    """Train on this process's share of every batch.

    Args:
        training: What to train, and how.
        rank: Rank of this process, or None if one process has all sequences.

    Returns:
        Every parameter, unsharded.
    """
    dtype = getattr(torch, training.dtype)
    torch.manual_seed(0)
    model: nn.Module = Tagger(RNNS[training.rnn]).to(dtype)
    if training.way == "DistributedDataParallel":
        model = nn.parallel.DistributedDataParallel(model)
    elif training.way == "fully_shard":
        # Imported here, because the import is slow.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (PROCESSES,))
        fully_shard(model.get_submodule("rnn"), mesh=mesh)
        fully_shard(model, mesh=mesh)
    mine = slice(None) if rank is None else slice(rank, None, PROCESSES)
    lengths = torch.tensor(LENGTHS)[mine]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    with tritonrnn.backend(training.backend):  # type: ignore[arg-type]
        for _ in range(STEPS):
            shape = (max(LENGTHS), len(LENGTHS))
            input = torch.randn(*shape, INPUT_SIZE, generator=generator, dtype=torch.float64)
            weight = torch.randn(*shape, CLASSES, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            scores = model(input[:, mine].to(dtype), lengths)
            (scores * weight[:, mine].to(dtype)).mean(1).sum().backward()
            optimizer.step()
    with torch.no_grad():
        return [
            parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
            for parameter in model.parameters()
        ]


def train_in_two(
    trainings: Sequence[Training], limit_s: float = 120.0
) -> dict[Training, list[Tensor] | str]:
    """Run each training in two processes, one training after the other.

    Returns:
        For each training its parameters, or the text of what it raised.

    Raises:
        RuntimeError: a process crashed, or the processes took longer than ``limit_s``.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            copies.Process(target=_main, args=(trainings, Path(folder), rank))
            for rank in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        try:
            _join(processes, limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(process.exitcode for process in processes):
            text = "\n".join(path.read_text() for path in sorted(Path(folder).glob("log*")))
            raise RuntimeError(f"two processes did not finish in {limit_s:g} s:\n{text}")
        results = torch.load(Path(folder, "results"))
    return dict(zip(trainings, results))


def _join(processes: Sequence[BaseProcess], limit_s: float) -> None:
    """Wait until all processes have ended, one has failed or the time is up."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.05)


def _main(trainings: Sequence[Training], folder: Path, rank: int) -> None:
    print_to(folder / f"log{rank}", 1, 2)
    if sys.platform == "linux":
        # The loopback interface: gloo must not look for the network.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    results: list[list[Tensor] | str] = []
    for training in trainings:
        try:
            results.append(train(training, rank))
        except Exception as error:
            # A fault of the module occurs in both processes, so neither waits for the other.
            results.append(f"{type(error).__name__}: {error}")
    if rank == 0:
        torch.save(results, folder / "results")
    dist.barrier()
    dist.destroy_process_group()
