"""Run the steps of a long command within a budget of time; the same command continues later.

The outcome of each step is written at once, so that the command may be killed at any moment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from perf.report.tables import renamed

STATE = "steps.json"

# done, failed and unavailable are final; an unfinished step continues the next time.
STATUSES = ("done", "failed", "unavailable", "unfinished")


@dataclass(frozen=True)
class Outcome:
    """Hold the outcome of a step: one of ``STATUSES``, and a message."""

    status: str
    message: str


@dataclass(frozen=True)
class Step:
    """Describe a part of the command.

    Attributes:
        name: The name of the step, in its state and its row.
        share: Its share of the time, relative to the other steps; the later steps share what it
            does not use.
        run: Runs the step in about the given seconds.
        again: Whether it runs each time, because it shows the results of the others.
    """

    name: str
    share: float
    run: Callable[[float], Outcome]
    again: bool = False


@dataclass(frozen=True)
class Record:
    """Hold the outcome of a step so far, and the seconds that it took in all."""

    status: str
    seconds: float
    message: str


class Ledger:
    """Keep the records of a folder's steps in ``steps.json``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATE
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.records = {name: Record(**renamed(record)) for name, record in content.items()}

    def write(self, name: str, record: Record) -> None:
        """Write the record of a step."""
        self.records[name] = record
        self._save()

    def forget(self, name: str) -> None:
        """Delete the record of a step, so that it runs again."""
        self.records.pop(name, None)
        self._save()

    def _save(self) -> None:
        content = {name: asdict(record) for name, record in self.records.items()}
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(self._path)


def take(
    steps: Sequence[Step],
    folder: Path,
    budget_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> dict[str, Record]:
    """Run the steps that are not done yet, one after the other.

    A step that raises has failed; the later steps run all the same.

    Args:
        steps: The steps, in the order of their worth.
        folder: Folder for their state.
        budget_s: Time for all steps. When it is spent, only the steps that run each time begin.
        log: Called with a message when a step begins.

    Returns:
        The record of each step.
    """
    ledger = Ledger(folder)
    deadline = time.monotonic() + budget_s
    waiting = [step for step in steps if step.again or not _is_final(ledger.records.get(step.name))]
    for place, step in enumerate(waiting):
        before = ledger.records.get(step.name, Record("unfinished", 0.0, "not begun"))
        left_s = deadline - time.monotonic()
        if left_s <= 0 and not step.again:
            ledger.write(step.name, before)
            continue
        allowed_s = max(0.0, left_s) * step.share / sum(one.share for one in waiting[place:])
        ledger.write(step.name, Record("unfinished", before.seconds, "cut off"))
        log(f"{step.name}, for {allowed_s:.0f} s at most")
        started = time.monotonic()
        try:
            outcome = step.run(allowed_s)
        except Exception as exception:
            outcome = Outcome("failed", f"{type(exception).__name__}: {exception}")
        seconds = (0.0 if step.again else before.seconds) + time.monotonic() - started
        ledger.write(step.name, Record(outcome.status, seconds, outcome.message))
    return {step.name: ledger.records[step.name] for step in steps}


def _is_final(record: Record | None) -> bool:
    return record is not None and record.status != "unfinished"


def table(records: dict[str, Record]) -> str:
    """Return a markdown table with a row for each step."""
    rows = [
        {
            "step": name,
            "status": one.status,
            "seconds": one.seconds,
            "message": " ".join(one.message.split()),
        }
        for name, one in records.items()
    ]
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=".1f")
