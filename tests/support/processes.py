"""Run a program in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_alone(program: str, **variables: str) -> str:
    """Return what a program prints, run with no variable that tritonrnn reads but these."""
    unset = ("TRITON_INTERPRET", "TRITONRNN_BACKEND")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env={name: value for name, value in os.environ.items() if name not in unset} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
