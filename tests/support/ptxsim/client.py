"""A process that emulates, for tests whose own process belongs to Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.ptxsim.case import Case, Result
from tests.support.ptxsim.mutations import Mutant


class Emulator:
    """``python -m tests.support.ptxsim serve``: it imports torch and Triton once for many cases."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ptxsim", "serve"],
            cwd=Path(__file__).parents[3],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def emulate(self, case: Case) -> Result:
        """Compile a case and emulate it."""
        return Result(**self._ask(case, mutate=False))

    def check(self, case: Case) -> Result:
        """Compile a case, emulate it, and fail unless it passes."""
        result = self.emulate(case)
        assert result.passed, result
        return result

    def mutate(self, case: Case) -> list[Mutant]:
        """Compile a case, mutate its PTX in every way, and emulate each mutant."""
        return [Mutant(**mutant) for mutant in self._ask(case, mutate=True)]

    def _ask(self, case: Case, mutate: bool) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"case": asdict(case), "mutate": mutate}), file=self._process.stdin)
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the emulator ended: {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]
