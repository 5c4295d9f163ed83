"""Collect the facts that the results of a run depend on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]


def new_run_id() -> str:
    """Return an id for a run that starts now, in UTC; later runs sort after earlier ones."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


def describe(device: str) -> dict[str, object]:
    """Return the facts that results on ``device`` depend on, ready for JSON."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    for package in ("torch", "triton", "tritonrnn", "flashrnn"):
        facts[package] = _version(package)
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    status = _git("status", "--porcelain")
    facts["commit"] = _git("rev-parse", "HEAD")
    facts["dirty"] = None if status is None else bool(status)
    return facts


def machine(facts: Mapping[str, object]) -> dict[str, object]:
    """Return the facts that must be equal for the times of two runs to be compared."""
    on_gpu = str(facts["device"]).startswith("cuda")
    names = ("device", "gpu") if on_gpu else ("device", "cpu", "threads")
    return {name: facts.get(name) for name in names}


def check_machines(runs: Iterable[Mapping[str, object]]) -> None:
    """Check that the times of runs on one device can be compared, given the facts of each run.

    Raises:
        ValueError: a device has been on two machines.
    """
    known: dict[object, dict[str, object]] = {}
    for here in map(machine, runs):
        there = known.setdefault(here["device"], here)
        if there != here:
            raise ValueError(f"Runs of different machines: {there} and {here}")


def _driver() -> str | None:
    # It may be missing, and has exceptions of its own.
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return None


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _cpu_model() -> str:
    # platform.processor() is empty on most Linux machines.
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str | None:
    command = ("git", *arguments)
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return None
