"""What trials found is kept in files that processes share: complete, checked, first come."""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.processes import run_alone
from tritonrnn.autotune.records import Kernel, Record, Shapes
from tritonrnn.autotune.store import Store, source_digest, stored_rows

DEVICE = {"name": "Imitation", "multiprocessors": 4, "source": "abc"}
KERNEL = Kernel("resident", "tanh", "bf16", False, 1, 5, mapped=True, v_0=False)
SHAPES = Shapes(
    "resident", "tanh", "bf16", False, 1, 5, mapped=True, hx=False, ragged=False, training=True,
    T=4, B=2, I=4, L=1,
)  # fmt: skip
RIGHT = Record(KERNEL, "right", "as accurate as torch", 0.5, error=0.25)
FASTER = Record(
    SHAPES, "faster", "", 0.5, plan_us=(1.0, 2.0, 3.0), other_us=(4.0, 5.0, 6.0), against="aten"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path / "tritonrnn"


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*/*.json")
    return path


@pytest.mark.parametrize("record", [RIGHT, FASTER], ids=["right", "fast"])
def test_record_is_what_the_next_process_reads(record):
    written = Store(DEVICE).put(record)
    assert (written.pid, written.host != "") == (os.getpid(), True)
    assert Store(DEVICE).get(record.key) == written
    assert replace(written, host="", pid=0, when=0.0) == record
    (row,) = stored_rows()
    assert (row["kind"], row["verdict"]) == (record.kind, record.verdict)
    assert (row["plan"], row["H"], row["device_name"]) == ("resident", 5, "Imitation")
    if record is RIGHT:
        assert row["error"] == 0.25
    else:
        assert [row[f"plan_us_p{p}"] for p in (25, 50, 75)] == [1.0, 2.0, 3.0]


def test_first_record_stands_and_others_adopt_it():
    stores = [Store(DEVICE), Store(DEVICE)]
    first = stores[0].put(RIGHT)
    assert stores[1].put(replace(RIGHT, verdict="wrong")) == first
    assert stores[1].get(KERNEL) == first


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Another"},
        {"multiprocessors": 5},
        {"source": "abd"},
        {"multiprocessors": "4"},
    ],
    ids=str,
)
def test_record_of_another_device_or_source_is_none(change):
    Store(DEVICE).put(RIGHT)
    assert Store(DEVICE | change).get(KERNEL) is None


def test_changed_source_has_another_digest(tmp_path):
    (tmp_path / "kernel.py").write_text("a = 1\n")
    before = source_digest(tmp_path)
    source_digest.cache_clear()
    assert source_digest(tmp_path) == before
    (tmp_path / "kernel.py").write_text("a = 2\n")
    source_digest.cache_clear()
    assert source_digest(tmp_path) != before


def damaged(content: dict, place: str, value: object) -> dict:
    inside, _, name = place.rpartition(".")
    holder = content[inside] if inside else content
    holder[name] = value
    return content


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("verdict", "excellent"),
        ("verdict", "faster"),
        ("verdict", ["right"]),
        ("kind", "fast"),
        ("kind", "cheap"),
        ("seconds", -1.0),
        ("seconds", float("nan")),
        ("seconds", 10**400),
        ("when", 1e300),
        ("error", "0.1"),
        ("error", True),
        ("plan_us", [1.0, 2.0]),
        ("plan_us", [3.0, 2.0, 1.0]),
        ("plan_us", [None, 2.0, 3.0]),
        ("pid", 1.5),
        ("pid", True),
        ("unknown", 1),
        ("key.plan", "quantum"),
        ("key.H", 6),
        ("key.H", True),
        ("key.tf32", 0),
        ("key.unknown", 1),
        ("key", None),
        ("device", None),
        ("device.name", "Another"),
    ],
    ids=str,
)
def test_field_that_is_not_as_written_makes_a_record_none(place, value, folder):
    Store(DEVICE).put(RIGHT)
    path = the_file(folder)
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), place, value)))
    store = Store(DEVICE)
    assert store.get(KERNEL) is None
    # The next record takes its place.
    written = store.put(RIGHT)
    assert Store(DEVICE).get(KERNEL) == written


@pytest.mark.parametrize("left", [0, 1, 100, -1], ids="{} bytes".format)
def test_half_written_record_is_none(left, folder):
    Store(DEVICE).put(RIGHT)
    path = the_file(folder)
    path.write_bytes(path.read_bytes()[:left])
    assert Store(DEVICE).get(KERNEL) is None
    assert list(stored_rows()) == []


@pytest.mark.parametrize("content", [b"\xff\x00", b"[]", b"3", b"{}", b"null"], ids=repr)
def test_foreign_file_is_none(content, folder):
    Store(DEVICE).put(RIGHT)
    the_file(folder).write_bytes(content)
    assert Store(DEVICE).get(KERNEL) is None
    assert list(stored_rows()) == []


def test_record_without_a_file_is_of_this_process(folder):
    store = Store(DEVICE)
    kept = store.remember(replace(FASTER, verdict="tie"))
    assert store.get(SHAPES) == kept
    assert [row["verdict"] for row in store.rows()] == ["tie"]
    assert not folder.exists()
    store.put(RIGHT)
    assert [row["verdict"] for row in store.rows()] == ["tie"]


def test_folder_that_can_not_be_written_is_logged_once(folder, caplog):
    folder.write_text("a file in its place")
    store = Store(DEVICE)
    with caplog.at_level(logging.WARNING, "tritonrnn"):
        written = store.put(RIGHT)
        assert store.start(SHAPES) is None
        store.end(None)
        store.put(FASTER)
    assert store.get(KERNEL) == written
    assert len(caplog.records) == 1
    assert "remembered by this process only" in caplog.text
    assert len(list(store.rows())) == 2


def test_file_system_without_links_keeps_records(monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    written = Store(DEVICE).put(RIGHT)
    assert Store(DEVICE).get(KERNEL) == written


def test_mark_of_a_running_process_is_no_verdict():
    store = Store(DEVICE)
    mark = store.start(KERNEL)
    assert Store(DEVICE).get(KERNEL) is None
    assert [row["verdict"] for row in stored_rows()] == ["started"]
    store.end(mark)
    assert list(stored_rows()) == []


def edited(mark: Path, **fields: object) -> None:
    mark.write_text(json.dumps(json.loads(mark.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "fails"),
    [
        # No process has so large a number.
        ({"pid": 2**30}, True),
        # Another process has the number now.
        ({"reason": "0"}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "when": time.time() - 3600}, True),
    ],
    ids=["gone", "number taken", "elsewhere", "elsewhere long ago"],
)
def test_second_process_that_is_gone_is_a_failure(fields, fails):
    # One job ends with all of its processes.
    marks = [Store(DEVICE).start(KERNEL) for _ in range(2)]
    for mark in marks:
        edited(mark, **fields)
    assert Store(DEVICE).get(KERNEL) is None
    edited(Store(DEVICE).start(KERNEL), **fields)
    found = Store(DEVICE).get(KERNEL)
    assert (found is not None) == fails
    if found is not None:
        assert found.verdict == "failed"
        assert "ended in its trial" in found.reason
        # Written for all, in place of the marks.
        assert [row["verdict"] for row in stored_rows()] == ["failed"]


def test_verdict_takes_the_place_of_marks_of_processes_that_are_gone():
    store = Store(DEVICE)
    edited(store.start(KERNEL), pid=2**30)
    running = store.start(KERNEL)
    store.put(RIGHT)
    assert sorted(row["verdict"] for row in stored_rows()) == ["right", "started"]
    store.end(running)
    assert [row["verdict"] for row in stored_rows()] == ["right"]


def test_threads_that_write_at_once_lose_nothing(folder):
    keys = [replace(KERNEL, H=H) for H in range(1, 9)]

    def write(which):
        store = Store(DEVICE)
        return [store.put(replace(RIGHT, key=key, reason=str(which))) for key in keys]

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(16)))
    assert all(records == written[0] for records in written)
    store = Store(DEVICE)
    assert [store.get(key) for key in keys] == written[0]
    assert len(list(folder.glob("*/*"))) == len(keys)


WRITE = """
    from dataclasses import replace
    from tests.api.test_autotune_records import DEVICE, KERNEL, RIGHT
    from tritonrnn.autotune.store import Store
    store = Store(DEVICE)
    for H in range(1, 200):
        record = store.put(replace(RIGHT, key=replace(KERNEL, H=H)))
        print(record.pid)
"""


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(folder):
    with ThreadPoolExecutor(2) as pool:
        first, second = (printed.split() for printed in pool.map(run_alone, [WRITE, WRITE]))
    # Each process has the same records, some of them its own.
    assert first == second
    assert len(first) == len(list(folder.glob("*/*"))) == 199
