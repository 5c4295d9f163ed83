"""What trials found, in memory and as JSON files that all processes share.

A file is written aside and then linked to its name: so it is complete, and the first one stands. A
folder belongs to one kind of GPU, with one driver, torch, Triton and source of the kernels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints
from uuid import uuid4

import triton

from tritonrnn.kernels.plan import PLANS

log = logging.getLogger("tritonrnn")

# Seconds after which a trial on another host, whose processes can't be seen, has ended. It takes
# less than a minute.
LONGEST_S = 600.0


@dataclass(frozen=True)
class Kernel:
    """What is compiled, as far as it can change the numbers: key of a record *right*.

    Args:
        plan: name of the plan.
        epilogue: "tanh", "relu", "tanh_grad" or "relu_grad", which names the pass too.
        dtype: "bf16", "fp16" or "fp32".
        tf32: whether fp32 products may round their operands to TF32.
        G, H: groups, and hidden units of a group.
        mapped: whether rows come from a row map, not from two strides.
        v_0: whether v_0 is given.
    """

    plan: str
    epilogue: str
    dtype: str
    tf32: bool
    G: int
    H: int
    mapped: bool
    v_0: bool

    def __str__(self) -> str:
        rows = ", mapped rows" if self.mapped else ""
        return (
            f"{self.epilogue}, {_arithmetic(self)}, G={self.G} H={self.H}{rows}"
            f"{', v_0' if self.v_0 else ''}"
        )


@dataclass(frozen=True)
class Shapes:
    """A class of calls that take about the same time by a plan: key of a record *fast*.

    Args:
        plan: name of the plan.
        nonlinearity: "tanh" or "relu".
        dtype, tf32, G, H, mapped: as of :class:`Kernel`.
        hx: whether initial states are given.
        ragged: whether torch's own kernels don't take the layout.
        training: whether the backward pass counts.
        T, B, I: steps, sequences and input size, rounded up to a power of two; T is 128 at most.
        L: layers, 2 at most.
    """

    plan: str
    nonlinearity: str
    dtype: str
    tf32: bool
    G: int
    H: int
    mapped: bool
    hx: bool
    ragged: bool
    training: bool
    T: int
    B: int
    I: int  # noqa: E741 (the dimension key's)
    L: int

    def __str__(self) -> str:
        rows = ", ragged" if self.ragged else ", packed" if self.mapped else ""
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in "TBIHGL")
        return (
            f"{self.nonlinearity}, {_arithmetic(self)}, {sizes}{rows}{', hx' if self.hx else ''}, "
            f"{'training' if self.training else 'inference'}"
        )


def _arithmetic(key: Kernel | Shapes) -> str:
    return "tf32" if key.tf32 else key.dtype


Key = Kernel | Shapes
KINDS: dict[str, type[Any]] = {"right": Kernel, "fast": Shapes}
# Of files. Ties, and failures that pass, are not written.
VERDICTS = {"right": ("right", "wrong", "failed"), "fast": ("faster", "slower", "failed")}


@dataclass(frozen=True)
class Record:
    """What a trial found.

    Args:
        key: of what.
        verdict: of a kernel "right", "wrong" or "failed"; of shapes "faster", "slower", "tie" or
            "failed".
        reason: why, in one line.
        seconds: that the trial took.
        error: of a kernel, the largest error in any result, as a share of what is allowed.
        plan_us, other_us: of shapes, the quartiles of the time of a call by the plan, and by what
            it was timed against.
        against: the path or plan that it was timed against, or "".
        host, pid, when: where and when, in seconds since 1970.
    """

    key: Key
    verdict: str
    reason: str
    seconds: float
    error: float = 0.0
    plan_us: tuple[float, float, float] = (0.0, 0.0, 0.0)
    other_us: tuple[float, float, float] = (0.0, 0.0, 0.0)
    against: str = ""
    host: str = ""
    pid: int = 0
    when: float = 0.0

    @property
    def kind(self) -> str:
        """Return "right" or "fast"."""
        return "right" if isinstance(self.key, Kernel) else "fast"

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        return f"{self.cause} for {self.key}; {when} on {self.host}"

    @property
    def cause(self) -> str:
        """Return what was found."""
        plan = f"the plan {self.key.plan}"
        if self.verdict == "wrong":
            return f"{plan} computes wrong numbers ({self.reason})"
        if self.verdict == "failed":
            return f"{plan} failed in its trial ({self.reason})"
        if self.verdict == "right":
            return f"{plan} is right ({self.reason})"
        return f"{plan} is {self.verdict} ({self.reason} of {self.against})"


class Store:
    """The records of one kind of device.

    Args:
        device: what identifies it: name, limits, driver, versions, source.
    """

    def __init__(self, device: Mapping[str, str | int]) -> None:
        self.device = dict(device)
        self.folder = root() / _digest(self.device)
        # Of this process only, and copies of files.
        self._known: dict[Key, Record] = {}
        self._is_writable = True

    def get(self, key: Key) -> Record | None:
        """Return the record of a key, or None without a valid one."""
        known = self._known.get(key)
        if known is None:
            known = self._read(self._path(key))
            if known is not None and known.key == key:
                self._known[key] = known
            else:
                known = self._of_the_dead(key)
        return known

    def remember(self, record: Record) -> Record:
        """Keep a record in this process only."""
        record = _signed(record)
        self._known[record.key] = record
        return record

    def put(self, record: Record) -> Record:
        """Keep a record for all processes. Return it, or the one that another process wrote first.

        Where nothing can be written, it is kept in this process.
        """
        path, record = self._path(record.key), _signed(record)
        aside = self._write_aside(path.stem, {"device": self.device, **_plain(record)})
        if aside is not None:
            try:
                os.link(aside, path)
            except FileExistsError:
                first = self._read(path)
                if first is not None and first.key == record.key:
                    record = first
                else:
                    # Damaged, or of another version of this file.
                    os.replace(aside, path)
            except OSError:
                # A file system without links.
                os.replace(aside, path)
            aside.unlink(missing_ok=True)
        self._known[record.key] = record
        return record

    def start(self, key: Key) -> Path | None:
        """Leave a mark that a trial of the key has started, for :meth:`end` to remove.

        Should the process die meanwhile, the mark says what it died of.
        """
        name = _digest(asdict(key))
        aside = self._write_aside(name, {"device": self.device, **_plain(_mark(key))})
        if aside is None:
            return None
        return aside.rename(self.folder / f"{name}.{uuid4().hex[:8]}.started")

    def end(self, mark: Path | None) -> None:
        """Remove a mark."""
        if mark is not None:
            mark.unlink(missing_ok=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each record of this process that no file holds."""
        for record in list(self._known.values()):
            if self._read(self._path(record.key)) is None:
                yield _row(self.device, record)

    def _path(self, key: Key) -> Path:
        return self.folder / f"{_digest(asdict(key))}.json"

    def _read(self, path: Path) -> Record | None:
        found = _load(path)
        return found[1] if found is not None and found[0] == self.device else None

    def _of_the_dead(self, key: Key) -> Record | None:
        """Return a record of failure if a process ended in a trial of the key, which it writes."""
        for path in self.folder.glob(f"{_digest(asdict(key))}.*.started"):
            mark = self._read(path)
            if mark is not None and mark.key == key and not _may_be_running(mark):
                why = f"process {mark.pid} of {mark.host} ended in its trial"
                failed = self.put(Record(key, "failed", why, 0.0))
                path.unlink(missing_ok=True)
                return failed
        return None

    def _write_aside(self, name: str, content: dict[str, Any]) -> Path | None:
        path = self.folder / f".{name}.{uuid4().hex[:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        except OSError as error:
            if self._is_writable:
                log.warning("Trials are remembered by this process only: %s", error)
            self._is_writable = False
            return None
        return path


def root() -> Path:
    """Return the folder of all devices' records, in Triton's cache."""
    return Path(triton.knobs.cache.dir) / "tritonrnn"


def stored_rows() -> Iterator[dict[str, Any]]:
    """Yield a row for each valid record of every device, and for each trial that has started."""
    for path in sorted(root().glob("*/*")):
        found = _load(path)
        if found is not None:
            yield _row(*found)


@functools.cache
def source_digest(folder: Path) -> str:
    """Return a digest of the Python files of a folder."""
    sources = sorted(folder.glob("*.py"))
    return _digest({path.name: path.read_text() for path in sources})


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _mark(key: Key) -> Record:
    return _signed(Record(key, "started", _birth(os.getpid()), 0.0))


def _signed(record: Record) -> Record:
    given = {field.name: getattr(record, field.name) for field in fields(record)}
    return Record(**given | {"host": socket.gethostname(), "pid": os.getpid(), "when": time.time()})


def _may_be_running(mark: Record) -> bool:
    if mark.host != socket.gethostname():
        return time.time() - mark.when < LONGEST_S
    try:
        os.kill(mark.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is somebody else's.
        return True
    # Another process may have the number by now.
    return _birth(mark.pid) == mark.reason


def _birth(pid: int) -> str:
    """Return when a process was started, in a unit of the system's, or "" where that is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _plain(record: Record) -> dict[str, Any]:
    return {"kind": record.kind, **asdict(record)}


def _load(path: Path) -> tuple[dict[str, str | int], Record] | None:
    """Return a file's device and record, or None unless all of it is what is written here."""
    try:
        content = json.loads(path.read_text())
        device, kind = content.pop("device"), content.pop("kind")
        key = _checked(KINDS[kind], content.pop("key"))
        record = _checked(Record, {"key": key, **content})
        is_mark = path.suffix == ".started" and record.verdict == "started"
        if key.plan not in PLANS or not (is_mark or record.verdict in VERDICTS[kind]):
            return None
        return {name: device[name] for name in device}, record
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _checked(cls: type[Any], content: dict[str, Any]) -> Any:
    """Return a dataclass made of JSON.

    Raises:
        ValueError: a field is missing, unknown or of another type, or no finite number.
    """
    hints = get_type_hints(cls)
    if set(content) != set(hints):
        raise ValueError(f"Expected the fields {set(hints)}, got {set(content)}")
    made = {}
    for name, value in content.items():
        hint = hints[name]
        if hint == tuple[float, float, float]:
            value = tuple(value)
            is_valid = (
                len(value) == 3 and all(map(_is_time, value)) and list(value) == sorted(value)
            )
        elif hint is float:
            is_valid = _is_time(value)
        else:
            is_valid = isinstance(value, hint) and (type(value) is not bool or hint is bool)
        if not is_valid:
            raise ValueError(f"{name}: unexpected {value!r}")
        made[name] = value
    return cls(**made)


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _row(device: Mapping[str, str | int], record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": record.kind, "verdict": record.verdict, **asdict(record.key)}
    for name in ("reason", "against", "error", "seconds", "host", "pid", "when"):
        row[name] = getattr(record, name)
    for name in ("plan_us", "other_us"):
        for percentile, us in zip(("p25", "p50", "p75"), getattr(record, name)):
            row[f"{name}_{percentile}"] = us
    return row | {f"device_{name}": value for name, value in device.items()}
