"""Run FlashRNN (Pöppel, Beck, Hochreiter 2024): fused CUDA kernels, built at the first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perf.bench.cases import Case, Workload
from perf.peers.peer import Peer, Runner

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# CUDA's limit, the same on every GPU so far.
THREADS_PER_BLOCK = 1024


class FlashRNN(Peer):
    """Run ``flashrnn`` with one of its back ends; the input projection is timed with it."""

    def __init__(self, name: str, backend: str) -> None:
        self.name = name
        self._backend = backend

    def supports(self, case: Case) -> str | None:
        """Return None for one layer and direction of tanh over a padded batch on a GPU."""
        if not case.on_gpu:
            return "it needs a GPU"
        if importlib.util.find_spec("flashrnn") is None:
            return "flashrnn is not installed"
        # Imported here, because it takes long.
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
            return "there is no nvcc to build its kernels with"
        if case.layout != "padded" or case.layers > 1 or case.directions > 1:
            return "it runs one layer, one direction, padded batches"
        if case.nonlinearity != "tanh":
            return "it has no relu"
        if case.dtype not in DTYPES or case.H % 16:
            return "it runs fp32, bf16 and fp16, and hidden sizes that are multiples of 16"
        return None

    def build(self, case: Case, module: nn.RNNBase, workload: Workload) -> Runner:
        """Take the module's weights; the kernels are built at the first call."""
        flashrnn: Any = importlib.import_module("flashrnn.flashrnn.flashrnn")
        # FlashRNN's own function reads device properties that CUDA 13 removed.
        flashrnn.get_gpu_info = gpu_info
        # torch builds with ninja, which is beside Python if the environment is not activated.
        path = os.environ.get("PATH", "").split(os.pathsep)
        if (beside := str(Path(sys.executable).parent)) not in path:
            os.environ["PATH"] = os.pathsep.join([*path, beside])
        config = flashrnn.FlashRNNConfig(
            backend=self._backend,
            function="elman",
            hidden_dim=case.H,
            num_heads=1,
            batch_size=case.B,
            dtype=DTYPES[case.dtype],
            input_shape="TBGHD",
            output_shape="STBHD",
        )
        parameters = list(module.parameters())
        w_ih, w_hh, b_ih, b_hh = parameters

        def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
            drive = functional.linear(tokens, w_ih, b_ih)
            # One gate, one head.
            output, final = flashrnn.flashrnn(
                drive.view(case.T, case.B, 1, 1, case.H),
                w_hh.view(1, 1, case.H, case.H),
                b_hh.view(1, 1, case.H),
                config=config,
            )
            shape = (-1, case.B, case.H)
            return output.reshape(shape), final.reshape(shape)

        # After an attempt to capture it, its process can't use the GPU any more.
        why = "it waits for the GPU"
        return Runner(forward, parameters, plan=lambda: self._backend, no_graph=why)


def gpu_info(device_id: int) -> dict[str, int]:
    """Return the properties of a GPU that FlashRNN asks for."""
    properties: Any = torch.cuda.get_device_properties(device_id)
    return {
        "maxThreadsPerBlock": THREADS_PER_BLOCK,
        "regsPerMultiprocessor": properties.regs_per_multiprocessor,
        "multiProcessorCount": properties.multi_processor_count,
        "sharedMemPerBlockOptin": properties.shared_memory_per_block_optin,
    }
