"""A pytest plugin that writes down each test's outcome at once, and skips those that passed before.

So a run of tests that is cut off can be taken up where it was: ``pytest -p perf.recorded_tests``
with the environment variable ``PERF_RECORDED_TESTS`` naming the file, a line of JSON for each test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "PERF_RECORDED_TESTS"
# Those that are kept of what a failure says.
LAST_LINES = 30
PARENT = os.getppid()


def outcomes(path: Path) -> dict[str, str]:
    """Return, for each test, how it ended the last time: passed, failed or skipped."""
    if not path.exists():
        return {}
    # A line that was cut short is of a test that did not end.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {one["test"]: one["outcome"] for one in map(json.loads, lines)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    known = outcomes(Path(os.environ[VARIABLE]))
    passed = [item for item in items if known.get(item.nodeid) == "passed"]
    if passed:
        items[:] = [item for item in items if item not in passed]
        config.hook.pytest_deselected(items=passed)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down how a test ended: by its call, or by a fixture that did not get that far."""
    if report.when != "call" and report.passed:
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        row["says"] = "\n".join(report.longreprtext.splitlines()[-LAST_LINES:])
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def pytest_runtest_logstart() -> None:
    """Stop where the command that ran the tests is gone, which will run them again."""
    if os.getppid() != PARENT:
        pytest.exit("whoever ran the tests is gone")
