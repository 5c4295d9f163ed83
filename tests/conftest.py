"""Where there is no GPU, kernels run in Triton's interpreter, on CPU tensors."""

import os

import pytest
import torch

# Triton reads this when a kernel is defined, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what only a GPU can show."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
