"""Compile kernels, emulate them and check them; exit status 1 on any fault.

``python -m tests.support.ptxsim --plan resident ...`` runs one case, ``... sweep`` a covering
sample of all cases until time is up, ``... mutations`` every mutation of a few kernels. ``...
serve`` answers requests, one JSON object a line.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import triton

from tests.support.ptxsim.case import CHOICES, Case, Prepared, Result
from tests.support.ptxsim.mutations import CASES, SCHEDULES, judge
from tests.support.ptxsim.sample import sample


def case_command(arguments: list[str]) -> int:
    """Run one case, or one of each plan."""
    parser = argparse.ArgumentParser("python -m tests.support.ptxsim", description=__doc__)
    for field in fields(Case):
        option, kind = f"--{field.name}", type(field.default)
        if kind is tuple:
            parser.add_argument(option, type=int, nargs="*", default=())
        elif kind is bool:
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=field.default
            )
        else:
            choices = CHOICES.get(field.name)
            parser.add_argument(option, type=kind, default=field.default, choices=choices)
    parser.add_argument("--all", action="store_true", help="every plan that fits")
    parser.add_argument("--ptx", type=Path, help="emulate this file in place of what is compiled")
    parser.add_argument("--dump", type=Path, help="write the PTX to this file")
    options = vars(parser.parse_args(arguments))
    every, text, dump = (options.pop(name) for name in ("all", "ptx", "dump"))
    options["lengths"] = tuple(options["lengths"])
    status = 0
    for plan in CHOICES["plan"] if every else [options["plan"]]:
        case = Case(**(options | {"plan": plan}))
        if case.launch_plan is None:
            print(f"{case}\n    does not fit")
            status |= not every
            continue
        prepared = Prepared(case)
        if dump:
            dump.write_text(prepared.ptx)
        result = prepared.emulate(text.read_text() if text else None)
        print(f"{case}\n    {prepared.plan}\n    {result}", flush=True)
        status |= not result.passed
    return status


def sweep_command(arguments: list[str]) -> int:
    """Run covering samples of all cases, each of another seed, until time is up."""
    parser = argparse.ArgumentParser("python -m tests.support.ptxsim sweep")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--plan", choices=CHOICES["plan"], help="only cases of this plan")
    options = parser.parse_args(arguments)
    end, seed, failed = time.monotonic() + 60 * options.minutes, options.seed, 0
    results: dict[str, list[Result]] = defaultdict(list)
    while time.monotonic() < end:
        for case in sample(100, seed, wide=True):
            if options.plan not in (None, case.plan) or time.monotonic() > end:
                continue
            result = Prepared(case).emulate()
            results[f"{case.plan} | {case.arch} | {case.arithmetic}"].append(result)
            if not result.passed:
                failed += 1
                print(f"{case}\n    {result}", flush=True)
        seed += 1
    print("| plan | arch | arithmetic | runs | failed | worst error / allowed | instructions | s |")
    print("|---|---|---|---|---|---|---|---|")
    for key, some in sorted(results.items()):
        worst = max(result.max_error / result.allowed for result in some)
        print(
            f"| {key} | {len(some)} | {sum(not result.passed for result in some)} | {worst:.2f} "
            f"| {sum(result.instructions for result in some)} "
            f"| {sum(result.compile_s + result.emulate_s for result in some):.0f} |"
        )
    runs = sum(map(len, results.values()))
    print(f"{runs} runs, seeds {options.seed} to {seed - 1}: {failed} failed")
    return int(failed > 0)


def mutations_command(arguments: list[str]) -> int:
    """Mutate each kernel in every way, one at a time, and print what is not noticed."""
    parser = argparse.ArgumentParser("python -m tests.support.ptxsim mutations")
    parser.add_argument("--plan", choices=CHOICES["plan"], help="only kernels of this plan")
    parser.add_argument("--every", action="store_true", help="loads, stores and products, too")
    parser.add_argument("--schedules", type=int, help="the first so many, not those known to do")
    options = parser.parse_args(arguments)
    schedules = range(options.schedules) if options.schedules else SCHEDULES
    for case in CASES.values():
        if options.plan in (None, case.plan):
            mutants = judge(Prepared(case), options.every, schedules)
            unnoticed = [mutant for mutant in mutants if not mutant.fault]
            print(f"{case}: {len(mutants) - len(unnoticed)} of {len(mutants)} noticed")
            for mutant in unnoticed:
                print(f"    line {mutant.line}: {mutant.change}")
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        lengths = tuple(request["case"]["lengths"])
        prepared = Prepared(Case(**{**request["case"], "lengths": lengths}))
        if request["mutate"]:
            return {"result": [asdict(mutant) for mutant in judge(prepared)]}
        return {"result": asdict(prepared.emulate())}
    except Exception:
        return {"error": traceback.format_exc()}


def serve_command(arguments: list[str]) -> int:
    """Run or mutate the case of each request, until there are none."""
    # Whatever else is printed is no answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)
    return 0


def main(arguments: list[str]) -> int:
    """Run the command that the arguments name."""
    if triton.knobs.runtime.interpret:
        sys.exit("Nothing is compiled where TRITON_INTERPRET is set.")
    torch.set_num_threads(1)
    # What torch and Triton have allocated need not be searched for garbage again and again.
    gc.freeze()
    gc.set_threshold(100_000)
    commands = {"sweep": sweep_command, "mutations": mutations_command, "serve": serve_command}
    command = commands.get(arguments[0]) if arguments else None
    with tempfile.TemporaryDirectory() as cache:
        # Kernels without machine code must not be found by others.
        triton.knobs.cache.dir = cache
        return command(arguments[1:]) if command else case_command(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
