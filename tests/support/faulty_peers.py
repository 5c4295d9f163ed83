"""Peers that fail, each in its own way, and one that works."""

import os
import signal
import time
from dataclasses import replace

import torch

from perf.peers.loops import Loop


class Fine(Loop):
    name = "fine"


class Declines(Loop):
    name = "declines"

    def supports(self, case):
        return "it never does"


class Throws(Loop):
    name = "throws"

    def build(self, case, module, workload):
        raise ArithmeticError("no good\nat all")


class ThrowsLater(Loop):
    """Raises in the middle of being timed."""

    name = "throws later"

    def build(self, case, module, workload):
        runner = super().build(case, module, workload)
        calls = []

        def forward(tokens):
            calls.append(1)
            if len(calls) > 10:
                raise ArithmeticError("tired")
            return runner.forward(tokens)

        return replace(runner, forward=forward)


class Wrong(Loop):
    """Return an ``h_n`` that is off by a thousandth, and a right output."""

    name = "wrong"

    def build(self, case, module, workload):
        runner = super().build(case, module, workload)

        def forward(tokens):
            output, h_n = runner.forward(tokens)
            return output, 1.001 * h_n

        return replace(runner, forward=forward)


class NotANumber(Wrong):
    name = "not a number"

    def build(self, case, module, workload):
        runner = super().build(case, module, workload)

        def forward(tokens):
            output, h_n = runner.forward(tokens)
            return output * float("nan"), h_n

        return replace(runner, forward=forward)


class Hungry(Loop):
    name = "hungry"

    def build(self, case, module, workload):
        return torch.empty(2**50)


class Hangs(Loop):
    name = "hangs"

    def build(self, case, module, workload):
        time.sleep(3600)


class Dies(Loop):
    name = "dies"

    def build(self, case, module, workload):
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)


class Interpreted(Loop):
    """Name as its plan a variable of its process's environment."""

    name = "interpreted"

    def build(self, case, module, workload):
        plan = os.environ.get("TRITON_INTERPRET", "not set")
        return replace(super().build(case, module, workload), plan=lambda: plan)
