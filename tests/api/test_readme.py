"""README keeps its word: its examples run, and CI runs its tests."""

import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_run():
    examples = re.findall(r"^ *```python\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 2
    names: dict = {"torch": torch}
    for example in examples:
        exec(textwrap.dedent(example), names)


@pytest.mark.parametrize("before", ["", "```sh\necho an example\n```\n\n"])
def test_ci_runs_the_marked_block_wherever_it_stands(tmp_path, before):
    (tmp_path / "README.md").write_text(before + README)
    block = subprocess.check_output(
        ["awk", "-f", str(ROOT / ".ci" / "test-block"), str(tmp_path / "README.md")], text=True
    )
    assert [line.split()[1] for line in block.splitlines()] == ["-m", "install", "-m"]
    assert "pytest" in block.splitlines()[-1]
