"""``python -m perf features``: a table made from tests, and README's copy of it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from perf.features import COLUMNS, Outcomes

CHECKOUT = Path(__file__).parents[2]


def test_readme_has_the_rows_in_which_the_marks_differ():
    """Each test is held to its mark, so that the outcomes are what the marks say."""
    said = Outcomes()
    for path in sorted((CHECKOUT / "tests" / "api").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(ast.Attribute(attr="feature"), [row], expected):
                    cells = {one.arg: ast.literal_eval(one.value) for one in expected}
                    place = (path.name, node.lineno)
                    for column in COLUMNS:
                        test = (ast.literal_eval(row), column, place, cells.get(column, "yes"), "")
                        said.tests.append(test)
    table, _, _ = said.markdown(differences=True).partition("\n\n")
    assert len(table.splitlines()) > 10
    assert table in (CHECKOUT / "README.md").read_text(), table


OUTCOMES = """
import pytest
import torch

@pytest.mark.feature("ours alone", nn="not there")
def test_ours_alone(implementation):
    assert implementation.name != "nn", "the message"

@pytest.mark.feature("broken")
@pytest.mark.parametrize("part", [1, 2])
def test_broken(implementation, part):
    assert (implementation.name, part) != ("torch", 2), "of a part"

@pytest.mark.feature("learnt since", nn="no")
def test_learnt_since(implementation):
    pass

@pytest.mark.feature("an error of the test", nn="no")
def test_error(implementation):
    unknown

@pytest.mark.feature("left to torch", triton="yes, on torch")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_left_to_torch(implementation, dtype):
    implementation.rnn(3, 5, dtype=dtype)(torch.ones(4, 2, 3, dtype=dtype))

@pytest.mark.feature("served by a kernel", triton="yes, on torch")
def test_served_by_a_kernel(implementation):
    module, x = implementation.rnn(3, 5), torch.ones(4, 2, 3)
    module.to(implementation.device)(x.to(implementation.device))

@pytest.mark.feature("of ours", nn="has none of its own")
@pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
def test_of_ours(implementation):
    pass

@pytest.mark.feature("skipped")
def test_skipped(implementation):
    pytest.skip("needs the moon")
"""


@pytest.mark.slow
def test_command_prints_the_outcomes_of_marked_tests_and_why(tmp_path):
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    options = ["-c", str(CHECKOUT / "pyproject.toml"), "-n", "0"]
    options += ["-p", "tests.conftest", "-p", "tests.api.conftest"]
    done = subprocess.run(
        [sys.executable, "-m", "perf", "features", str(tmp_path), "--", *options],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:10]]
    assert rows == [
        ["ours alone", "not there", "yes", "yes"],
        ["broken", "yes", "no", "yes"],
        ["served by a kernel", "yes", "yes", "no"],
        ["of ours", "has none of its own", "yes", "yes"],
        ["learnt since", "yes", "yes", "yes"],
        ["an error of the test", "no", "no", "no"],
        ["left to torch", "yes", "yes", "yes, on torch"],
        ["skipped", *["not tried: needs the moon"] * 3],
    ], done.stderr
    assert f"- {COLUMNS['nn']}, ours alone: AssertionError: the message" in done.stdout
    assert f"- {COLUMNS['torch']}, broken: AssertionError: of a part" in done.stdout
    assert "a kernel serves what the mark leaves to torch" in done.stdout
    assert "name 'unknown' is not defined" in done.stdout
    assert done.returncode == 1
