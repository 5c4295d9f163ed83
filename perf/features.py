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
        cells: The outcomes of the tests of each row and column.
        places: The place of the first test of each row among all tests.
        said: What the mark of a row says of its columns: "yes" where it says nothing.
        reasons: Why a row and column is not "yes".
        are_as_said: Whether every test did what its mark says.
    """

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = {}
        self.places: dict[str, int] = {}
        self.said: dict[str, dict[str, str]] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        self.are_as_said = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the outcome of a test, or of its fixtures where these decide it."""
        feature: Any
        for name, feature in report.user_properties:
            if name == "feature" and (report.when == "call" or not report.passed):
                row, column, place, self.said[row] = feature
                cell = _cell(report, self.said[row].get(column, "yes"))
                self.cells.setdefault((row, column), set()).add(cell)
                self.places[row] = min(place, self.places.get(row, place))
                if not cell.startswith(("yes", "not tried")):
                    self.reasons.setdefault((row, column), _reason(report))

    def markdown(self, differences: bool = False) -> str:
        """Return the table, whole or where we differ, and below it why a cell is not "yes".

        A cell is "yes" if each of its tests passed, and what the mark says if there is none. We
        differ from torch.nn.RNN in what one of both can't do; these rows come first.
        """
        rows: list[tuple[int, list[str]]] = []
        for row in sorted(self.places, key=self.places.__getitem__):
            said = {(row, column): {cell} for column, cell in self.said.get(row, {}).items()}
            known = said | self.cells
            cells = [_worst(known.get((row, column), {"no test"})) for column in COLUMNS]
            differs = len({cell.startswith("yes") for cell in cells}) > 1
            rows.append((cells[1].startswith("not tried") - differs, [row, *cells]))
        rows.sort(key=lambda row: row[0])
        chosen = [row for order, row in rows if order < 0 or not differences]
        table = pd.DataFrame(chosen, columns=["", *COLUMNS.values()])
        lines = [table.to_markdown(index=False), "", "Why not:", ""]
        for row, column in itertools.product(table[""], COLUMNS):
            if (row, column) in self.reasons:
                lines.append(f"- {COLUMNS[column]}, {row}: {self.reasons[row, column]}")
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
