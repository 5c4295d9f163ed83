"""Extend pytest: write down each test's outcome at once, and leave out tests that passed before.

So an interrupted run of tests can be resumed: ``pytest -p perf.session.recorded_tests``, where the
environment variable ``PERF_RECORDED_TESTS`` names the file, with a line of JSON for each test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

VARIABLE = "PERF_RECORDED_TESTS"
# Lines that are kept of the message of a failure.
LAST_LINES = 30
PARENT = os.getppid()


def outcomes(path: Path) -> dict[str, str]:
    """Return the last outcome of each test: passed, failed or skipped."""
    if not path.exists():
        return {}
    # An incomplete line belongs to a test that did not end.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {one["test"]: one["outcome"] for one in map(json.loads, lines)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that have passed."""
    known = outcomes(Path(os.environ[VARIABLE]))
    passed = [item for item in items if known.get(item.nodeid) == "passed"]
    if passed:
        items[:] = [item for item in items if item not in passed]
        config.hook.pytest_deselected(items=passed)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down the outcome of a test: of its call, or of a fixture that failed before it."""
    if report.when != "call" and report.passed:
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        row["message"] = "\n".join(report.longreprtext.splitlines()[-LAST_LINES:])
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def pytest_runtest_logstart() -> None:
    """Stop if the command that started the tests is gone; when resumed, it runs them again."""
    if os.getppid() != PARENT:
        # Imported here, because ``perf accept`` needs this module where pytest is not installed.
        import pytest

        pytest.exit("the process that started the tests is gone")
