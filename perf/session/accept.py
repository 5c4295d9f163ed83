"""Run ``python -m perf accept``: all that only a GPU can show, in pieces of nine minutes.

A step is a command with a limit. Its outcome is written to ``steps.json`` at once, its output to a
log, and everything is packed after each step. So the session may be killed at any moment; when it
is run again, it does the steps that are not done.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path

import pandas as pd

from perf import peers
from perf.bench import environment
from perf.report import tables
from tritonrnn.kernels.plan import PLANS

# The pieces, and the longest time of a step of each.
LIMITS_S = {"right": 240.0, "fast": 300.0, "why": 200.0}
PIECES = tuple(LIMITS_S)
STATE, ARCHIVE = "steps.json", "accept.tar.gz"
# Folders of what is compiled: FlashRNN by torch, all else by Triton, which holds the records of
# trials too. Only these are packed.
EXTENSIONS, TRITON, TRIALS = "extensions", "triton", "triton/tritonrnn"

# Of the other states, "unfinished" is a step whose time the budget cut, "timeout" one that took all
# of its own: it continues when all others had their turn.
FINAL = ("done", "failed", "unavailable")
# pytest's exit code where there is no test to run.
NOTHING_TO_RUN = 5

# Time that is kept for the report and the archive; time that is not worth beginning a step.
LAST_S, SHORTEST_S = 40.0, 10.0
POLL_S, KILL_AFTER_S = 0.1, 10
PRCTL, PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1
# Processes that share one GPU while they compile kernels and check results; one process times.
MOST_PROCESSES = 8

# Tests of the kernels against their oracle; on a GPU they run without the interpreter.
KERNEL_TESTS = (
    "tests/kernels/test_recurrence.py tests/kernels/test_kernels.py tests/api/test_results.py"
)
TOOL_FOLDERS = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
)


@dataclass(frozen=True)
class Step:
    """Describe a step: its piece, its command, its limit, and why it can't run here, if so."""

    piece: str
    name: str
    command: Sequence[str]
    seconds: float
    unavailable: str | None = None

    @property
    def log(self) -> str:
        """The name of its log."""
        return f"{self.name.replace(' ', '-')}.log"


@dataclass(frozen=True)
class Record:
    """Hold the state of a step, the seconds that it took in all, and the end of its output."""

    status: str = "not begun"
    seconds: float = 0.0
    message: str = ""


def steps(out: Path, device: str) -> list[Step]:
    """Return the steps: is it right, then how fast is it, then why.

    A fault of the GPU fails whatever its process does next, so each plan and each file of tests
    has a process of its own.

    Args:
        out: Folder for all results.
        device: ``cuda``, or ``cpu``: kernels then run in Triton's interpreter, cells are those of
            the preset ``smoke``, and what needs a GPU is unavailable.
    """
    found: list[Step] = []

    def add(piece: str, name: str, command: str, unavailable: str | None = None) -> None:
        found.append(Step(piece, name, tuple(shlex.split(command)), LIMITS_S[piece], unavailable))

    def test(name: str, arguments: str, unavailable: str | None = None) -> None:
        # When they are repeated, those that failed come first.
        cache = shlex.quote(f"cache_dir={out / 'pytest' / name}")
        # Warnings of versions that are not pinned here are no failures.
        options = f"--tb=short --maxfail=20 -W default::DeprecationWarning --ff -o {cache}"
        add("right", name, f"{python} -m pytest {options} {arguments}", unavailable)

    on_gpu = device != "cpu"
    needs_gpu = None if on_gpu else "it needs a GPU"
    python, to = shlex.quote(sys.executable), f"--device {device} --out {shlex.quote(str(out))}"

    # The kernels compile for this GPU, side by side, and their results are right.
    launches = f"{python} -m perf.session.launches"
    padded, packed = ("headline", "packed") if on_gpu else ("smoke", "smoke")
    tune = f"{python} -m perf tune {to} --preset {padded}"
    for plan in PLANS:
        add("right", f"launches {plan}", f"{launches} {plan}")
    for plan in PLANS:
        trials = f"env TRITONRNN_AUTOTUNE=verify {tune} --plan {plan}"
        add("right", f"trials {plan}", trials, needs_gpu)
    for plan in (*PLANS, f"not ({' or '.join(PLANS)})"):
        test(f"tests {plan if plan in PLANS else 'of all plans'}", f"{KERNEL_TESTS} -k '{plan}'")
    for path in sorted((environment.CHECKOUT / "tests").glob("*/test_*.py")):
        if re.search(r"mark\.gpu|on_gpu", path.read_text()):
            arguments = f"{path.relative_to(environment.CHECKOUT)} -m gpu"
            test(f"gpu {path.stem.removeprefix('test_')}", arguments, needs_gpu)

    # Neither an access out of bounds nor a race. Without a cache of memory, what lies beyond a
    # tensor belongs to no other tensor.
    sanitizer, missing = find_tool("compute-sanitizer")
    for tool, plan in product(("memcheck", "racecheck"), PLANS):
        checked = f"{sanitizer} --tool {tool} --error-exitcode 9 {launches} {plan}"
        checked = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {checked}"
        add("right", f"{tool} {plan}", checked, needs_gpu or missing)

    # Trials of all plans, then whole calls: a few rounds of short samples, so that many cells fit
    # into a few minutes.
    run = f"{python} -m perf run {to} --rounds 7 --seconds 0.02 --max-seconds 10"
    rivals = f"tritonrnn,{peers.baseline(device)}"
    add("fast", "calibrate", f"{python} -m perf calibrate {to}")
    add("fast", "tune", tune, needs_gpu)
    add("fast", "padded", f"{run} --preset {padded} --layout padded --peers {rivals},loop_graphed")
    add("fast", "packed", f"{run} --preset {packed} --layout packed --peers {rivals}")
    sizes = "--T 1024 --B 16 --H 256,512,768 --dtype bf16"
    missing = None if importlib.util.find_spec("flashrnn") else "flashrnn is not installed"
    rivals += ",flashrnn,flashrnn-alternating"
    flash = f"{run} --preset headline {sizes} --peers {rivals}"
    add("fast", "flashrnn", flash, needs_gpu or missing)

    # The plans beside each other, and what a profiler says of each; the clocks stay as they are.
    plans = ",".join(name for name in peers.PEERS if name.startswith("tritonrnn"))
    add("why", "plans", f"{run} --preset {padded} --layout padded --peers {plans}")
    ncu, missing = find_tool("ncu")
    for plan in PLANS:
        profile = f"{ncu} --set full --clock-control none -k regex:{plan} -c 4 --page details -f"
        profile = f"{profile} -o {shlex.quote(str(out / f'profile-{plan}'))} {launches} {plan}"
        add("why", f"profile {plan}", profile, needs_gpu or missing)
    return found


def find_tool(name: str) -> tuple[str, str | None]:
    """Return the path of a tool of CUDA's, and None or why there is none."""
    folders = [folder for pattern in TOOL_FOLDERS for folder in sorted(glob.glob(pattern))]
    path = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *folders]))
    return path or name, None if path else f"{name} is not installed"


class Session:
    """Run steps in a folder, keep their records, and pack it all.

    Args:
        out: Folder for all results.
        archive: File into which they are packed.
        device: Where the steps run.

    Raises:
        ValueError: the steps of ``out`` ran on another machine.
    """

    def __init__(self, out: Path, archive: Path, device: str) -> None:
        self._out, self._archive = out, archive
        # A build that was killed left its lock behind, for which the next would wait.
        for lock in (out / EXTENSIONS).glob("**/lock"):
            lock.unlink()
        self._environment = os.environ | {
            "TORCH_EXTENSIONS_DIR": str(out / EXTENSIONS),
            "TRITON_CACHE_DIR": str(out / TRITON),
        }
        if device == "cpu":
            self._environment["TRITON_INTERPRET"] = "1"
        self._machine = environment.machine(environment.describe(device))
        path = out / STATE
        known = json.loads(path.read_text()) if path.exists() else {}
        if known and known["machine"] != self._machine:
            raise ValueError(f"{out} is of {known['machine']}; here it is {self._machine}")
        records = known.get("steps", {})
        self.records = {name: Record(**record) for name, record in records.items()}
        out.mkdir(parents=True, exist_ok=True)

    def record(self, step: Step) -> Record:
        """Return what is known of a step."""
        if step.unavailable:
            return Record("unavailable", 0.0, step.unavailable)
        return self.records.get(step.name, Record())

    def run(self, todo: Sequence[Step], deadline: float, processes: int = 1) -> None:
        """Run steps, so many at a time; begin none for which no time is left."""
        waiting = list(todo)
        running: dict[Step, tuple[float, float, subprocess.Popen[bytes]]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    step = waiting.pop(0)
                    limit_s = min(step.seconds, deadline - time.monotonic())
                    if limit_s >= SHORTEST_S:
                        print(f"{step.name}, for {limit_s:.0f} s at most", flush=True)
                        self._write(step, replace(self.record(step), status="running"))
                        running[step] = time.monotonic(), limit_s, self._start(step, limit_s)
                for step in [step for step in running if running[step][-1].poll() is not None]:
                    started, limit_s, process = running.pop(step)
                    self._end(step, process.returncode, time.monotonic() - started, limit_s)
                time.sleep(POLL_S)
        finally:
            for *_, process in running.values():
                process.send_signal(signal.SIGINT)
            for *_, process in running.values():
                process.wait()

    def _start(self, step: Step, limit_s: float) -> subprocess.Popen[bytes]:
        """Start a command, which is interrupted when its time is up or this process is gone."""
        limit = ("timeout", "--signal=INT", f"--kill-after={KILL_AFTER_S}", f"{limit_s:.2f}")
        with (self._out / step.log).open("a") as log:
            log.write(f"$ {shlex.join(step.command)}\n")
            log.flush()
            return subprocess.Popen(
                (*limit, *step.command),
                cwd=environment.CHECKOUT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: PRCTL(PR_SET_PDEATHSIG, signal.SIGINT),
            )

    def _end(self, step: Step, code: int, seconds: float, limit_s: float) -> None:
        if code and seconds >= limit_s:
            status = "timeout" if limit_s == step.seconds else "unfinished"
        else:
            status = {0: "done", NOTHING_TO_RUN: "unavailable"}.get(code, "failed")
        text = (self._out / step.log).read_text(errors="replace")
        lines = [line.strip("= ") for line in text.splitlines() if not line.startswith("$ ")]
        message = next(filter(None, reversed(lines)), "")
        if status == "failed":
            message = f"exited with {code}, see {step.log}: {message}"
        self._write(step, Record(status, self.record(step).seconds + seconds, message))
        self.pack()

    def _write(self, step: Step, record: Record) -> None:
        self.records[step.name] = record
        steps = {name: asdict(record) for name, record in self.records.items()}
        unfinished = self._out / f"{STATE}.part"
        unfinished.write_text(json.dumps({"machine": self._machine, "steps": steps}, indent=2))
        unfinished.replace(self._out / STATE)

    def pack(self) -> None:
        """Pack the folder into one file, but for what is compiled."""
        unfinished = self._archive.with_suffix(".part")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        left_out = {self._archive, unfinished, self._out / EXTENSIONS, self._out / TRITON}
        with tarfile.open(unfinished, "w:gz") as packed:
            for path in (*self._out.iterdir(), self._out / TRIALS):
                if path.exists() and path not in left_out:
                    packed.add(path, Path(self._out.name) / path.relative_to(self._out))
        unfinished.replace(self._archive)


def accept(
    out: Path,
    device: str,
    budget_s: float,
    pieces: Sequence[str] = PIECES,
    again: Sequence[str] = (),
    archive: Path | None = None,
) -> dict[str, Record]:
    """Run the steps that are not done in ``out`` yet, report, and pack all into one archive.

    The arguments are the options of the command.

    Returns:
        The record of each step of the pieces.

    Raises:
        ValueError: a name is not known, or the steps of ``out`` ran on another machine.
    """
    out, deadline = out.resolve(), time.monotonic() + budget_s
    wanted = [step for step in steps(out, device) if step.piece in pieces]
    for names, known in ((pieces, PIECES), (again, [step.name for step in wanted])):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"Expected any of {', '.join(known)}, got {', '.join(unknown)}")
    session = Session(out, (archive or out / ARCHIVE).resolve(), device)
    for name in again:
        session.records.pop(name, None)
    todo = [step for step in wanted if session.record(step).status not in FINAL]

    def turn(step: Step) -> tuple[bool, int]:
        return session.record(step).status == "timeout", PIECES.index(step.piece)

    together = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    for (_, piece), group in groupby(sorted(todo, key=turn), turn):
        processes = together if PIECES[piece] == "right" else 1
        session.run(list(group), deadline - LAST_S, processes)
    if (out / tables.ROWS).exists():
        command = (sys.executable, "-m", "perf", "report", str(out))
        session.run([Step("", "report", command, LAST_S)], deadline)
    session.pack()
    return {step.name: session.record(step) for step in wanted}


def table(records: dict[str, Record]) -> str:
    """Return a markdown table with a row for each step."""
    rows = pd.DataFrame({"step": name, **asdict(record)} for name, record in records.items())
    return rows.to_markdown(index=False, floatfmt=".1f")
