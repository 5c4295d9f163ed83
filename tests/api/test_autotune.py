"""Plans are tried on the device at hand before they serve: here on an imitation of one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from math import nan
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tritonrnn
from tests.support.cudnn import imitated_kernels
from tests.support.imitation import PLANS, Imitation, imitate, on_launch, spoiled
from tests.support.processes import run_alone
from tritonrnn import autotune, validation
from tritonrnn.autotune import calls, timing, tuner, verification
from tritonrnn.autotune.bench import neutral
from tritonrnn.autotune.records import Record, Shapes
from tritonrnn.kernels import launch
from tritonrnn.paths import aten, inplace

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="has a device of its own")


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Iterator[Imitation]:
    """Return a device on which every plan is faster than torch's own path."""
    yield imitate(tmp_path, monkeypatch, dict.fromkeys(PLANS, 50.0))
    autotune.standing.clear()


@pytest.fixture
def restart(tmp_path, monkeypatch) -> Callable[..., Imitation]:
    """Return a function that forgets all but the files, as the next process does."""
    return lambda us=None: imitate(tmp_path, monkeypatch, us or dict.fromkeys(PLANS, 50.0))


@pytest.fixture
def verified(monkeypatch) -> list[autotune.Kernel]:
    """Take every kernel for right without running it, and return those asked for."""
    asked: list[autotune.Kernel] = []

    def verify(kernel, bench):
        asked.append(kernel)
        return True, "as accurate as torch", 0.5

    monkeypatch.setattr(verification, "verify", verify)
    monkeypatch.setattr(verification, "precompile", lambda kernel, bench: lambda: None)
    return asked


def a_call(**sizes: int) -> tuple[tritonrnn.RNN, torch.Tensor]:
    """Return a call for inference, which has the fewest kernels."""
    T, B, I, H = ({"T": 4, "B": 2, "I": 3, "H": 5} | sizes).values()  # noqa: E741
    return tritonrnn.RNN(I, H).requires_grad_(False), torch.randn(T, B, I)


def served(module: tritonrnn.RNN, x: torch.Tensor, **arguments: Any) -> str:
    """Return the plan or path that serves a call after it was made."""
    module(x, **arguments)
    return explained(module, x, **arguments)


def explained(module: tritonrnn.RNN, x: torch.Tensor, **arguments: Any) -> str:
    return tritonrnn.explain(module, x, **arguments).plan.partition(":")[0]


def rows(**wanted: Any) -> list[dict[str, Any]]:
    """Return the records that have these values."""
    found = tritonrnn.trials()
    return [row for row in found if wanted.items() <= row.items()]


# The choice


def test_first_call_tries_the_first_plan_and_the_next_process_adopts_it(bench, restart):
    module, x = a_call()
    before = tritonrnn.explain(module, x)
    assert (before.backend, before.plan, rows()) == ("torch", "in-place", [])
    expected = module(x)
    chosen = tritonrnn.explain(module, x)
    assert (chosen.backend, chosen.plan.partition(":")[0]) == ("triton", "resident")
    assert chosen.reason == "its trial on this device found it right, and faster than in-place."
    assert "the plan resident is faster (50.5 us against 101 us of in-place)" in chosen.trial
    assert chosen.trial in str(chosen)
    assert len(rows(verdict="right")) == len(rows(verdict="faster")) == 1
    again = restart()
    assert served(module, x) == "resident"
    assert torch.equal(module(x)[0], expected[0])
    assert again.timed == []


def test_slow_plan_yields_to_torchs_own_path(bench, restart, verified):
    bench.us = {"resident": 200.0, "cooperative": 200.0, "stepwise": 200.0}
    module, x = a_call()
    assert served(module, x) == "in-place"
    assert {row["verdict"] for row in rows(kind="fast")} == {"slower"}
    choice = tritonrnn.explain(module, x)
    assert choice.reason == "the plan resident is slower (202 us against 101 us of in-place)."
    assert restart().timed == []
    assert served(module, x) == "in-place"


def test_slow_plan_yields_to_the_next_that_is_not(bench, verified):
    bench.us["resident"] = 200.0
    assert served(*a_call()) == "cooperative"


def test_at_most_three_plans_are_tried(bench, verified, monkeypatch):
    monkeypatch.setattr(tuner, "MAX_TRIALS", 2)
    bench.us = {"resident": 200.0, "cooperative": 200.0}
    assert served(*a_call()) == "in-place"
    assert {kernel.plan for kernel in verified} == {"resident", "cooperative"}


def test_a_tie_is_tritons_in_this_process_only(bench, restart, verified):
    bench.us, bench.spread = {"resident": 104.0}, 0.05
    module, x = a_call()
    assert served(module, x) == "resident"
    assert tritonrnn.explain(module, x).reason.endswith("and as fast as in-place.")
    assert len(rows(verdict="tie")) == 1
    again = restart()
    assert rows(kind="fast") == []
    served(module, x)
    assert again.timed


@pytest.mark.parametrize(
    ("T", "B", "steps"), [(5000, 16, 1024), (300, 16, 512), (5000, 512, 256), (5000, 8192, 128)]
)
def test_steps_of_a_class_are_fewer_of_many_sequences(T, B, steps):
    call = calls.Call(
        torch.device("cpu"), torch.float32, False, T=T, B=B, I=4, G=1, H=8, L=1,
        nonlinearity="tanh", mapped=False, ragged=False, hx=False, training=False,
        torch_path="aten",
    )  # fmt: skip
    assert call.shapes("resident").T == steps


def test_one_class_of_shapes_is_timed_once(bench, verified, monkeypatch):
    monkeypatch.setattr(calls, "MOST_STEPS", 4)
    module, _ = a_call()
    served(module, torch.randn(4, 7, 3))
    timed = len(bench.timed)
    for T, B in [(9, 8), (4, 5), (5000, 6)]:
        assert explained(module, torch.randn(T, B, 3)) == "resident"
    assert len(bench.timed) == timed
    assert len(verified) == 1
    served(module, torch.randn(4, 9, 3))
    assert len(bench.timed) > timed
    assert len(verified) == 1


def test_inference_and_training_are_judged_apart(bench, verified):
    module, x = a_call()
    module.requires_grad_(True)
    with torch.no_grad():
        served(module, x)
    assert [kernel.epilogue for kernel in verified] == ["tanh"]
    bench.us["resident"] = 200.0
    served(module, x)
    assert [kernel.epilogue for kernel in verified[:3]] == ["tanh", "tanh_grad", "tanh_grad"]
    assert explained(module, x) == "cooperative"
    with torch.no_grad():
        assert explained(module, x) == "resident"


def test_a_plan_serves_both_passes_or_none(bench, monkeypatch):
    def fault(plan, arguments):
        if plan.name == "resident" and plan.epilogue == "tanh_grad":
            arguments["s_ptr"].neg_()

    launched = on_launch(monkeypatch, fault)
    module, x = a_call()
    assert served(module, x) == "resident"
    module.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="plan resident computes wrong numbers"):
        module(x)
    launched.clear()
    module(x)[0].sum().backward()
    assert launched == ["cooperative"] * 2


# Faults


def test_spoiled_kernel_is_warned_of_once_and_never_serves(bench, restart, monkeypatch):
    launched = on_launch(monkeypatch, spoiled("resident"))
    module, x = a_call()
    with pytest.warns(RuntimeWarning) as caught:
        module(x)
    # Some versions of the interpreter warn, too, outside of trials.
    (warning,) = (one for one in caught if one.category is RuntimeWarning)
    assert "the plan resident computes wrong numbers" in str(warning.message)
    assert "on Imitation" in str(warning.message)
    assert "for tanh, fp32, G=1 H=5." in str(warning.message)
    assert "tritonrnn.trials()" in str(warning.message)
    for _ in range(2):
        launched.clear()
        assert served(module, x) == "cooperative"
        # Its other sizes, and its other classes, too.
        assert served(module, torch.randn(9, 3, 3)) == "cooperative"
        assert "resident" not in launched
        restart()


def test_warning_that_is_an_error_comes_after_the_record(bench, monkeypatch):
    on_launch(monkeypatch, spoiled("resident"))
    module, x = a_call()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning):
            module(x)
        assert served(module, x) == "cooperative"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda s, ends: s.add_(torch.rand(()) * 1e-3), "two runs of it differ"),
        (lambda s, ends: s.as_strided((1,), (1,), 0).zero_(), "it writes where no token is"),
        (lambda s, ends: s[0, 0].fill_(torch.nan), "times the error that is allowed, in 3 of 3"),
        (lambda s, ends: ends[0, 0].neg_(), "the final states it stores are wrong"),
    ],
    ids=["racy", "out of bounds", "nan", "ends"],
)
def test_faults_of_every_kind_are_found(fault, why, bench, monkeypatch):
    def spoil(plan, arguments):
        if plan.name == "resident":
            fault(arguments["s_ptr"], arguments["ends_ptr"])

    on_launch(monkeypatch, spoil)
    with pytest.warns(RuntimeWarning, match=why):
        served(*a_call())
    assert why in rows(verdict="wrong")[0]["reason"]


def test_kernel_that_takes_a_gradient_from_where_it_stores_one_is_found(bench, monkeypatch):
    def in_place(*arguments):
        made = kernel_arguments(*arguments)
        return made | {"a_ptr": made["s_ptr"]}

    kernel_arguments = launch.kernel_arguments
    monkeypatch.setattr(launch, "kernel_arguments", in_place)
    module, x = a_call()
    module.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="times the error that is allowed"):
        assert served(module, x) == "in-place"
    assert {row["epilogue"] for row in rows(verdict="wrong")} == {"tanh_grad"}


def failing(error: BaseException) -> Callable[..., None]:
    def fault(plan, arguments):
        if plan.name == "resident":
            raise error

    return fault


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Triton Error: too many resources requested"), ValueError("no such layout")],
    ids=["refused launch", "compiler"],
)
def test_what_raises_is_recorded_and_the_next_plan_serves(error, bench, restart, monkeypatch):
    launched = on_launch(monkeypatch, failing(error))
    module, x = a_call()
    assert served(module, x) == "cooperative"
    (row,) = rows(verdict="failed")
    assert row["reason"] == f"{type(error).__name__}: {error}"
    restart()
    launched.clear()
    assert served(module, x) == "cooperative"
    assert "resident" not in launched


def test_compiler_that_raises_leads_to_the_next_plan(bench, monkeypatch):
    recurrence = launch.recurrence

    def compiling(*arguments, compile_only=False, plan, **options):
        if compile_only and plan == "resident":
            raise ValueError("ptxas: fatal")
        return recurrence(*arguments, compile_only=compile_only, plan=plan, **options)

    monkeypatch.setattr(launch, "recurrence", compiling)
    assert served(*a_call()) == "cooperative"
    assert rows(verdict="failed")[0]["reason"] == "ValueError: ptxas: fatal"


def test_plans_that_are_not_tried_are_not_compiled(bench, monkeypatch):
    recurrence, compiled = launch.recurrence, set()

    def compiling(*arguments, compile_only=False, plan, **options):
        if compile_only:
            compiled.add(plan)
        return recurrence(*arguments, compile_only=compile_only, plan=plan, **options)

    monkeypatch.setattr(launch, "recurrence", compiling)
    bench.us["resident"] = 50.0
    assert served(*a_call()) == "resident"
    assert compiled == {"resident"}


def test_record_of_another_process_is_no_failure_of_a_plan(bench, monkeypatch):
    """It is written between the look at the records and the trial."""
    compile_it = tuner.Tuner._compile

    def late(self, key, call):
        for kernel in call.kernels(key.plan):
            self.store.put(Record(kernel, "right", "as accurate as torch", 0.0))
        return compile_it(self, key, call)

    monkeypatch.setattr(tuner.Tuner, "_compile", late)
    bench.us["resident"] = 50.0
    assert served(*a_call()) == "resident"
    assert rows(verdict="failed") == []


def test_exhausted_memory_counts_for_this_process_only(bench, restart, monkeypatch):
    with monkeypatch.context() as patch:
        on_launch(patch, failing(torch.OutOfMemoryError("CUDA out of memory")))
        module, x = a_call()
        assert served(module, x) == "cooperative"
        assert served(module, x) == "cooperative"
    restart()
    assert served(module, x) == "resident"


def test_exhausted_memory_of_a_timed_call_counts_for_this_process_only(
    bench, restart, verified, monkeypatch
):
    with monkeypatch.context() as patch:
        on_launch(patch, failing(torch.OutOfMemoryError("CUDA out of memory")))
        module, x = a_call()
        assert served(module, x) == "cooperative"
    restart()
    assert served(module, x) == "resident"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_plan_is_faster_in_this_process_than_a_path_that_fails(
    error, bench, restart, verified, monkeypatch
):
    def fail(*arguments, **options):
        raise error("not here")

    module, x = a_call()
    with monkeypatch.context() as patch:
        patch.setattr(inplace, "recurrence", fail)
        assert served(module, x) == "resident"
    (row,) = rows(kind="fast")
    assert row["reason"] == f"50.5 us, and in-place fails: {error.__name__}: not here"
    assert (row["plan_us_p50"], row["other_us_p50"]) == (50.5, pytest.approx(nan, nan_ok=True))
    restart({"resident": 200.0})
    assert served(module, x) == "cooperative"


def test_fault_that_leaves_the_device_unusable_names_the_plan(bench, restart, monkeypatch):
    def fault(plan, arguments):
        if plan.name == "resident":
            bench.is_unusable = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    on_launch(monkeypatch, fault)
    module, x = a_call()
    with pytest.raises(RuntimeError, match=r"plan resident .* TRITONRNN_AUTOTUNE=off"):
        module(x)
    restart()
    assert served(module, x) == "cooperative"


def test_fault_of_the_callers_own_is_raised_and_recorded_of_no_plan(bench, restart, verified):
    module, x = a_call()
    bench.is_unusable = True
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access"):
        module(x)
    assert verified == rows() == []
    restart()
    assert served(module, x) == "resident"


def test_program_that_waits_in_vain_fails_its_plan(bench, monkeypatch):
    make = launch.barrier_counters
    monkeypatch.setattr(launch, "barrier_counters", lambda *of: make(*of) - 1)
    monkeypatch.setattr(launch, "MAX_SPINS_IN_TRIAL", 3)
    bench.us["resident"] = 200.0
    assert served(*a_call()) == "stepwise"
    (row,) = rows(verdict="failed")
    assert "gave up waiting" in row["reason"]
    assert row["plan"] == "cooperative"


def test_error_share_is_1_at_twice_the_mean_and_four_times_the_largest_error():
    exact = torch.zeros(1000, dtype=torch.float64).index_fill(0, torch.tensor([0]), 1.0)
    eps = 0.0
    torchs = exact + torch.linspace(-1, 1, 1000, dtype=torch.float64)
    for factor, elements in [(2, slice(None)), (4, slice(-1, None))]:
        got = torchs.clone()
        got[elements] += (factor - 1) * (torchs - exact)[elements]
        assert verification.error_share(got, torchs, exact, eps) == pytest.approx(1.0, rel=1e-6)
    assert verification.error_share(torchs, torchs, exact, eps) == 0.5
    assert verification.error_share(exact, exact, exact, eps) == 0.0
    assert verification.error_share(torchs * torch.nan, torchs, exact, eps) == verification.MOST
    # Where the torch path is exact by chance, a quarter of a rounding counts.
    rounding = 2**-8 / 4 * exact.square().mean().sqrt()
    assert verification.error_share(exact + rounding, exact, exact, 2**-8) == pytest.approx(0.5)


@pytest.mark.parametrize("plan", PLANS)
def test_tf32_is_held_to_tf32(plan, bench):
    """Also where torch's own products take fp32, as they do here."""
    kernel = autotune.Kernel(plan, "tanh", "fp32", True, 1, 37, mapped=True, v_0=True)
    is_right, why, error = verification.verify(kernel, bench)
    assert is_right, why
    assert error > 0.1


@pytest.mark.parametrize("seeds_that_fail", [1, 2])
def test_seeds_that_rounding_decides_are_no_fault(seeds_that_fail, bench, monkeypatch):
    """One unit of relu that rounding moves across 0 changes a gradient by more than it does."""
    seen = []

    def share(kernel, sample, got):
        seen.append(kernel)
        return 2.0 if len(seen) <= seeds_that_fail else 0.5

    monkeypatch.setattr(verification, "_error", share)
    assert served(*a_call()) == "resident"
    # Two right ones are enough, of each of two batches.
    assert len(seen) == seeds_that_fail + 4


SHAPES = Shapes(
    "resident", "tanh", "fp32", False, 1, 5, mapped=False, hx=False, ragged=False, training=True,
    T=4, B=2, I=4, L=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"training": False},
        {"G": 2, "L": 2, "hx": True},
        {"mapped": True, "nonlinearity": "relu"},
        {"mapped": True, "ragged": True, "G": 2},
    ],
    ids=str,
)
def test_paths_are_timed_on_the_same_call(change, monkeypatch):
    shapes = replace(SHAPES, **change)
    with neutral(torch.device("cpu")), imitated_kernels("_cudnn_rnn") as cudnn:
        stack = timing.Stack.draw(shapes, torch.device("cpu"))
        expected = stack.runner("in-place")()
        found = [stack.runner("stepwise")()]
        if not shapes.ragged:
            found.append(stack.runner("aten")())
            assert cudnn.backwards == 0
            monkeypatch.setattr(aten, "has_reserve", lambda input: True)
            found.append(stack.runner("aten")())
            assert cudnn.backwards == shapes.training
    for output, grad_input in found:
        torch.testing.assert_close(output, expected[0])
        assert (grad_input is not None) == shapes.training
        if shapes.training:
            torch.testing.assert_close(grad_input, expected[1])


# Where and when


def test_ragged_batch_is_never_walked_in_torch_because_a_plan_is_refused(bench, monkeypatch):
    """In torch the host would wait for the lengths, which are on the device."""
    module, x = a_call()
    arguments = {"lengths": torch.tensor([4, 2])}
    assert explained(module, x, **arguments) == "resident"
    on_launch(monkeypatch, spoiled("resident"))
    bench.us = {"cooperative": 200.0, "stepwise": 100.0}
    with pytest.warns(RuntimeWarning):
        module(x, **arguments)
    assert explained(module, x, **arguments) == "stepwise"
    # Plans that wait for nobody are not timed: there is no other to be faster.
    assert set(bench.timed) == {"cooperative", "stepwise"}


def test_ragged_batch_takes_the_plan_that_waits_where_it_is_faster(bench, verified, monkeypatch):
    bench.us = {"cooperative": 50.0, "stepwise": 100.0}
    monkeypatch.setattr(
        autotune, "rank_plans", lambda *of: [p for p in rank_plans(*of) if p.name != "resident"]
    )
    module, x = a_call()
    arguments = {"reset": torch.zeros(4, 2, dtype=torch.bool)}
    assert explained(module, x, **arguments) == "stepwise"
    assert served(module, x, **arguments) == "cooperative"


rank_plans = autotune.rank_plans


def test_no_trial_is_made_while_a_stream_is_captured(bench, verified):
    bench.is_capturing = True
    module, x = a_call()
    assert served(module, x) == "in-place"
    assert rows() == []
    bench.is_capturing = False
    assert served(module, x) == "resident"
    bench.is_capturing = True
    assert served(module, x) == "resident"


@pytest.mark.parametrize("is_in_trial", [False, True])
def test_capture_of_another_thread_postpones_a_trial(is_in_trial, bench, verified, monkeypatch):
    module, x = a_call()

    def verify(*of):
        bench.is_captured_elsewhere = True
        return True, "", 0.0

    with monkeypatch.context() as patch:
        patch.setattr(verification, "verify", verify)
        bench.is_captured_elsewhere = not is_in_trial
        assert served(module, x) == "in-place"
    assert rows() == []
    bench.is_captured_elsewhere = False
    assert served(module, x) == "resident"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_no_trial_is_made_for_a_tracer(bench, verified):
    module, x = a_call()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.randn(4, 2, 3))
    torch.fx.experimental.proxy_tensor.make_fx(lambda x: module(x)[0])(x)
    torch.jit.trace(module, (x,), check_trace=False)
    torch.func.vmap(lambda x: module(x)[0])(x[None])
    module.to("meta")(x.to("meta"))
    assert rows() == []


@pytest.fixture
def compile_program():
    """Return a function that compiles a module."""
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


# torch's compiler and exporter import modules of its own that warn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_compiled_program_makes_the_trial_at_its_first_run_outside_of_capture(
    bench, verified, compile_program
):
    # The other path is torch's own kernels, which autograd differentiates: so it does in a trial
    # that is made below it, inside of the operator.
    module, x = a_call(T=1)
    program = compile_program(module)
    bench.is_capturing = True
    program(x)
    assert rows() == []
    bench.is_capturing = False
    program(x)
    assert {kernel.epilogue for kernel in verified} == {"tanh"}
    # Another program: torch 2.11 does not notice that the weights do so now.
    torch._dynamo.reset()
    compile_program(module.requires_grad_(True))(x)
    assert {kernel.epilogue for kernel in verified} == {"tanh", "tanh_grad"}
    assert {row["against"] for row in rows(kind="fast")} == {"aten"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program_counts_as_training_where_it_is_not_known_better(bench, verified):
    module, x = a_call()
    program = torch.export.export(module.requires_grad_(True), (x,), strict=False).module()
    assert rows() == []
    with torch.inference_mode():
        program(x)
    assert {kernel.epilogue for kernel in verified} == {"tanh"}
    with torch.no_grad():
        program(x)
    assert {kernel.epilogue for kernel in verified} == {"tanh", "tanh_grad"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_backward_of_a_program_takes_the_plan_of_its_forward_pass(
    bench, restart, verified, monkeypatch, compile_program
):
    module, x = a_call()
    program = compile_program(module.requires_grad_(True))
    bench.us["resident"] = 200.0
    output, _ = program(x)
    # Other records now, and another choice.
    restart()
    program(x)
    launched = on_launch(monkeypatch, lambda plan, arguments: None)
    with tritonrnn.backend("torch"):
        output.sum().backward()
    assert launched == ["cooperative"]


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def verify_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_asked", "verify")
        yield


@pytest.mark.parametrize(
    "mode",
    [
        deterministic_algorithms,
        lambda: torch.backends.cudnn.flags(deterministic=True),
        verify_only,
    ],
    ids=["algorithms", "cudnn", "verify"],
)
def test_deterministic_mode_times_nothing_and_ignores_times(mode, bench, verified):
    module, x = a_call()
    bench.us["resident"] = 200.0
    assert served(module, x) == "cooperative"
    timed = len(bench.timed)
    with mode():
        assert served(module, x) == "resident"
        assert served(module, torch.randn(4, 7, 3)) == "resident"
    assert len(bench.timed) == timed


def test_deterministic_mode_takes_many_launches_for_ragged_batches_only(
    bench, verified, monkeypatch
):
    monkeypatch.setattr(autotune, "_asked", "verify")
    monkeypatch.setattr(
        autotune, "rank_plans", lambda *of: [p for p in rank_plans(*of) if p.name == "stepwise"]
    )
    module, x = a_call()
    assert served(module, x) == "in-place"
    assert tritonrnn.explain(module, x).reason == "no plan of one launch a pass fits it."
    assert served(module, x, lengths=torch.tensor([4, 2])) == "stepwise"


def test_off_makes_no_trial(bench, verified, monkeypatch):
    module, x = a_call()
    served(module, x)
    monkeypatch.setattr(autotune, "_asked", "off")
    verified.clear()
    assert served(module, x) == "in-place"
    assert served(module, x, lengths=torch.tensor([4, 2])) == "resident"
    assert tritonrnn.explain(module, x).reason == "TRITONRNN_AUTOTUNE is off."
    assert verified == []


@pytest.mark.slow
def test_environment_says_whether_trials_are_made():
    program = """
        from tritonrnn import autotune
        print(autotune.mode())
    """
    for value, mode in {"off": "off", "": "on"}.items():
        assert run_alone(program, TRITONRNN_AUTOTUNE=value).strip() == mode


def test_forced_triton_takes_the_first_plan_that_is_not_known_to_be_wrong(bench, monkeypatch):
    module, x = a_call()
    with tritonrnn.backend("triton"):
        assert served(module, x) == "resident"
        assert rows() == []
    on_launch(monkeypatch, lambda plan, arguments: arguments["s_ptr"].add_(1))
    with pytest.warns(RuntimeWarning):
        module(x)
    with tritonrnn.backend("triton"), pytest.raises(RuntimeError) as caught:
        module(x)
    assert "the triton back end can't serve this call" in str(caught.value)
    assert all(f"the plan {plan} computes wrong numbers" in str(caught.value) for plan in PLANS)
    assert served(module, x) == "in-place"


def test_program_saved_before_plans_had_names_takes_the_first_that_is_not_wrong(bench, monkeypatch):
    module, x = a_call()
    weights = [weight.detach() for weight in module.parameters()]
    arguments = x, None, weights, None, None, "time_major", "tanh", False, "triton"
    launched = on_launch(monkeypatch, spoiled("resident"))
    torch.ops.tritonrnn.elman(*arguments)
    assert launched == ["resident"]
    with pytest.warns(RuntimeWarning):
        module(x)
    launched.clear()
    torch.ops.tritonrnn.elman(*arguments)
    assert launched == ["cooperative"]


def test_without_a_bench_the_first_plan_serves_untried(bench, monkeypatch):
    monkeypatch.setattr(autotune, "BENCHES", {})
    module, x = a_call()
    assert served(module, x) == "resident"
    assert rows() == []


# Traces


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def test_trial_leaves_no_trace_in_what_the_caller_computes(bench):
    module, x = a_call()
    state = torch.get_rng_state()
    with Seen() as seen:
        module(x)
    assert rows(verdict="right")
    with Seen() as seen_again:
        module(x)
    assert seen.operators == seen_again.operators
    assert torch.equal(torch.get_rng_state(), state)


def refuse(tensor):
    raise AssertionError("a trial saves nothing for a backward pass")


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        lambda: torch.device("meta"),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    ],
    ids=["inference", "autocast", "default device", "anomaly", "hooks"],
)
def test_trial_finds_the_same_in_every_mode(mode, bench):
    module, x = a_call()
    with mode():
        module(x)
    (right,) = rows(kind="right")
    assert right["verdict"] == "right"
    assert rows(kind="fast")[0]["verdict"] == "faster"


def test_hooks_of_the_caller_see_nothing_that_a_trial_saves():
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        with neutral(torch.device("cpu")):
            timing.Stack.draw(SHAPES, torch.device("cpu")).runner("aten")()
        with pytest.raises(AssertionError, match="saves nothing"):
            torch.ones(1, requires_grad=True).exp()


def test_second_thread_waits_for_the_trial_of_the_first(bench, verified):
    """They choose only: the interpreter runs one kernel at a time."""
    module, x = a_call()
    everybody = Barrier(4, timeout=60)

    def plan(_):
        everybody.wait()
        return validation.check(x, None, list(module.parameters()), "tanh", 1, *[False] * 2, 0.0,
                                True, None, None).choice.plan.name  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(plan, range(4))) == ["resident"] * 4
    assert len(verified) == 1
    assert bench.timed.count("resident") == bench.timed.count("in-place")


def test_trials_are_logged_with_their_seconds(bench, verified, caplog):
    with caplog.at_level(logging.INFO, "tritonrnn"):
        served(*a_call())
    assert [record.levelname for record in caplog.records] == ["INFO"] * 2
    assert "the plan resident is right" in caplog.messages[0]
    assert "the plan resident is faster (50.5 us against 101 us of in-place)" in caplog.messages[1]
    assert all(message.endswith(" s)") for message in caplog.messages)


def test_standing_record_is_not_looked_up_again(bench, verified, monkeypatch):
    module, x = a_call()
    served(module, x)
    monkeypatch.setattr(tuner, "rank_plans", None)
    monkeypatch.setattr(tuner.Store, "get", None)
    assert served(module, x) == "resident"


# Processes

PROCESS = """
    import os, sys, warnings
    os.environ["TRITON_INTERPRET"] = "1"
    import pytest, torch, tritonrnn
    from pathlib import Path
    from tests.support.imitation import PLANS, imitate, on_launch, spoiled
    warnings.simplefilter("always")
    patch = pytest.MonkeyPatch()
    imitate(Path({folder!r}), patch, dict.fromkeys(PLANS, 50.0))
    launched = on_launch(patch, {fault})
    module, x = tritonrnn.RNN(3, 5).requires_grad_(False), torch.randn(4, 2, 3)
    with warnings.catch_warnings(record=True) as caught:
        module(x)
    # Not those of Triton's interpreter.
    count = sum(one.category is RuntimeWarning for one in caught)
    print(tritonrnn.explain(module, x).plan.partition(":")[0], count, *sorted(set(launched)))
"""


def run_process(folder: Path, fault: str) -> list[str]:
    return run_alone(PROCESS.format(folder=str(folder), fault=fault)).split()


@pytest.mark.slow
def test_spoiled_kernel_never_serves_another_process(tmp_path):
    fault = "spoiled('resident')"
    assert run_process(tmp_path, fault) == ["cooperative", "1", "cooperative", "resident"]
    assert run_process(tmp_path, fault) == ["cooperative", "0", "cooperative"]


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 2])
def test_plan_is_not_tried_after_two_processes_were_killed_in_its_trial(deaths, tmp_path):
    for _ in range(deaths):
        with pytest.raises(AssertionError):
            run_process(tmp_path, "lambda plan, arguments: os.kill(os.getpid(), 9)")
    if deaths == 1:
        assert run_process(tmp_path, "lambda *_: None") == ["resident", "0", "resident"]
        return
    assert run_process(tmp_path, "lambda *_: None") == ["cooperative", "0", "cooperative"]


@pytest.mark.slow
def test_two_processes_at_once_find_the_same(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: run_process(tmp_path, "lambda *_: None"), range(2)))
    assert found == [["resident", "0", "resident"]] * 2
    assert len(list(tmp_path.glob("tritonrnn/*/*"))) == 2
