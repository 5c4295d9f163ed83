"""Features: what a test of one runs on, and what is expected of it."""

from collections.abc import Iterator

import pytest
import torch

import tritonrnn
from tests.support.implementations import Implementation

# What is raised where a feature is missing. A warning or a name that is wrong in a test is none.
FAILURES = (
    AssertionError,
    RuntimeError,
    TypeError,
    pytest.fail.Exception,
    torch.jit.frontend.NotSupportedError,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect of a feature what its mark says, and let its report say what was tried.

    ``feature("a row of the table", nn="no")`` says that torch.nn.RNN fails: the test is to fail
    there, so that the table stays true. Of a GPU ``nn_on_gpu="no"`` says it.
    """
    for place, item in enumerate(items):
        on_gpu = item.get_closest_marker("gpu") is not None
        for mark in list(item.iter_markers("feature")):
            column = item.callspec.params["implementation"]
            said = dict(mark.kwargs)
            nn_on_gpu = said.pop("nn_on_gpu", "yes")
            if on_gpu:
                said["nn"] = nn_on_gpu
            if not said.get(column, "yes").startswith("yes"):
                item.add_marker(pytest.mark.xfail(raises=FAILURES, strict=True))
            row = mark.args[0] + ", on a GPU" * on_gpu
            # perf/features.py makes the table of it.
            item.user_properties.append(("feature", (row, column, place, said)))


@pytest.fixture(params=["nn", "torch", "triton"])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Implementation]:
    """Return torch.nn.RNN, or ours, which one path serves meanwhile."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    on_gpu |= request.node.get_closest_marker("gpu") is not None
    path = request.param if request.param == "triton" else "torch"
    marks = request.node.iter_markers("feature")
    if path == "triton" and any(mark.kwargs.get("triton") == "yes, on torch" for mark in marks):

        def recurrence(*_, **__):
            raise AssertionError("a kernel serves what the mark leaves to torch")

        monkeypatch.setattr("tritonrnn.kernels.launch.recurrence", recurrence)
        path = "auto"
    with tritonrnn.backend(path):
        yield Implementation(request.param, "cuda" if on_gpu else "cpu")
