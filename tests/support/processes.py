"""Run a program in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import textwrap
import warnings
from pathlib import Path

# Its processes are copies of one that has imported torch, which takes longer than most programs.
copies = multiprocessing.get_context("forkserver")
copies.set_forkserver_preload(["torch"])


def run_alone(program: str, **variables: str) -> str:
    """Return what a program prints, run with no variable that tritonrnn reads but these."""
    unset = ("TRITON_INTERPRET", "TRITONRNN_AUTOTUNE", "TRITONRNN_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    with tempfile.TemporaryDirectory() as folder:
        arguments = textwrap.dedent(program), environment | variables, folder
        process = copies.Process(target=_run, args=arguments)
        process.start()
        process.join(300)
        process.kill()
        process.join()
        printed, errors = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 0, errors
    return printed


def print_to(path: Path, *descriptors: int) -> None:
    """Have a file take what this process prints to its descriptors."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for descriptor in descriptors:
        os.dup2(file, descriptor)


def _run(program: str, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    print_to(Path(folder, "stdout"), 1)
    print_to(Path(folder, "stderr"), 2)
    warnings.simplefilter("error")
    exec(program, {"__name__": "__main__"})
