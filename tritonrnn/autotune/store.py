"""The files of records, which all processes share.

A file is written aside and then linked to its name: so it is complete, and the first one stands. A
folder belongs to one kind of GPU, with one driver, torch, Triton and source of the kernels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import triton

from tritonrnn.autotune.records import STARTED, Device, Key, Record

# The end of a mark's name, where a process has ended in a trial of the same key before.
LAST_TRY = "last-try"

log = logging.getLogger("tritonrnn")

# Seconds after which a trial on another host, whose processes can't be seen, has ended. It takes
# less than a minute.
LONGEST_S = 600.0


class Store:
    """The records of one kind of device.

    Args:
        device: what identifies it: name, limits, driver, versions, source.
    """

    def __init__(self, device: Device) -> None:
        self.device = dict(device)
        self.folder = root() / _digest(self.device)
        # Of this process only, and copies of files.
        self._known: dict[Key, Record] = {}
        self._is_writable = True

    def get(self, key: Key) -> Record | None:
        """Return the record of a key, or None without a valid one."""
        known = self._known.get(key) or self._read(key)
        if known is None:
            return self._of_the_dead(key)
        self._known[key] = known
        return known

    def remember(self, record: Record) -> Record:
        """Keep a record in this process only."""
        record = record.signed()
        self._known[record.key] = record
        return record

    def put(self, record: Record) -> Record:
        """Keep a record for all processes. Return it, or the one that another process wrote first.

        Where nothing can be written, it is kept in this process.
        """
        record = self.remember(record)
        with self._writing():
            path, aside = self._path(record.key), self._write_aside(record)
            try:
                os.link(aside, path)
            except FileExistsError:
                first = self._read(record.key)
                if first is not None:
                    self._known[record.key] = record = first
                else:
                    # Damaged, or of another version of this file.
                    os.replace(aside, path)
            except OSError:
                # A file system without links.
                os.replace(aside, path)
            aside.unlink(missing_ok=True)
        self.forget_deaths(record.key)
        return record

    def forget_deaths(self, key: Key) -> None:
        """Remove the marks of processes that ended in a trial of a key that now has a verdict."""
        for path, _ in list(self._deaths(key)):
            self.end(path)

    def start(self, key: Key) -> Path | None:
        """Leave a mark that a trial of the key has started, for :meth:`end` to remove.

        Should the process die meanwhile, the mark says in what. If another died so before, it says
        that, too: this is the last try.
        """
        mark = None
        with self._writing():
            aside = self._write_aside(Record(key, STARTED, _birth(os.getpid()), 0.0).signed())
            kind = LAST_TRY if any(self._deaths(key)) else STARTED
            mark = aside.rename(self._path(key).with_suffix(f".{uuid4().hex[:8]}.{kind}"))
        return mark

    def end(self, mark: Path | None) -> None:
        """Remove a mark."""
        with self._writing():
            if mark is not None:
                mark.unlink(missing_ok=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each record of this process that no file holds."""
        for record in list(self._known.values()):
            if self._read(record.key) is None:
                yield record.row(self.device)

    def _path(self, key: Key) -> Path:
        return self.folder / f"{_digest(asdict(key))}.json"

    def _read(self, key: Key) -> Record | None:
        record = self._load(self._path(key), key)
        return None if record is None or record.verdict == STARTED else record

    def _load(self, path: Path, key: Key) -> Record | None:
        device, record = _load(path) or (None, None)
        return record if record and (device, record.key) == (self.device, key) else None

    def _of_the_dead(self, key: Key) -> Record | None:
        """Return a record of failure, which it writes, if processes ended in its trials twice.

        Once is no proof: a process may be killed for what has nothing to do with its trial, and all
        those of a job at the same time. So the second must have started when the first was gone.
        """
        for path, mark in self._deaths(key):
            if path.suffix == f".{LAST_TRY}":
                why = f"process {mark.pid} of {mark.host} ended in its trial, as one did before"
                return self.put(Record(key, "failed", why, 0.0))
        return None

    def _deaths(self, key: Key) -> Iterator[tuple[Path, Record]]:
        """Yield the marks of trials whose process is gone."""
        for kind in (STARTED, LAST_TRY):
            for path in self.folder.glob(f"{self._path(key).stem}.*.{kind}"):
                mark = self._load(path, key)
                if mark is not None and not _may_be_running(mark):
                    yield path, mark

    def _write_aside(self, record: Record) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{uuid4().hex}"
        path.write_text(record.to_json(self.device))
        return path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Log once that something can't be written, and go on without."""
        try:
            yield
        except OSError as error:
            if self._is_writable:
                log.warning("Trials are remembered by this process only: %s", error)
            self._is_writable = False


def root() -> Path:
    """Return the folder of all devices' records, in Triton's cache."""
    return Path(triton.knobs.cache.dir) / "tritonrnn"


def stored_rows() -> Iterator[dict[str, Any]]:
    """Yield a row for each valid record of every device, and for each trial that has started."""
    names = ("*.json", f"*.{STARTED}", f"*.{LAST_TRY}")
    for path in sorted(path for name in names for path in root().glob(f"*/{name}")):
        found = _load(path)
        if found is not None:
            device, record = found
            yield record.row(device)


@functools.cache
def source_digest(folder: Path) -> str:
    """Return a digest of the Python files of a folder."""
    sources = sorted(folder.glob("*.py"))
    return _digest({path.name: path.read_text() for path in sources})


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _load(path: Path) -> tuple[Device, Record] | None:
    """Return the device and the record of a file, or None without a valid one."""
    try:
        return Record.from_json(path.read_text())
    except (OSError, ValueError):
        return None


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
