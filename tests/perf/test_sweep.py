"""Sweeps from end to end on the CPU: smoke, failures, kill and resume, budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from typer.testing import CliRunner

import perf
from perf.__main__ import app
from perf.bench import presets
from perf.bench import sweep as sweep_module
from perf.bench.measure import Begun, Settings
from perf.bench.sweep import Sweep, Unit
from perf.bench.worker import Worker
from perf.report import schema, tables

CHECKOUT = Path(__file__).parents[2]
QUICK = ("--rounds", "2", "--seconds", "0", "--threads", "1")
# Longer than a busy machine needs to start a worker.
LONG_TIMEOUT = ("--timeout", "120")


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def sweep(out: Path, *more: str):
    return invoke("run", "--out", str(out), *QUICK, *more)


def faulty(*names: str) -> str:
    return ",".join(["nn_aten", *(f"tests.support.faulty_peers:{name}" for name in names)])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smoke")
    result = sweep(out, "--preset", "smoke", *LONG_TIMEOUT)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
def test_smoke_sweep_has_a_row_for_every_cell(smoke):
    rows = perf.load(smoke)
    cells = {
        (unit.case.case_id, *cell)
        for unit in presets.units("smoke", {}, (), "cpu")
        for cell in unit.cells
    }
    assert len(rows) == len(cells)
    assert {tuple(row) for row in rows[["case_id", "peer", "mode"]].values} == cells
    assert set(rows["status"]) == {"ok", "unsupported"}
    declined = rows[rows["status"] == "unsupported"]
    assert declined["peer"].tolist() == ["loop"]
    assert declined["error"].str.contains("ragged").all()


@pytest.mark.slow
def test_rows_are_complete_where_there_is_no_gpu(smoke):
    rows = perf.load(smoke)
    timed = rows[rows["status"] == "ok"]
    assert (timed["max_rel_err"] <= timed["tolerance"]).all()
    for column in ("wall_us_p50", "us_per_step", "peak_MiB", "speedup_vs_nn", "flop", "tflops"):
        assert (timed[column] > 0).all(), column
    assert (timed["wall_us_p10"] <= timed["wall_us_p50"]).all()
    assert (timed["wall_us_p50"] <= timed["wall_us_p90"]).all()
    assert (timed["n_samples"] == 2).all()
    assert (timed.loc[timed["peer"] == "nn_aten", "speedup_vs_nn"] == 1).all()
    for column in ("event_us_p50", "graph_us_p50", "limit_us", "pct_of_limit", "sm_MHz"):
        assert timed[column].isna().all(), column


@pytest.mark.slow
def test_ours_runs_its_torch_path_and_saves_less_than_a_loop(smoke):
    rows = perf.load(smoke)
    ours = rows[rows["peer"] == "tritonrnn"].set_index("mode")["plan"]
    assert ours.pop("infer") == "torch, aten"
    assert ours.eq("torch, in-place").all()
    trained = rows[(rows["mode"] == "fwdbwd") & (rows["layout"] == "padded")].set_index("peer")
    assert trained["saved_MiB"]["tritonrnn"] < trained["saved_MiB"]["loop"]
    inferred = rows[(rows["mode"] == "infer") & (rows["peer"] == "nn_aten")]
    assert (inferred["saved_MiB"] == 0).all()


@pytest.mark.slow
def test_csv_and_parquet_hold_what_the_lines_hold(smoke):
    lines = perf.load(smoke)
    for name in ("rows.csv", "rows.parquet"):
        pd.testing.assert_frame_equal(perf.load(smoke / name), lines, check_exact=False)
    assert set(lines["run_id"]) == set(json.loads((smoke / "env.json").read_text()))
    assert lines["torch"].notna().all()
    twice = perf.load([smoke, smoke / "rows.csv"])
    assert len(twice) == 2 * len(lines)
    assert twice["peer"].cat.ordered


@pytest.mark.slow
def test_every_column_is_in_the_schema_and_documented(smoke):
    [*rows] = tables.read_rows(smoke / "rows.jsonl")
    assert {name for row in rows for name in row} <= set(schema.NAMES)
    document = invoke("schema").output
    assert all(f"`{name}`" in document for name in schema.NAMES)


@pytest.mark.slow
def test_finished_sweep_runs_nothing_again(smoke):
    before = (smoke / "rows.jsonl").read_text()
    assert "nothing new" in sweep(smoke, "--preset", "smoke").output
    assert (smoke / "rows.jsonl").read_text() == before


@pytest.mark.slow
def test_every_failure_is_a_row_and_spares_the_others(tmp_path, monkeypatch):
    names = (
        *("Fine", "Declines", "Throws", "ThrowsLater", "Wrong", "NotANumber", "Hungry"),
        *("Dies", "Hangs", "Interpreted"),
    )
    receive, attempt = Sweep._receive, Sweep._attempt

    def be_impatient(self, worker, phase):
        # Only with the peer that hangs: a busy machine may need long to start a worker.
        message = receive(self, worker, phase)
        if isinstance(message, Begun) and message.peer.endswith(":Hangs"):
            self._timeout_s = 0.5
        return message

    def be_patient(self, left, log):
        self._timeout_s = 120
        attempt(self, left, log)

    monkeypatch.setattr(Sweep, "_receive", be_impatient)
    monkeypatch.setattr(Sweep, "_attempt", be_patient)
    result = sweep(tmp_path, "--mode", "infer", "--layout", "padded", "--peers", faulty(*names))
    assert result.exit_code == 1
    rows = perf.load(tmp_path)
    rows = rows.set_index(rows["peer"].astype(str).str.removeprefix("tests.support.faulty_peers:"))
    assert len(rows) == 1 + len(names)
    assert rows["status"].astype(str).to_dict() == {
        "nn_aten": "ok",
        "Fine": "ok",
        "Declines": "unsupported",
        "Throws": "error",
        "ThrowsLater": "error",
        "Wrong": "wrong",
        "NotANumber": "wrong",
        "Hungry": "oom",
        "Dies": "error",
        "Hangs": "timeout",
        "Interpreted": "ok",
    }
    assert rows["error"]["Declines"] == "it never does"
    assert rows["error"]["Throws"] == "ArithmeticError: no good"
    assert rows["error"]["ThrowsLater"] == "ArithmeticError: tired"
    assert rows["error"]["Wrong"].startswith("off by 0.001")
    assert "SIGSEGV" in rows["error"]["Dies"]
    assert "last words" in rows["error"]["Dies"]
    assert rows["error"]["Hangs"] == "nothing for 0.5 s while in: check"
    assert rows["plan"]["Interpreted"] == "not set"
    assert rows.loc[rows["status"] != "ok", "wall_us_p50"].isna().all()


@pytest.mark.slow
def test_killed_sweep_goes_on_where_it_was(tmp_path):
    axes_given = ("--T", "3,4", "--mode", "infer", "--layout", "padded", "--peers", "tritonrnn")
    command = [sys.executable, "-m", "perf", "run", "--out", str(tmp_path), *QUICK, *axes_given]
    path = tmp_path / "rows.jsonl"
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    measured = tables.read_rows(path)
    assert len(measured) == 1
    # As if it had been killed within a line.
    with path.open("a") as file:
        file.write('{"case_id": "T4-')
    assert sweep(tmp_path, *axes_given).exit_code == 0
    rows = tables.read_rows(path)
    assert rows[: len(measured)] == measured
    assert sorted(row["T"] for row in rows) == [3, 4]
    # The baseline ran beside it every time, although its rows were not asked for.
    assert all(row["speedup_vs_nn"] > 0 for row in rows)
    assert len({row["run_id"] for row in rows}) == 2


@pytest.mark.parametrize("budget", ["0s", "9m"])
def test_sweep_stops_cleanly(tmp_path, monkeypatch, budget):
    if budget != "0s":
        monkeypatch.setattr(Sweep, "_attempt", Mock(side_effect=KeyboardInterrupt))
    result = sweep(tmp_path, "--budget", budget)
    assert result.exit_code == 0
    assert "2 of 2 cases to go" in result.output


def test_folder_of_another_machine_is_left_alone(tmp_path):
    tables.add_environment(tmp_path, "a", {"device": "cpu", "cpu": "abacus", "threads": 1})
    result = sweep(tmp_path, "--budget", "0s")
    assert result.exit_code == 2
    assert "abacus" in result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,16", (1, 16)), ("64:512:x2", (64, 128, 256, 512)), ("10:30:+10,7", (10, 20, 30, 7))],
)
def test_axes_are_read(text, expected):
    assert presets.values("T", text) == expected


@pytest.mark.parametrize("text", ["", "x", "4:8", "4:8:x1", "4:8:+0", "0", "0:8:x2", "-1"])
def test_axes_that_make_no_sense_raise(text):
    with pytest.raises(ValueError, match="Expected"):
        presets.values("T", text)


def test_axes_replace_those_of_the_preset_and_no_case_comes_twice():
    given = {"H": "16,32", "dtype": "bf16,fp32", "layout": "padded"}
    units = presets.units("smoke", given, ("loop",), "cuda")
    assert len({unit.case for unit in units}) == len(units) == 4
    assert {unit.case.fp32_mode for unit in units if unit.case.dtype == "bf16"} == {"none"}
    assert all(unit.case.T == 12 and unit.case.I == 4 for unit in units)
    assert modes_of(presets.units("headline", {}, (), "cuda")[0]) == ["fwdbwd", "infer"]


def modes_of(unit: Unit) -> list[str]:
    return sorted({mode for _, mode in unit.cells})


def test_cpu_is_five_cases_in_three_modes():
    units = presets.units("cpu", {}, ("tritonrnn",), "cpu")
    modes = sorted((unit.case.layout, *modes_of(unit)) for unit in units)
    assert modes == 5 * [("packed", "fwdbwd")] + 5 * [("padded", "fwdbwd", "infer")]


def test_short_is_every_short_call():
    units = presets.units("short", {}, ("tritonrnn",), "cpu")
    assert all(modes_of(unit) == ["fwdbwd", "infer"] for unit in units)
    kinds = Counter((unit.case.layout, unit.case.directions) for unit in units)
    # 9 numbers of steps of 3 sizes; a cell has one direction.
    both = [(layout, D) for layout in ("padded", "packed", "lengths") for D in (1, 2)]
    assert kinds == dict.fromkeys([*both, ("cell", 1)], 27)


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_name_cases(preset, device):
    units = presets.units(preset, {}, (), device)
    assert len({unit.case.case_id for unit in units}) == len(units) > 0


def test_unit_without_the_cells_that_have_rows():
    [unit, *_] = presets.units("smoke", {}, ("loop", "nn_aten"), "cpu")
    left = [("nn_aten", "infer"), ("nn_aten", "fwd"), ("loop", "bwd"), ("nn_aten", "fwdbwd")]
    done = set(unit.cells) - set(left)
    rows = [unit.case.row(peer, mode) for peer, mode in done]
    other = rows[0] | {"device": "cuda", "peer": "nn_aten"}
    assert unit.left([*rows, other]) == Unit(unit.case, tuple(left))


@pytest.mark.parametrize(
    "arguments", [("--preset", "gone"), ("--peers", "gone"), ("--T", "none"), ("--mode", "train")]
)
def test_bad_arguments_are_refused(tmp_path, arguments):
    result = invoke("run", "--out", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert "Expected" in result.output


@pytest.mark.parametrize("command", ["run", "calibrate", "accept", "tune", "env", "words"])
def test_device_that_is_not_there_is_refused(tmp_path, command, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    takes_out = command not in ("env", "words")
    out = ("--out", str(tmp_path)) if takes_out else ()
    for device in ("cuda:1", "gpu"):
        result = invoke(command, "--device", device, *out)
        assert result.exit_code == 2
        assert device in result.output


def test_help_has_the_names_of_every_axis():
    text = invoke("run", "--help").output
    for names in presets.NAMED_AXES.values():
        assert all(name in text for name in names)


@pytest.mark.slow
def test_cpu_command_measures_the_preset_and_prints_the_speedups(tmp_path, monkeypatch):
    tiny = "T=5 B=3 I=4 H=6 mode=fwdbwd layout=packed lengths=linear"
    monkeypatch.setitem(presets.PRESETS, "cpu", (tiny,))
    result = invoke("cpu", *QUICK, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "fwdbwd, packed:" in result.output
    rows = perf.load(tmp_path)
    assert set(rows["peer"]) == {"nn_aten", "nn_again", "tritonrnn"}
    assert (rows["status"] == "ok").all()
    assert (rows["threads"] == 1).all()


@pytest.mark.slow
def test_short_sequences_share_a_process_until_one_ends_it(tmp_path, monkeypatch):
    tiny = "T=1,3 B=2 H=4 mode=infer layout=lengths,cell"
    monkeypatch.setitem(presets.PRESETS, "short", (tiny,))
    started = []

    class Counted(Worker):
        def __init__(self) -> None:
            super().__init__()
            started.append(1)

    monkeypatch.setattr(sweep_module, "Worker", Counted)
    result = invoke("cpu", "--short", *QUICK, "--out", str(tmp_path / "short"))
    assert result.exit_code == 0, result.output
    assert len(started) == 1
    rows = perf.load(tmp_path / "short")
    assert len(rows) == 12
    assert (rows["status"] == "ok").all()
    started.clear()
    given = {"layout": "padded", "T": "3,4", "mode": "infer"}
    names = ["nn_aten", "tests.support.faulty_peers:Dies", "tritonrnn"]
    units = presets.units("smoke", given, names, "cpu")
    settings = Settings(2, 0.0, threads=1, timeout_s=120.0, one_process=True)
    rows = Sweep(units, tmp_path / "faulty", settings, "cpu").run()
    assert Counter(row["status"] for row in rows) == {"ok": 4, "error": 2}
    # Each case: one that died, and one for the rest, which the next case begins with.
    assert len(started) == 3


@pytest.mark.slow
def test_show_and_env_print_facts(smoke):
    shown = invoke("show", "padded", str(smoke))
    assert shown.exit_code == 0
    [line] = [line for line in shown.output.splitlines() if "wall_us_p50" in line][:1]
    # Short enough to be read.
    assert all(len(cell.strip()) < 12 for cell in line.split("|"))
    assert invoke("show", "T8", str(smoke)).exit_code == 2
    assert '"torch"' in invoke("env").output
