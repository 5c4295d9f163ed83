"""Which back end serves a call: chosen by a context, by the environment or by default."""

from __future__ import annotations

import asyncio
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tritonrnn
from tests.support.cases import DTYPE_NAMES
from tests.support.processes import run_alone
from tritonrnn import dispatch


@pytest.fixture(autouse=True)
def _no_default(monkeypatch):
    monkeypatch.setattr(dispatch, "_default", "auto")


def a_call(dtype=torch.float64) -> tuple[tritonrnn.RNN, torch.Tensor]:
    """Return a call in float64, which no Triton kernel serves: forced, that back end raises."""
    return tritonrnn.RNN(3, 5, dtype=dtype), torch.ones(4, 2, 3, dtype=dtype)


def triton_is_forced() -> bool:
    module, x = a_call()
    try:
        module(x)
    except RuntimeError as error:
        return "triton" in str(error).lower()
    return False


def test_auto_and_torch_serve_what_triton_cannot():
    module, x = a_call()
    expected = module(x)
    for name in ("auto", "torch"):
        with tritonrnn.backend(name):
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["time-major", "packed"])
def test_forced_triton_raises_the_reason_for_which_auto_takes_torch(packed):
    module, x = a_call()
    if packed:
        x = pack_sequence([x[:, 0], x[:2, 1]])
    choice = tritonrnn.explain(module, x)
    assert choice.backend == "torch"
    with tritonrnn.backend("triton"), pytest.raises(RuntimeError) as caught:
        module(x)
    assert choice.reason in str(caught.value)
    assert_one_sentence(choice.reason)


def assert_one_sentence(text: str) -> None:
    assert len(text.split()) > 2
    assert "\n" not in text
    assert text.count(". ") == 0


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None], ids=repr)
def test_unknown_back_end_raises(name):
    with pytest.raises((ValueError, TypeError)), tritonrnn.backend(name):
        pass


def test_contexts_nest_and_end():
    assert not triton_is_forced()
    with tritonrnn.backend("triton"):
        assert triton_is_forced()
        with tritonrnn.backend("torch"):
            assert not triton_is_forced()
            with tritonrnn.backend("triton"):
                assert triton_is_forced()
            assert not triton_is_forced()
        with tritonrnn.backend("auto"):
            assert not triton_is_forced()
        assert triton_is_forced()
    assert not triton_is_forced()


def test_context_ends_when_an_exception_leaves_it():
    with pytest.raises(KeyError), tritonrnn.backend("triton"):
        raise KeyError
    assert not triton_is_forced()


def test_context_can_decorate_or_be_used_once_more():
    for _ in range(2):
        with tritonrnn.backend("triton"):
            assert triton_is_forced()


def test_context_holds_in_its_own_thread_only():
    barrier = Barrier(3, timeout=60)

    def seen(name):
        if name is None:
            barrier.wait()
            forced = triton_is_forced()
            barrier.wait()
            return forced
        with tritonrnn.backend(name):
            barrier.wait()
            forced = triton_is_forced()
            barrier.wait()
        return forced

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(seen, ["triton", "torch", None])) == [True, False, False]


def test_context_holds_in_its_own_task_only():
    async def seen(name, entered, others):
        with tritonrnn.backend(name):
            entered.set()
            await others.wait()
            return triton_is_forced()

    async def main():
        first, second = asyncio.Event(), asyncio.Event()
        async with asyncio.timeout(60) if sys.version_info >= (3, 11) else _no_limit():
            results = await asyncio.gather(
                seen("triton", first, second), seen("torch", second, first)
            )
        return [*results, triton_is_forced()]

    assert asyncio.run(main()) == [True, False, False]


class _no_limit:
    async def __aenter__(self):
        pass

    async def __aexit__(self, *_):
        pass


def test_task_started_in_a_context_inherits_it():
    async def seen():
        return triton_is_forced()

    async def main():
        with tritonrnn.backend("triton"):
            task = asyncio.create_task(seen())
        return await task, triton_is_forced()

    assert asyncio.run(main()) == (True, False)


def test_choice_of_forward_is_kept_for_backward():
    module, x = a_call()
    x.requires_grad_()
    with tritonrnn.backend("torch"):
        output, h_n = module(x)
    with tritonrnn.backend("triton"):
        (output.sum() + h_n.sum()).backward()
    reference = nn.RNN(3, 5, dtype=torch.float64)
    reference.load_state_dict(module.state_dict())
    expected = x.detach().requires_grad_()
    output, h_n = reference(expected)
    (output.sum() + h_n.sum()).backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.slow
def test_environment_sets_the_default_and_the_context_wins():
    program = """
        import tritonrnn
        from tritonrnn.dispatch import current_backend
        names = [current_backend()]
        for name in ("torch", "auto", "triton"):
            with tritonrnn.backend(name):
                names.append(current_backend())
        print(*names, current_backend())
    """
    assert run_alone(program, TRITONRNN_BACKEND="triton").split() == [
        "triton", "torch", "auto", "triton", "triton"
    ]  # fmt: skip
    assert run_alone(program, TRITONRNN_BACKEND="").split()[0] == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["TRITONRNN_BACKEND", "TRITONRNN_AUTOTUNE"])
def test_misspelt_environment_raises_at_import(variable):
    program = """
        try:
            import tritonrnn
        except ValueError as error:
            print(error)
    """
    printed = run_alone(program, **{variable: "cudnn"})
    assert re.match(rf"{variable}: expected one of .* got 'cudnn'", printed)


def test_forced_triton_refuses_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "_is_interpreted", False)
    module, x = a_call(torch.float32)
    assert tritonrnn.explain(module, x).backend == "torch"
    with tritonrnn.backend("triton"), pytest.raises(RuntimeError, match="tensors are on the CPU"):
        module(x)


# explain


class Forbidden(TorchDispatchMode):
    """Fail if an operator computes with floats: a plan needs the rows of tokens only."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, results)) if isinstance(x, torch.Tensor)]
        assert func.is_view or not any(x.is_floating_point() for x in tensors), func.name()
        return results


def explained_inputs():
    x = torch.ones(4, 2, 3)
    return {
        "time-major": (x, None),
        "hx": (x, torch.ones(1, 2, 5)),
        "unbatched": (x[:, 0], None),
        "packed": (pack_sequence([x[:, 0], x[:2, 1]]), None),
        "lengths": (x, None, torch.tensor([2, 0])),
        "reset": (x, None, None, torch.tensor([[True, False]] * 4)),
        "unsorted": (pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False), torch.ones(1, 2, 5)),
    }


@pytest.mark.parametrize("layout", list(explained_inputs()))
def test_explain_runs_nothing(layout, monkeypatch):
    module = tritonrnn.RNN(3, 5)
    input, hx, *ragged = explained_inputs()[layout]
    hooked = []
    module.register_forward_hook(lambda *_: hooked.append(1))
    before = torch.get_rng_state()
    with Forbidden():
        choice = tritonrnn.explain(module, input, hx, **dict(zip(("lengths", "reset"), ragged)))
    assert not hooked
    assert torch.equal(torch.get_rng_state(), before)
    assert choice.backend in ("torch", "triton")
    assert_one_sentence(choice.reason)
    assert choice.plan is not None


def test_explain_prints_well():
    text = str(tritonrnn.explain(*a_call()))
    assert "torch" in text
    assert tritonrnn.explain(*a_call()).reason.rstrip(".") in text
    assert " object at 0x" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_explain_follows_the_context():
    module, x = a_call(torch.float32)
    with tritonrnn.backend("torch"):
        choice = tritonrnn.explain(module, x)
    assert choice.backend == "torch"
    assert "torch" in choice.reason


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=DTYPE_NAMES.get
)
def test_explain_needs_no_memory_for_its_answer(dtype):
    """A plan can be asked for before there is data, with tensors on the meta device."""
    module = tritonrnn.RNN(3, 5, dtype=dtype, device="meta")
    choice = tritonrnn.explain(module, torch.ones(4, 2, 3, dtype=dtype, device="meta"))
    assert choice.backend in ("torch", "triton")


def operators_seen(work, module, x) -> set[str]:
    """Return the operators of tritonrnn that a profile or a dispatch mode sees."""
    seen = set()
    if work == "profile":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(x)[0].sum().backward()
        seen = {event.key for event in profile.key_averages()}
    else:

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.add(function.name().partition(".")[0])
                return function(*args, **(kwargs or {}))

        with Mode():
            module(x)[0].sum().backward()
    return {name for name in seen if name.startswith("tritonrnn::")}


# torch 2.11's profiler warns that it clears events.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize("work", ["profile", "mode"])
def test_operators_are_seen_by_whoever_looks(work):
    """Elsewhere their kernels are called without torch's dispatcher."""
    module, x = tritonrnn.RNN(3, 5), torch.randn(40, 2, 3)
    with tritonrnn.backend("torch"):
        seen = operators_seen(work, module, x)
    assert {"tritonrnn::elman", "tritonrnn::elman_backward"} <= seen
