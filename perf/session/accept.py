"""Run ``python -m perf accept``: check on a GPU, in ten minutes, what only a GPU can show.

The steps come in the order of their worth, each with its share of the time. Nothing is repeated:
neither a test that passed nor a cell that has its row.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from perf.bench import samples
from perf.bench.environment import CHECKOUT
from perf.bench.measure import Settings
from perf.bench.run import run as run_units
from perf.bench.run import waiting
from perf.report import summary as report
from perf.report import tables
from perf.session import precompile, recorded_tests, sanitize
from perf.session.steps import Ledger, Outcome, Record, Step, take

ARCHIVE = "accept.tar.gz"
# Folder in which torch builds FlashRNN's kernels.
EXTENSIONS = "extensions"

# A few rounds of short samples, so that fifty cells fit into a few minutes.
SETTINGS = Settings(rounds=7, sample_s=0.02, max_s=10.0)
# Longer than nvcc takes to compile FlashRNN's kernels.
TIMEOUT_S = 150.0

NEEDS_GPU = Outcome("unavailable", "it needs a GPU")
TOOLS = ("memcheck", "racecheck")
SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
# Tests of the kernels against their oracle; on a GPU they run without the interpreter.
KERNEL_TESTS = tuple(
    f"tests/{name}.py"
    for name in (
        "kernels/test_recurrence",
        "kernels/test_kernels",
        "api/test_results",
    )
)


def accept(
    out: Path,
    device: str,
    budget_s: float,
    again: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Record]:
    """Run the steps that are not done in ``out`` yet, and pack their results into one archive.

    Args:
        out: Folder for all results, and for the state of the steps.
        device: Where to run. On a CPU the steps that need a GPU are unavailable, and the others run
            the preset ``smoke``.
        budget_s: Time for all steps.
        again: Names of steps to repeat.
        console: Shows the progress.

    Returns:
        The record of each step.

    Raises:
        ValueError: ``again`` names no step.
    """
    console = console or Console()
    steps = Acceptance(out.resolve(), device, console).steps()
    names = [step.name for step in steps]
    for name in again:
        if name not in names:
            raise ValueError(f"Expected a step of {', '.join(names)}, got {name!r}")
        Ledger(out).forget(name)
    return take(steps, out, budget_s, lambda message: console.print(message, style="bold"))


class Acceptance:
    """Run the steps in one folder and on one device."""

    def __init__(self, out: Path, device: str, console: Console) -> None:
        self._out, self._device, self._console = out, device, console
        self._on_gpu = torch.device(device).type == "cuda"
        self._units = samples.acceptance(device)
        if self._on_gpu:
            # For the process that builds the extensions, and for the workers that load them.
            os.environ["TORCH_EXTENSIONS_DIR"] = str(self._out / EXTENSIONS)

    def steps(self) -> list[Step]:
        """Return the steps, each with its share of ten minutes in seconds."""
        return [
            # nvcc takes most of this; without nvcc, the time goes to the other steps.
            Step("compile", 110, self.compile),
            Step("gpu tests", 80, self.gpu_tests),
            Step("sanitizer", 55, self.sanitizer),
            Step("calibrate", 25, self.calibrate),
            Step("cells", 200, self.cells),
            Step("kernel tests", 55, self.kernel_tests),
            Step("report", 12, self.report, again=True),
            Step("archive", 3, self.archive, again=True),
        ]

    def compile(self, seconds: float) -> Outcome:
        """Fill the disk caches with the kernels of the cells, and of the other epilogues."""
        if not self._on_gpu:
            return Outcome("unavailable", "nothing is compiled on a CPU")
        extensions = self._out / EXTENSIONS
        # A build that was killed left its lock behind; the next build would wait for it.
        _unlock(extensions)
        todo = precompile.tasks(self._units, every_epilogue=True)

        def launch(plan: str) -> int | None:
            # The launches that run under compute-sanitizer later, here without it.
            command = [sys.executable, "-m", "perf.session.sanitize", plan]
            return run_for(command, seconds, self._out / f"launches-{plan}.log", {})

        with ThreadPoolExecutor(len(sanitize.PLANS)) as pool:
            codes = pool.map(launch, sanitize.PLANS)
            done = list(precompile.compile_all(todo, seconds))
            launches = dict(zip(sanitize.PLANS, codes))
        _unlock(extensions)
        failed = Counter(f"{one.peer}: {one.error}" for one in done if one.error)
        message = [f"{len(done) - failed.total()} of {len(todo)} compiled"]
        message += [f"launches-{plan}.log: {code}" for plan, code in launches.items() if code]
        message += [f"{count} {error}" for error, count in failed.items()]
        # Never "unfinished": a worker compiles whatever is not in the caches.
        return Outcome("failed" if any(launches.values()) else "done", "; ".join(message))

    def gpu_tests(self, seconds: float) -> Outcome:
        """Run the tests that only a GPU can show."""
        return self._tests("gpu-tests", ("-m", "gpu"), seconds)

    def kernel_tests(self, seconds: float) -> Outcome:
        """Run the tests of the kernels, which run in the interpreter where there is no GPU."""
        return self._tests("kernel-tests", KERNEL_TESTS, seconds)

    def _tests(self, name: str, arguments: Sequence[str], seconds: float) -> Outcome:
        if not self._on_gpu:
            return NEEDS_GPU
        if importlib.util.find_spec("pytest") is None:
            return Outcome("unavailable", "pytest is not installed")
        path = self._out / f"{name}.jsonl"
        code = run_for(
            [sys.executable, "-m", "pytest", "-p", "perf.session.recorded_tests", *arguments],
            seconds,
            self._out / f"{name}.log",
            {recorded_tests.VARIABLE: str(path)},
        )
        outcomes = recorded_tests.outcomes(path)
        counts = Counter(outcomes.values())
        message = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none ran"
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        if code is None:
            return Outcome("unfinished", f"{message} so far")
        if failed:
            return Outcome("failed", f"{message}: {', '.join(failed)}")
        # 5: no test was left to run.
        if code not in (0, 5):
            return Outcome("failed", f"{message}; pytest exited with {code}, see {name}.log")
        return Outcome("done", message)

    def sanitizer(self, seconds: float) -> Outcome:
        """Run small ragged launches of each plan under compute-sanitizer, all at the same time."""
        if not self._on_gpu:
            return NEEDS_GPU
        sanitizer = find_sanitizer()
        if sanitizer is None:
            return Outcome("unavailable", "compute-sanitizer is not installed")
        path = self._out / "sanitizer.json"
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        todo = [(tool, plan) for tool in TOOLS for plan in sanitize.PLANS]
        todo = [watch for watch in todo if " ".join(watch) not in known]

        def watch(one: tuple[str, str]) -> tuple[str, str | None]:
            tool, plan = one
            log = self._out / f"sanitizer-{tool}-{plan}.log"
            log.unlink(missing_ok=True)
            code = run_for(
                [
                    *(str(sanitizer), "--tool", tool, "--error-exitcode", "9"),
                    *(sys.executable, "-m", "perf.session.sanitize", plan),
                ],
                seconds,
                log,
                # So that memory beyond a tensor belongs to no other tensor.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            return f"{tool} {plan}", None if code is None else _finding(code, log)

        with ThreadPoolExecutor(len(todo) or 1) as pool:
            found = dict(pool.map(watch, todo))
        known |= {name: finding for name, finding in found.items() if finding is not None}
        path.write_text(json.dumps(known, indent=2) + "\n")
        message = "; ".join(f"{name}: {finding}" for name, finding in known.items())
        if unfinished := [name for name, finding in found.items() if finding is None]:
            return Outcome("unfinished", f"{message}; not in time: {', '.join(unfinished)}")
        clean = all(finding.startswith("clean") for finding in known.values())
        return Outcome("done" if clean else "failed", message)

    def calibrate(self, seconds: float) -> Outcome:
        """Measure the constants of the roofline model, in a process that can be killed."""
        log = self._out / "calibrate.log"
        command = [sys.executable, "-m", "perf", "calibrate", "--device", self._device]
        code = run_for([*command, "--out", str(self._out)], seconds, log, {})
        if code is None:
            return Outcome("unfinished", "it took too long")
        if code:
            return Outcome("failed", f"exited with {code}, see {log.name}")
        content = tables.read_calibration(self._out)
        message = [f"{name} {value:.4g}" for name, value in content["measured"].items()]
        if self._on_gpu:
            message += [f"no {name}: {reason}" for name, reason in content["missing"].items()]
        broken = self._on_gpu and content["missing"]
        return Outcome("failed" if broken else "done", ", ".join(message))

    def cells(self, seconds: float) -> Outcome:
        """Measure the sample of cells beside nn.RNN, the graphed loop and FlashRNN."""
        run_units(
            self._units,
            self._out,
            SETTINGS,
            device=self._device,
            timeout_s=TIMEOUT_S,
            budget_s=seconds,
            console=self._console,
        )
        rows = tables.read_lines(self._out / tables.ROWS)
        counts = Counter(str(row["status"]) for row in rows)
        message = [", ".join(f"{count} {status}" for status, count in counts.items())]
        for mode in samples.MODES:
            speedups = [
                row["speedup_vs_nn"]
                for row in rows
                if (row["peer"], row["mode"]) == (report.OURS, mode) and "speedup_vs_nn" in row
            ]
            if speedups:
                mean = float(np.exp(np.mean(np.log(speedups))))
                message.append(f"{mode} {mean:.2f} x nn.RNN over {len(speedups)} cells")
        if left := waiting(self._units, rows):
            message.append(f"{left} of {len(self._units)} cases to go")
            return Outcome("unfinished", "; ".join(message))
        broken = [
            row
            for row in rows
            if row["peer"] == report.OURS and row["status"] in ("wrong", "error", "timeout")
        ]
        return Outcome("failed" if broken else "done", "; ".join(message))

    def report(self, seconds: float) -> Outcome:
        """Write the report of the rows."""
        if not tables.read_lines(self._out / tables.ROWS):
            return Outcome("unfinished", "there are no rows yet")
        return Outcome("done", str(report.write(self._out)))

    def archive(self, seconds: float) -> Outcome:
        """Pack the folder into one file."""
        path = self._out / ARCHIVE
        unfinished = path.with_suffix(".part")
        with tarfile.open(unfinished, "w:gz") as archive:
            for one in sorted(self._out.iterdir()):
                if one not in (path, unfinished) and one.name != EXTENSIONS:
                    archive.add(one, arcname=f"{self._out.name}/{one.name}")
        unfinished.replace(path)
        return Outcome("done", f"{path}, {path.stat().st_size / 1e3:,.0f} kB")


def run_for(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str]
) -> int | None:
    """Run a command in the checkout; kill it and all its processes if it takes too long.

    Returns:
        Its exit code, or None if it was killed.
    """
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from PATH or from a folder of CUDA's toolkit."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(SANITIZER_FOLDERS)
    )


def _finding(code: int, log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    summaries = [line.strip("= ") for line in lines if "SUMMARY" in line]
    last = summaries[-1] if summaries else next(reversed(lines), "no output")
    return f"clean, {last}" if code == 0 else f"exited with {code}, {last}"


def _unlock(folder: Path) -> None:
    for lock in folder.glob("**/lock"):
        lock.unlink()
