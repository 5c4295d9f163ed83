"""Steps of a long command that is to make the most of a time: the same command goes on later.

What became of each step is written as it comes, so that the command may be killed at any moment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

STATE = "steps.json"

# done, failed and unavailable are final; a step that is unfinished goes on the next time.
STATUSES = ("done", "failed", "unavailable", "unfinished")


@dataclass(frozen=True)
class Outcome:
    """What became of a step: one of ``STATUSES``, and what there is to say of it."""

    status: str
    says: str


@dataclass(frozen=True)
class Step:
    """A part of the command.

    Attributes:
        name: Of the step, for its state and its row.
        share: Of the time, in proportion to those of the other steps; what a step leaves over is
            shared by those that follow.
        run: Does it, in about so many seconds.
        again: Whether it is done each time, as it shows what the others did.
    """

    name: str
    share: float
    run: Callable[[float], Outcome]
    again: bool = False


@dataclass(frozen=True)
class Record:
    """What is known of a step: its outcome so far, and the seconds that it took in all."""

    status: str
    seconds: float
    says: str


class Ledger:
    """The records of a folder's steps, in ``steps.json``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATE
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.records = {name: Record(**record) for name, record in content.items()}

    def write(self, name: str, record: Record) -> None:
        """Note what became of a step."""
        self.records[name] = record
        self._save()

    def forget(self, name: str) -> None:
        """Have a step done anew."""
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
    told: Callable[[str], None] = lambda what: None,
) -> dict[str, Record]:
    """Take the steps that are not done yet, one after the other.

    A step that raises has failed, and those that follow are taken all the same.

    Args:
        steps: In the order of their worth.
        folder: Keeps their state.
        budget_s: For all of them. No step is begun later; those that are done each time are.
        told: Hears which step begins, and for how long at most.

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
        told(f"{step.name}, for {allowed_s:.0f} s at most")
        started = time.monotonic()
        try:
            outcome = step.run(allowed_s)
        except Exception as exception:
            outcome = Outcome("failed", f"{type(exception).__name__}: {exception}")
        seconds = (0.0 if step.again else before.seconds) + time.monotonic() - started
        ledger.write(step.name, Record(outcome.status, seconds, outcome.says))
    return {step.name: ledger.records[step.name] for step in steps}


def _is_final(record: Record | None) -> bool:
    return record is not None and record.status != "unfinished"


def table(records: dict[str, Record]) -> str:
    """Return a row for each step, as markdown."""
    rows = [
        {
            "step": name,
            "status": one.status,
            "seconds": one.seconds,
            "says": " ".join(one.says.split()),
        }
        for name, one in records.items()
    ]
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=".1f")
