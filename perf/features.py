"""Make the table of features from the outcomes of the tests that prove them.

A test under ``@pytest.mark.feature("...")`` proves a row of that name, and its fixture
``implementation`` is the column. tests/api/conftest.py puts both into the report of the test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from perf.bench.environment import CHECKOUT

if TYPE_CHECKING:
    import pytest

COLUMNS = {
    "nn": "`torch.nn.RNN`",
    "torch": "`tritonrnn.RNN` on the torch path",
    "triton": "on the Triton path",
}


class Outcomes:
    """Collect the outcomes of marked tests, as a plugin of pytest.

    Attributes:
        tests: Of each test its row, column, place among all tests, cell, and why it is not "yes".
        said: What the mark of a row says of its columns: "yes" where it says nothing.
        are_as_said: Whether every test did what its mark says.
    """

    def __init__(self) -> None:
        self.tests: list[tuple[str, str, Any, str, str]] = []
        self.said: dict[str, dict[str, str]] = {}
        self.are_as_said = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the outcome of a test, or of its fixtures where these decide it."""
        feature: Any
        for name, feature in report.user_properties:
            if name == "feature" and (report.when == "call" or not report.passed):
                row, column, place, self.said[row] = feature
                cell = _cell(report, self.said[row].get(column, "yes"))
                self.tests.append((row, column, place, cell, _reason(report)))

    def markdown(self, differences: bool = False) -> str:
        """Return the table, whole or where we differ, and below it why a cell is not "yes".

        A cell is "yes" if each of its tests passed, and what the mark says if there is none. We
        differ from torch.nn.RNN in what one of both can't do; these rows come first.
        """
        names = ["row", "column", "place", "cell", "reason"]
        tests = pd.DataFrame(self.tests, columns=names).sort_values("place")
        cells = tests.groupby(["row", "column"])["cell"].agg(_worst).unstack()
        cells = cells.reindex(index=tests["row"].unique(), columns=list(COLUMNS))
        cells = cells.fillna(pd.DataFrame(self.said).T).fillna("no test")
        can = cells.apply(lambda column: column.str.startswith("yes"))
        differs = can.nunique(axis=1) > 1
        order = cells["torch"].str.startswith("not tried").astype(int) - differs
        order = (order[order < 0] if differences else order).sort_values(kind="stable")
        table = cells.loc[order.index].rename(columns=COLUMNS).reset_index(names="")
        lines = [table.to_markdown(index=False), "", "Why not:", ""]
        failed = tests[~tests["cell"].str.startswith(("yes", "not tried"))]
        reasons = failed.groupby(["row", "column"])["reason"].first()
        for row, column in itertools.product(order.index, COLUMNS):
            if (row, column) in reasons:
                lines.append(f"- {COLUMNS[column]}, {row}: {reasons[row, column]}")
        return "\n".join(lines)


def _cell(report: pytest.TestReport, said: str) -> str:
    if report.passed:
        return said if said.startswith("yes") else "yes"
    if hasattr(report, "wasxfail"):
        return said
    if report.skipped:
        return f"not tried: {_reason(report).removeprefix('Skipped: ')}"
    return "yes" if "XPASS(strict)" in str(report.longrepr) else "no"


def _worst(cells: set[str]) -> str:
    tried = {cell for cell in cells if not cell.startswith("not tried")}
    return min(tried or cells, key=lambda cell: (cell.startswith("yes"), cell))


def _reason(report: pytest.TestReport) -> str:
    crash: Any = getattr(report.longrepr, "reprcrash", None)
    # Of a skipped test it is the file, the line and the reason.
    text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    return textwrap.shorten(str(crash.message if crash else text), 160, placeholder=" ...")


def run(arguments: Sequence[str] = ()) -> Outcomes:
    """Run the marked tests, those of the package or of other arguments of pytest's."""
    import pytest

    outcomes = Outcomes()
    options = ["--rootdir", str(CHECKOUT), "-m", "feature", "--continue-on-collection-errors"]
    options += ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    options += arguments or [str(CHECKOUT / "tests" / "api")]
    # Progress goes where it does not mix with the table.
    with contextlib.redirect_stdout(sys.stderr):
        outcomes.are_as_said = pytest.main(options, plugins=[outcomes]) == 0
    return outcomes
