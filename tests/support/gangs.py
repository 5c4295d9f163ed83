"""Gangs for real on a CPU: one process a program, the tensors in shared memory.

Triton's interpreter runs the programs of a grid one after the other, so that a program that waits
for another would wait for ever. Here each program is a process of its own, in which the
interpreter is told which program it is. Its atomics are the machine's.

What this can't show: the machine orders its stores and keeps its caches coherent, so a barrier, a
release or a read past the cache that is missing goes unseen (see test_gang_model.py).
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from tritonrnn.kernels import launch, recurrence
from tritonrnn.kernels.plan import LaunchPlan

PACKAGE = Path(recurrence.__file__).parent


class GangError(AssertionError):
    """A gang did not come to its end in time, or a program of it failed."""


def run(
    case: Any,
    plan: LaunchPlan,
    *,
    kernel: Any = recurrence.recurrence_kernel,
    seed: int = 0,
    delay_s: float = 0.0,
    limit_s: float = 150.0,
    patience: int = launch.PATIENCE,
    lost: tuple[int, int, int] | None = None,
) -> Tensor:
    """Run a ``test_recurrence.Case`` under a cooperative plan, each program at its own pace.

    Args:
        case: the recurrence.
        plan: forces tile sizes and gangs.
        kernel: the kernel, or a broken one.
        seed: of the delays.
        delay_s: up to which a program sleeps, at random, around a barrier or an atomic.
        limit_s: after which every program is ended.
        patience: polls until a program gives up.
        lost: a program that never starts.

    Raises:
        GangError: a program failed or was ended.
        RuntimeError: a program gave up waiting.
    """
    problem = launch.problem_of(
        case.a, case.layout, G=len(case.reverse), epilogue=case.epilogue, tf32=case.tf32
    )
    s = case.a.clone().share_memory_()
    arguments = launch.kernel_arguments(
        s, case.v_0, case.M, case.aux, case.layout, problem, case.reverse, plan
    )
    arguments["gang_ptr"].share_memory_()
    arguments |= {"step": 0, "PATIENCE": patience}
    grid = launch.grid(problem, plan)
    processes = {
        _fork(lambda program=program: _be(program, grid, kernel, arguments, seed, delay_s))
        for program in product(*map(range, grid))
        if program != lost
    }
    _join(processes, limit_s)
    launch.check_gangs(arguments["gang_ptr"], plan)
    return s


def broken(folder: Path, *changes: tuple[str, str]) -> Any:
    """The kernel with its text, or its gang's, changed: what the tests must notice."""
    text = (PACKAGE / "recurrence.py").read_text() + "\n\n"
    text += (PACKAGE / "gang.py").read_text().split("import triton.language as tl\n")[1]
    text = text.replace("from tritonrnn.kernels.gang import publish, wait\n", "")
    return changed(text, folder, *changes).recurrence_kernel


def changed(text: str, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """A module of this text, with parts of it replaced that are there once."""
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    path = folder / "broken.py"
    path.write_text(text)
    return load(path)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _be(
    program: tuple[int, int, int],
    grid: tuple[int, int, int],
    kernel: Any,
    arguments: dict[str, Any],
    seed: int,
    delay_s: float,
) -> None:
    """Run one program of a grid, in a process of its own."""
    chance = random.Random(f"{seed} {program}")

    def lag() -> None:
        # Mostly a program goes on at once, now and then it lags behind.
        time.sleep(delay_s * chance.random() if chance.random() < 0.1 else 0.0)

    def at_random(call: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(*args: Any) -> Any:
            lag()
            result = call(*args)
            lag()
            return result

        return delayed

    builder = interpreter_builder
    builder.grid_dim, builder.grid_idx = grid, program
    builder.set_grid_dim = builder.set_grid_idx = lambda *ignored: None
    builder.create_barrier = at_random(builder.create_barrier)
    builder.create_atomic_rmw = at_random(builder.create_atomic_rmw)
    # Tensors are where they belong; writing them back would undo what others write meanwhile.
    GridExecutor._restore_args_dev = lambda *ignored: None
    kernel[(1, 1, 1)](**arguments)


def _fork(work: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        # Python warns that other threads' locks are lost; torch runs on one here.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    try:
        warnings.simplefilter("ignore")
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _join(processes: set[int], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    failed = 0
    waiting = set(processes)
    try:
        while waiting:
            for process in list(waiting):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    waiting.remove(process)
                    failed += status != 0
            if failed:
                raise GangError(f"{failed} of {len(processes)} programs failed")
            if time.monotonic() > end:
                raise GangError(f"{len(waiting)} of {len(processes)} programs still ran")
            time.sleep(0.002)
    finally:
        for process in waiting:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
