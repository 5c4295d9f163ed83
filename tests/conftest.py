"""Where there is no GPU, kernels run in Triton's interpreter, on CPU tensors."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import tritonrnn
from tests.support.implementations import Implementation

# Triton reads this when a kernel is defined, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors here are small: on a busy machine, several threads take ten times as long.
torch.set_num_threads(1)

# The same examples in every run; `--hypothesis-profile=fresh` draws new ones, and many more.
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("fresh", max_examples=2000, deadline=None, print_blob=True)


# What is raised where a feature is missing. A warning or a name that is wrong in a test is none.
FAILURES = (
    AssertionError,
    RuntimeError,
    TypeError,
    pytest.fail.Exception,
    torch.jit.frontend.NotSupportedError,
)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Load the profile asked for, as torch's test utilities load one of theirs when imported."""
    settings.load_profile(collector.config.getoption("--hypothesis-profile") or "suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, and expect of a feature what its mark says.

    ``feature("a row of the table", nn="no")`` says that torch.nn.RNN fails: the test is to fail
    there, so that the table stays true. Of a GPU nothing is said of torch.nn.RNN.
    """
    for place, item in enumerate(items):
        on_gpu = item.get_closest_marker("gpu") is not None
        if on_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        for mark in list(item.iter_markers("feature")):
            column = item.callspec.params["implementation"]
            said = {"nn": "no"} if on_gpu else mark.kwargs
            if not said.get(column, "yes").startswith("yes"):
                item.add_marker(pytest.mark.xfail(raises=FAILURES, strict=not on_gpu))
            row = mark.args[0] + ", on a GPU" * on_gpu
            # The report takes it along: perf/features.py makes the table of it.
            item.user_properties.append(("feature", (row, column, place, said)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draw the same random numbers in a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def torch_back_end() -> Iterator[None]:
    """Serve every call by the torch path, even where the interpreter could run the kernels."""
    with tritonrnn.backend("torch"):
        yield


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
