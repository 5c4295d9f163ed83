"""Commands that run within a budget of minutes: acceptance, its steps, tuning. All on the CPU."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import textwrap
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from perf.__main__ import app
from perf.bench import presets, samples
from perf.bench.cases import Case
from perf.bench.measure import Settings
from perf.report import schema, tables
from perf.roofline import calibrate
from perf.session import accept, precompile, recorded_tests, sanitize, tune
from perf.session.steps import Ledger, Outcome, Record, Step, take
from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES

CHECKOUT = Path(__file__).parents[2]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


def steps_of(outcomes: dict[str, Outcome | Exception], taken: list[tuple[str, float]]):
    def step(name: str, outcome: Outcome | Exception) -> Step:
        def run(seconds: float) -> Outcome:
            taken.append((name, seconds))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return Step(name, {"a": 1, "b": 3, "c": 4}[name], run, again=name == "c")

    return [step(name, outcome) for name, outcome in outcomes.items()]


DONE = Outcome("done", "well")


def test_steps_share_the_time_that_is_left(tmp_path):
    taken: list[tuple[str, float]] = []
    take(steps_of({"a": DONE, "b": DONE, "c": DONE}, taken), tmp_path, 80.0)
    assert [name for name, _ in taken] == ["a", "b", "c"]
    # An eighth; then three sevenths of what the first left over, which took no time.
    assert [seconds for _, seconds in taken] == pytest.approx([10, 240 / 7, 80], abs=0.5)


def test_steps_that_are_done_are_not_done_again(tmp_path):
    taken: list[tuple[str, float]] = []
    outcomes = {"a": Outcome("failed", "no"), "b": Outcome("unfinished", "half"), "c": DONE}
    take(steps_of(outcomes, taken), tmp_path, 80.0)
    taken.clear()
    records = take(steps_of({"a": DONE, "b": DONE, "c": DONE}, taken), tmp_path, 80.0)
    assert [name for name, _ in taken] == ["b", "c"]
    assert {name: one.status for name, one in records.items()} == {
        "a": "failed",
        "b": "done",
        "c": "done",
    }
    Ledger(tmp_path).forget("a")
    taken.clear()
    assert (
        take(steps_of({"a": DONE, "b": DONE, "c": DONE}, taken), tmp_path, 9.0)["a"].message
        == "well"
    )


def test_step_that_raises_has_failed_and_spares_the_others(tmp_path):
    steps = steps_of({"a": ArithmeticError("no good"), "b": DONE, "c": DONE}, [])
    records = take(steps, tmp_path, 80.0)
    assert (records["a"].status, records["a"].message) == ("failed", "ArithmeticError: no good")
    assert records["b"].status == records["c"].status == "done"


def test_no_step_is_begun_when_the_time_is_up(tmp_path):
    taken: list[tuple[str, float]] = []
    records = take(steps_of({"a": DONE, "b": DONE, "c": DONE}, taken), tmp_path, 0.0)
    # Except for the step that shows the others.
    assert taken == [("c", 0.0)]
    assert records["b"] == Record("unfinished", 0.0, "not begun")


def test_step_that_was_cut_off_is_unfinished(tmp_path):
    def cut_off(seconds):
        # Raised, because a job in the background may ignore the signal.
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take([Step("a", 1, cut_off)], tmp_path, 9.0)
    assert Ledger(tmp_path).records["a"] == Record("unfinished", 0.0, "cut off")


def test_tests_that_passed_are_not_run_again(tmp_path):
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        import pathlib, pytest
        def test_passes(): pass
        def test_fails_once():
            flag = pathlib.Path(__file__).with_name("flag")
            assert flag.exists() or flag.touch()
        @pytest.fixture
        def broken(): raise ValueError("no such thing")
        def test_breaks(broken): pass
        def test_is_skipped(): pytest.skip("why not")
        """)
    )
    path = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "perf.session.recorded_tests", str(tmp_path)]
    variables = {recorded_tests.VARIABLE: str(path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    log = tmp_path / "log"
    assert accept.run_for([*command, "-c", os.devnull], 120, log, variables) == 1
    ids = ("test_it.py::test_passes", "test_it.py::test_fails_once")
    ids += ("test_it.py::test_breaks", "test_it.py::test_is_skipped")
    first = dict(zip(ids, ("passed", "failed", "failed", "skipped")))
    assert {
        key.rpartition("/")[2]: one for key, one in recorded_tests.outcomes(path).items()
    } == first
    assert "no such thing" in path.read_text()
    before = len(path.read_text().splitlines())
    # Cut off within a line.
    with path.open("a") as file:
        file.write('{"test": "test_it.py::te')
    path.write_text(path.read_text().rpartition("\n")[0] + "\n")
    assert accept.run_for([*command, "-c", os.devnull], 120, log, variables) == 1
    again = [json.loads(line)["test"] for line in path.read_text().splitlines()[before:]]
    assert [name.rpartition("::")[2] for name in again] == [
        "test_fails_once",
        "test_breaks",
        "test_is_skipped",
    ]
    assert Counter(recorded_tests.outcomes(path).values()) == {
        "passed": 2,
        "failed": 1,
        "skipped": 1,
    }


def test_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    log = tmp_path / "log"
    script = "sleep 600 & echo $!; wait"
    assert accept.run_for(["bash", "-c", script], 1.0, log, {}) is None
    child = int(log.read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_acceptance_on_a_cpu_resumes_and_names_what_needs_a_gpu(tmp_path, monkeypatch):
    assert samples.acceptance("cpu") == presets.units("smoke", {}, (), "cpu")
    few = presets.units("smoke", {"mode": "infer", "layout": "padded"}, (), "cpu")
    monkeypatch.setattr(samples, "acceptance", lambda device: few)
    monkeypatch.setattr(accept, "SETTINGS", Settings(rounds=2, sample_s=0))
    # Calibrate in this process and with small sizes.
    monkeypatch.setattr(accept, "run_for", lambda command, *ignored: invoke(*command[3:]).exit_code)
    monkeypatch.setattr(calibrate, "CPU_COPY_BYTES", 2**12)
    monkeypatch.setattr(calibrate, "CPU_MATRIX_SIZE", 16)
    monkeypatch.setattr(calibrate, "SAMPLE_S", 0.0)
    out = tmp_path / "out"
    # As a killed command leaves it, of an earlier version.
    out.mkdir()
    state = {"status": "unfinished", "seconds": 1000.0, "says": "cut off"}
    (out / "steps.json").write_text(json.dumps({"calibrate": state}))
    done = invoke("accept", "--device", "cpu", "--out", out)
    assert done.exit_code == 0
    assert Ledger(out).records["calibrate"].seconds > 1000
    [unit] = few
    assert len(tables.read_lines(out / tables.ROWS)) == len(list(unit.cells()))
    records = Ledger(out).records
    assert {name: one.status for name, one in records.items()} == {
        "compile": "unavailable",
        "gpu tests": "unavailable",
        "sanitizer": "unavailable",
        "calibrate": "done",
        "cells": "done",
        "kernel tests": "unavailable",
        "report": "done",
        "archive": "done",
    }
    for words in ("it needs a GPU", "nothing is compiled on a CPU", "x nn.RNN", "hbm_TBps"):
        assert words in done.output, words
    with tarfile.open(out / accept.ARCHIVE) as archive:
        names = archive.getnames()
    for name in (tables.ROWS, "report.md", "rows.parquet", "env.json", "calibration.json"):
        assert f"out/{name}" in names


def test_acceptance_knows_its_steps(tmp_path):
    refused = invoke("accept", "--device", "cpu", "--out", tmp_path, "--again", "dance")
    assert refused.exit_code == 2
    assert "sanitizer" in refused.output


def test_sample_is_balanced():
    cases = samples.headline("cuda")
    assert len({case.case_id for case in cases}) == 20
    assert len({(case.B, case.H) for case in cases}) == 20
    for axis in ("T", "B", "H", "dtype", "directions"):
        counts = Counter(getattr(case, axis) for case in cases)
        assert max(counts.values()) - min(counts.values()) <= 1, counts
    for axis in ("T", "B", "H", "dtype"):
        # Both directions with each value, and every T with every precision.
        assert len({(getattr(case, axis), case.directions) for case in cases}) == 2 * len(
            {getattr(case, axis) for case in cases}
        )
    assert len({(case.T, case.dtype) for case in cases}) == 9
    units = samples.acceptance("cuda")
    cells = Counter(
        unit.case.layout
        for unit in units
        for mode in unit.modes
        if "flashrnn" not in unit.modes[mode]
    )
    assert cells == {"padded": 40, "packed": 10}


def test_precompiling_has_each_kernel_once_and_what_takes_long_first(monkeypatch):
    # As if FlashRNN were installed.
    monkeypatch.setattr("perf.peers.flash.find_nvcc", lambda: "nvcc")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    todo = precompile.tasks(samples.acceptance("cuda"), every_epilogue=True)
    assert len(set(todo)) == len(todo)
    assert all(case.T == precompile.STEPS for _, case in todo)
    kinds = [name.startswith("flashrnn") for name, _ in todo]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(kinds) == 2 * len(samples.FLASH)
    assert {name.partition("-")[0] for name, _ in todo} == {"flashrnn", "tritonrnn"}
    last = [case.nonlinearity for name, case in todo if name == "tritonrnn"]
    assert last == sorted(last, reverse=True)
    assert Counter(last)["tanh"] == Counter(last)["relu"]


@pytest.mark.slow
def test_compiling_runs_peers_reports_failures_and_kills_what_hangs(monkeypatch):
    monkeypatch.setattr(precompile, "MOST_PROCESSES", 1)
    case = Case(T=2, B=2, I=2, H=4)
    names = ("nn_aten", "tests.support.faulty_peers:Throws", "tests.support.faulty_peers:Hangs")
    compiling = precompile.compile_all([(name, case) for name in names], 120)
    errors = {one.peer: one.error for one in (next(compiling), next(compiling))}
    assert errors == {
        "nn_aten": None,
        "tests.support.faulty_peers:Throws": "ArithmeticError: no good",
    }
    compiling.close()


def test_compiling_ends_with_its_budget():
    assert list(precompile.compile_all([("nn_aten", Case(T=2, B=2, I=2, H=4))], 0.0)) == []


@pytest.mark.parametrize("plan", sanitize.PLANS)
def test_launches_for_the_sanitizer_are_of_every_plan(plan, monkeypatch):
    launched = []
    # The plans of a GPU, which need not be there, as nothing is launched.
    monkeypatch.setattr(launch, "device_of", lambda device: DEVICES["sm_90"])
    monkeypatch.setattr(
        launch, "recurrence", lambda *arguments, plan, **options: launched.append(plan)
    )
    count = sanitize.launch_all(plan, torch.device("cpu"))
    # Some plans do not fit in float32.
    assert count >= len(sanitize.LAYOUTS) * len(sanitize.EPILOGUES)
    assert [one.name for one in launched] == [plan] * count
    assert len({one.epilogue for one in launched}) >= len(sanitize.EPILOGUES)


def test_launches_for_the_sanitizer_run(monkeypatch):
    monkeypatch.setattr(sanitize, "HIDDEN", {"resident": 10})
    monkeypatch.setattr(sanitize, "LAYOUTS", {"packed": sanitize.LAYOUTS["packed"]})
    monkeypatch.setattr(sanitize, "EPILOGUES", ("tanh", "tanh_grad"))
    monkeypatch.setattr(sanitize, "DTYPES", (torch.bfloat16,))
    assert sanitize.launch_all("resident", torch.device("cpu")) == 2


def on_gpu(folder: Path, monkeypatch) -> accept.Acceptance:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "put back in the end")
    return accept.Acceptance(folder, "cuda", Console(quiet=True))


def test_compiling_step_reports_failures_and_unlocks_what_it_killed(tmp_path, monkeypatch):
    acceptance = on_gpu(tmp_path, monkeypatch)
    lock = tmp_path / accept.EXTENSIONS / "elman" / "lock"

    def compile_all(todo, seconds):
        assert not lock.exists()
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        for place, (name, case) in enumerate(todo):
            yield precompile.Compiled(name, case, 1.0, None if place else "RuntimeError: no")

    codes = dict.fromkeys(sanitize.PLANS, 0)
    monkeypatch.setattr(precompile, "compile_all", compile_all)
    monkeypatch.setattr(accept, "run_for", lambda command, *ignored: codes[command[-1]])
    outcome = acceptance.compile(60.0)
    assert outcome.status == "done"
    assert "58 compiled; 1 tritonrnn: RuntimeError: no" in outcome.message
    assert not lock.exists()
    codes["cooperative"] = -11
    outcome = acceptance.compile(60.0)
    assert outcome.status == "failed"
    assert "launches-cooperative.log: -11" in outcome.message


@pytest.mark.parametrize(
    ("code", "outcomes", "status"),
    [
        (0, ["passed", "skipped"], "done"),
        (5, ["passed"], "done"),
        (1, ["passed", "failed"], "failed"),
        # No test was collected.
        (4, [], "failed"),
        (None, ["passed"], "unfinished"),
    ],
)
def test_step_of_tests_counts_their_outcomes(tmp_path, monkeypatch, code, outcomes, status):
    def run_for(command, seconds, log, environment):
        lines = [
            json.dumps({"test": f"t{place}", "outcome": one}) for place, one in enumerate(outcomes)
        ]
        Path(environment[recorded_tests.VARIABLE]).write_text("".join(f"{one}\n" for one in lines))
        return code

    monkeypatch.setattr(accept, "run_for", run_for)
    outcome = on_gpu(tmp_path, monkeypatch).gpu_tests(60.0)
    assert outcome.status == status
    assert all(f"1 {one}" in outcome.message for one in outcomes)
    assert ("t1" in outcome.message) == ("failed" in outcomes)


def test_sanitizer_is_run_for_each_tool_and_plan_and_its_findings_fail(tmp_path, monkeypatch):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        "#!/bin/sh\n"
        'echo "========= ERROR SUMMARY: 3 errors"\n'
        'case "$*" in *racecheck*cooperative*) exit 9;; *racecheck*stepwise*) sleep 600;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(accept, "SANITIZER_FOLDERS", (str(tmp_path),))
    acceptance = on_gpu(tmp_path, monkeypatch)
    outcome = acceptance.sanitizer(1.0)
    assert outcome.status == "unfinished"
    assert "racecheck stepwise" in outcome.message
    fake.write_text("#!/bin/sh\necho '========= RACECHECK SUMMARY: 0 hazards'\n")
    outcome = acceptance.sanitizer(60.0)
    assert outcome.status == "failed"
    assert "racecheck cooperative: exited with 9, ERROR SUMMARY: 3 errors" in outcome.message
    # Only the run that was not in time is repeated.
    assert outcome.message.count("RACECHECK SUMMARY: 0 hazards") == 1
    fake.unlink()
    assert acceptance.sanitizer(60.0).message == "compute-sanitizer is not installed"


def timed(peer: str, us: float, plan: str = "", **more: object) -> dict:
    case = Case(T=64, B=4, I=8, H=8, dtype="bf16", fp32_mode="none", device="cuda")
    row = {**case.columns(), "peer": peer, "mode": "infer", "status": "ok", "plan": plan}
    return row | {"event_us_p50": us, **more}


def test_regret_is_of_the_chosen_plan_against_the_best():
    rows = schema.typed(
        pd.DataFrame(
            [
                timed("tritonrnn", 21.0, "triton, resident: tiles of 16"),
                timed("tritonrnn-resident", 20.0),
                timed("tritonrnn-stepwise", 500.0),
                timed("tritonrnn-torch", 16.0, "torch, aten"),
                # A peer that is no plan, and a plan that failed, do not count.
                timed("loop", 1.0),
                timed("tritonrnn", 30.0, "torch, aten", mode="fwdbwd"),
                timed("tritonrnn-torch", 31.0, mode="fwdbwd"),
                timed("tritonrnn-resident", 1.0, mode="fwdbwd", status="error"),
            ]
        )
    )
    table = tune.regrets(rows)
    assert table["mode"].tolist() == ["infer", "fwdbwd"]
    assert table["chosen"].tolist() == ["tritonrnn-resident", "tritonrnn-torch"]
    assert table["best"].tolist() == ["tritonrnn-torch", "tritonrnn-torch"]
    assert table["regret"].tolist() == pytest.approx([20 / 16 - 1, 0])
    assert tune.mean_regret(table) == pytest.approx((20 / 16) ** 0.5 - 1)
    [trained, inferred] = tune.verdict(table)
    assert "25.0 %" in inferred
    assert "NOT met" in inferred
    assert "is met" in trained


def test_chosen_plan_without_a_peer_counts_by_the_time_of_tritonrnn():
    rows = schema.typed(
        pd.DataFrame(
            [timed("tritonrnn", 18.0, "triton, novel: tiles"), timed("tritonrnn-torch", 20.0)]
        )
    )
    [regret] = tune.regrets(rows).to_dict("records")
    assert (regret["chosen"], regret["best"], regret["regret"]) == ("tritonrnn", "tritonrnn", 0)


def test_every_plan_has_a_name_that_tuning_finds():
    assert {"tritonrnn-torch", "tritonrnn-resident", "tritonrnn-stepwise"} <= set(
        tune.plans("cuda")
    )
    for unit in tune.units("headline", "cuda"):
        assert set(unit.modes) == {"infer", "fwdbwd"}
        assert unit.case.layout == "padded"


@pytest.mark.slow
def test_tuning_on_a_cpu_measures_what_its_budget_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SETTINGS", Settings(rounds=2, sample_s=0))
    arguments = ("tune", "--device", "cpu", "--preset", "smoke", "--out", tmp_path)
    stopped = invoke(*arguments, "--budget", "0s")
    assert stopped.exit_code == 0
    assert "1 of 1 cases to go" in stopped.output
    assert "No choice was timed" in stopped.output
    result = invoke(*arguments)
    assert result.exit_code == 0
    for words in ("infer: the chosen plan takes", "tritonrnn-torch_us", "nn_aten_us"):
        assert words in result.output, words
    table = pd.read_parquet(tmp_path / "regret.parquet")
    assert table["chosen"].tolist() == ["tritonrnn-torch", "tritonrnn-torch"]
    assert (table["regret"] >= 0).all()
    assert "What the choice of a plan loses" in (tmp_path / tune.PAGE).read_text()
