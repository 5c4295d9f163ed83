"""Where there is no GPU, kernels run in Triton's interpreter, on CPU tensors."""

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import settings

# Triton reads this when a kernel is defined, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Read TRITON_INTERPRET, too.
from tritonrnn import dispatch

# Short sequences are left to torch's own kernels, and those of the tests are short. Here the
# in-place path takes them; tests/api/test_short.py tests the limits that users have.
FEWEST_STEPS = dict(dispatch.FEWEST_STEPS)
dispatch.FEWEST_STEPS.update(dict.fromkeys(FEWEST_STEPS, 2))

# The tensors here are small: on a busy machine, several threads take ten times as long. In the
# processes that tests start, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Little of what torch, Triton and these tests allocate is garbage: it is searched for more rarely.
gc.set_threshold(100_000)

# The same examples in every run; `--hypothesis-profile=fresh` draws new ones, and many more.
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("fresh", max_examples=2000, deadline=None, print_blob=True)


def speed_up_the_interpreter() -> None:
    """Have Triton's interpreter patch its language when a kernel is launched, and not again.

    At each call of another function inside the kernel it would look for what there is to patch,
    which takes half of its time, where the launch has patched it and undoes it at its end.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_language, np_dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    np_dtypes: dict[str, Any] = {}

    def patch(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values()}
        for module in (language, language.core):
            if id(module) in modules and language.core.is_builtin(module.load):
                return patch_language(function)
        return interpreter._LangPatchScope()

    def np_dtype(dtype: Any) -> Any:
        # It makes a table of all of them to look up one.
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype_of(dtype)
        return np_dtypes[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch, np_dtype
    # Whether integers overflow it computes for an assertion that it makes in debug mode only.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


if find_spec("triton") is not None:
    speed_up_the_interpreter()


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Load the profile asked for, as torch's test utilities load one of theirs when imported."""
    settings.load_profile(collector.config.getoption("--hypothesis-profile") or "suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draw the same random numbers in a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def torch_back_end() -> Iterator[None]:
    """Serve every call by the torch path, even where the interpreter could run the kernels."""
    from tritonrnn import backend

    with backend("torch"):
        yield


@pytest.fixture
def fewest_steps(request: pytest.FixtureRequest) -> Iterator[dict[tuple[bool, bool], int]]:
    """Return the steps from which the in-place path serves: those of users, or all a parameter."""
    before, limits = dict(dispatch.FEWEST_STEPS), dict(FEWEST_STEPS)
    if hasattr(request, "param"):
        limits = dict.fromkeys(limits, request.param)
    for in_force in (limits, before):
        dispatch.FEWEST_STEPS.update(in_force)
        dispatch.choose_by_steps.cache_clear()
        if in_force is limits:
            yield limits
