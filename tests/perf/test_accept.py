"""The session of a GPU: its steps and their states, what is killed and goes on; tuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from perf import peers
from perf.__main__ import app
from perf.bench import presets
from perf.session import accept, launches
from perf.session.accept import Record, Step
from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES
from tritonrnn.kernels.plan import PLANS

CHECKOUT = Path(__file__).parents[2]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


def shell(piece: str, name: str, script: str, seconds: float = 60.0) -> Step:
    """Return a step that first adds its name to a list."""
    return Step(piece, name, ("bash", "-c", f"echo {name} >> list; {script}"), seconds)


@pytest.fixture
def small_steps(tmp_path, monkeypatch) -> Path:
    """Let the session have steps of every outcome; return the folder in which they run."""
    scripts = [
        shell(
            "fast",
            "slow",
            "echo so far; test -e go || sleep 600 & echo $! > child; wait",
            seconds=1,
        ),
        shell("right", "good", "echo; echo '=== all well ==='; echo"),
        shell("right", "bad", "echo alas; exit 3"),
        shell("right", "idle", "exit 5"),
        Step("right", "gpu", ("false",), 60.0, "it needs a GPU"),
        shell("why", "last", "true"),
    ]
    monkeypatch.setattr(accept, "steps", lambda out, device: scripts)
    monkeypatch.setattr(accept, "SHORTEST_S", 0.5)
    monkeypatch.setattr(accept.environment, "CHECKOUT", tmp_path)
    return tmp_path


def session(folder: Path, *pieces: str, budget_s: float = 100.0, **more) -> dict[str, Record]:
    pieces = pieces or accept.PIECES
    return accept.accept(folder / "out", "cpu", budget_s, pieces, **more)


def ran(folder: Path) -> list[str]:
    names = (folder / "list").read_text().split() if (folder / "list").exists() else []
    (folder / "list").unlink(missing_ok=True)
    return names


@pytest.mark.slow
def test_steps_run_in_order_of_their_pieces_and_each_outcome_is_told(small_steps):
    records = session(small_steps)
    assert ran(small_steps) == ["good", "bad", "idle", "slow", "last"]
    assert {name: one.status for name, one in records.items()} == {
        "slow": "timeout",
        "good": "done",
        "bad": "failed",
        "idle": "unavailable",
        "gpu": "unavailable",
        "last": "done",
    }
    assert records["good"].message == "all well"
    assert records["bad"].message == "exited with 3, see bad.log: alas"
    assert records["gpu"].message == "it needs a GPU"
    assert records["slow"].message == "so far"
    assert records["slow"].seconds >= 1
    # All that it had started is gone.
    assert not alive(int((small_steps / "child").read_text()))
    with tarfile.open(small_steps / "out" / accept.ARCHIVE) as archive:
        assert {"out/steps.json", "out/bad.log"} <= set(archive.getnames())


@pytest.mark.slow
def test_session_goes_on_with_what_is_not_done(small_steps):
    assert session(small_steps, "right", budget_s=0)["good"] == Record()
    session(small_steps, "fast", "right")
    assert ran(small_steps) == ["good", "bad", "idle", "slow"]
    # What took all of its time has it again when all others had theirs.
    (small_steps / "go").touch()
    assert session(small_steps)["slow"].status == "done"
    assert ran(small_steps) == ["last", "slow"]
    session(small_steps, again=("bad", "good"))
    assert ran(small_steps) == ["good", "bad"]


@pytest.mark.slow
def test_step_whose_time_the_budget_cuts_is_unfinished(small_steps, monkeypatch):
    monkeypatch.setattr(accept, "LAST_S", 0.0)
    records = session(small_steps, "fast", budget_s=0.9)
    assert records["slow"].status == "unfinished"


@pytest.mark.slow
def test_steps_run_side_by_side_where_many_processors_are(small_steps, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # Each waits for the other.
    meet = "touch {}; until test -e {}; do sleep 0.01; done"
    steps = [shell("right", a, meet.format(a, b)) for a, b in ("xy", "yx")]
    monkeypatch.setattr(accept, "steps", lambda out, device: steps)
    assert {one.status for one in session(small_steps).values()} == {"done"}


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and " Z " not in path.read_text()


@pytest.mark.slow
def test_killed_session_takes_its_step_along_and_goes_on(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from perf.session import accept\n"
        "script = 'echo once >> list; test -e go && exit; echo $$ > pid; sleep 600'\n"
        "accept.steps = lambda *ignored: [\n"
        "    accept.Step('right', 'first', ('true',), 99.0),\n"
        "    accept.Step('right', 'second', ('bash', '-c', script), 99.0),\n"
        "]\n"
        "accept.environment.CHECKOUT = Path(sys.argv[1])\n"
        "print(accept.accept(Path(sys.argv[1], 'out'), 'cpu', 300.0))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=CHECKOUT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    step = int((tmp_path / "pid").read_text())
    while alive(step):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    state = json.loads((tmp_path / "out" / "steps.json").read_text())["steps"]
    assert {name: one["status"] for name, one in state.items()} == {
        "first": "done",
        "second": "running",
    }
    # Packed before it was killed.
    with tarfile.open(tmp_path / "out" / accept.ARCHIVE) as archive:
        assert "out/first.log" in archive.getnames()
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert again.stdout.count("status='done'") == 2
    assert "first, for" not in again.stdout
    assert (tmp_path / "list").read_text().split() == ["once", "once"]


def test_folder_of_another_machine_is_refused(tmp_path):
    (tmp_path / "steps.json").write_text(
        '{"machine": {"device": "cuda", "gpu": "Abacus"}, "steps": {}}'
    )
    refused = invoke("accept", "--device", "cpu", "--out", tmp_path)
    assert refused.exit_code == 2
    assert "Abacus" in refused.output


@pytest.mark.parametrize("arguments", [("dance",), ("right", "--again", "dance")])
def test_session_knows_its_pieces_and_its_steps(tmp_path, arguments):
    refused = invoke("accept", "--device", "cpu", "--out", tmp_path, *arguments)
    assert refused.exit_code == 2
    assert "dance" in refused.output


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_of_the_steps_are_understood(tmp_path, monkeypatch, device):
    # As if the tools, FlashRNN and the GPU were there.
    for tool in ("compute-sanitizer", "ncu"):
        (tmp_path / tool).write_text("")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    steps = accept.steps(tmp_path, device)
    assert len({step.name for step in steps}) == len(steps)
    unavailable = {step.piece for step in steps if step.unavailable}
    assert unavailable == (set() if device == "cuda" else set(accept.PIECES))
    names = [step.name for step in steps]
    for kind in ("launches", "trials", "tests", "memcheck", "racecheck", "profile"):
        assert [f"{kind} {plan}" in names for plan in PLANS] == [True] * len(PLANS)
    commands = typer.main.get_command(app).commands
    for step in steps:
        for part in step.command:
            assert not part.startswith("tests/") or (CHECKOUT / part).exists()
        if "perf" in step.command and not step.unavailable:
            command, *arguments = step.command[step.command.index("perf") + 1 :]
            given = commands[command].make_context(command, arguments).params
            assert given["device"] == device
            assert given.get("preset", "smoke") in presets.PRESETS
            for name in given.get("peer_names", "nn_aten").split(","):
                peers.find(name)


@pytest.mark.slow
def test_steps_run_on_a_cpu_and_are_reported(tmp_path, monkeypatch):
    steps = accept.steps
    few = ("launches registers", "packed", "profile resident")
    monkeypatch.setattr(
        accept, "steps", lambda *where: [one for one in steps(*where) if one.name in few]
    )
    archive = tmp_path / "elsewhere" / "all.tar.gz"
    result = invoke("accept", "--device", "cpu", "--out", tmp_path / "out", "--archive", archive)
    assert result.exit_code == 0
    for words in ("0 launches of the plan registers", "0 of 2 cases to go", "it needs a GPU"):
        assert words in result.output
    with tarfile.open(archive) as packed:
        for name in ("rows.jsonl", "rows.parquet", "report.md", "env.json", "report.log"):
            assert f"out/{name}" in packed.getnames()


@pytest.mark.parametrize("plan", PLANS)
def test_launches_are_of_every_plan(plan, monkeypatch):
    launched = []
    # The plans of a GPU, which need not be there, as nothing is launched.
    monkeypatch.setattr(launch, "device_of", lambda device: DEVICES["sm_90"])

    def recurrence(*arguments, plan, s, **options):
        launched.append(plan)
        s.zero_()

    monkeypatch.setattr(launch, "recurrence", recurrence)
    count = launches.launch_all(plan, torch.device("cpu"))
    # Some plans do not fit in float32.
    assert count >= len(launches.LAYOUTS) * len(launches.EPILOGUES)
    assert [one.name for one in launched] == [plan] * count
    assert len({one.epilogue for one in launched}) >= len(launches.EPILOGUES)


def test_launches_run(monkeypatch):
    monkeypatch.setitem(launches.HIDDEN, "resident", 10)
    monkeypatch.setattr(launches, "LAYOUTS", {"packed": launches.LAYOUTS["packed"]})
    monkeypatch.setattr(launches, "EPILOGUES", ("tanh", "tanh_grad"))
    monkeypatch.setattr(launches, "DTYPES", (torch.bfloat16,))
    assert launches.launch_all("resident", torch.device("cpu")) == 2
