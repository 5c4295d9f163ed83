"""Verdicts on made-up runs, and the pictures and texts of a report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import perf
from perf.__main__ import app
from perf.bench.cases import Case
from perf.report import compare, schema, tables
from perf.report import summary as report

GPU = {"device": "cuda", "gpu": "NVIDIA H200", "cpu": "any", "threads": 8, "torch": "2"}
CASE = Case(T=1024, B=16, I=256, H=256, dtype="bf16", fp32_mode="none", device="cuda")


def row(peer: str = "tritonrnn", us: float = 100.0, case: Case = CASE, **more: object) -> dict:
    """Return a row whose samples spread by one per cent each way."""
    spread = more.pop("spread", 0.01)
    assert isinstance(spread, float)
    clock = "event_us" if case.on_gpu else "wall_us"
    return {
        **case.row(peer, "fwdbwd"),
        "status": "ok",
        f"{clock}_p10": us * (1 - spread),
        f"{clock}_p50": us,
        f"{clock}_p90": us * (1 + spread),
        "us_per_step": us / case.T,
        "n_samples": 20,
        **more,
    }


def write_run(folder: Path, *rows: dict, facts: dict | None = None) -> Path:
    tables.add_environment(folder, "a", facts or GPU)
    with tables.RowFile(folder) as file:
        for one in rows:
            file.add({"run_id": "a", **one})
    return folder


def verdict_of(before: dict, after: dict, *others: dict) -> str:
    tables_of = [schema.typed(pd.DataFrame([one, *others])) for one in (before, after)]
    judged = compare.judge(*tables_of).set_index("peer")
    return str(judged["verdict"]["tritonrnn"])


AGAIN = row("nn_again", speedup_vs_nn=0.8)
FAILED = CASE.row("tritonrnn", "fwdbwd") | {"status": "oom", "error": "big"}


@pytest.mark.parametrize(
    ("verdict", "before", "after", "others"),
    [
        ("SAME", row(), row(us=101), []),
        ("FASTER", row(), row(us=90), []),
        ("SLOWER", row(), row(us=110), []),
        # Ranges that touch decide nothing, and wide ones are not called the same.
        ("UNCLEAR", row(spread=0.2), row(us=110), []),
        ("UNCLEAR", row(spread=0.2), row(), []),
        # nn.RNN differs from itself by a quarter, so a tenth is noise.
        ("SAME", row(), row(us=110), [AGAIN]),
        ("SLOWER", row(), row(us=150), [AGAIN]),
        ("LOST", row(), FAILED, []),
        ("NEW", FAILED, row(), []),
    ],
)
def test_verdicts(verdict, before, after, others):
    assert verdict_of(before, after, *others) == verdict


def test_cells_of_one_run_only_are_lost_or_new_and_the_worst_comes_first():
    other = Case(**{**vars(CASE), "T": 128})
    before, after = (
        schema.typed(pd.DataFrame(rows))
        for rows in ([row(), row("loop")], [row(us=50), row(case=other)])
    )
    judged = compare.judge(before, after)
    assert judged["verdict"].tolist() == ["LOST", "FASTER", "NEW"]
    assert compare.summary(judged) == "1 LOST, 1 FASTER, 1 NEW"
    assert compare.has_regressed(judged)
    assert not compare.has_regressed(compare.judge(before, before))


def test_cell_measured_twice_counts_as_it_was_measured_last():
    twice = schema.typed(pd.DataFrame([row(us=500), row(us=100)]))
    judged = compare.judge(schema.typed(pd.DataFrame([row()])), twice)
    assert judged["verdict"].tolist() == ["SAME"]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


def test_compare_command_exits_by_what_it_finds(tmp_path):
    before = write_run(tmp_path / "before", row())
    assert invoke("compare", before, before).exit_code == 0
    slower = invoke("compare", before, write_run(tmp_path / "slower", row(us=200)))
    assert slower.exit_code == 1
    assert "1 SLOWER" in slower.output


def test_compare_refuses_other_machines_and_precisions(tmp_path):
    before = write_run(tmp_path / "before", row())
    other_gpu = write_run(tmp_path / "gpu", row(), facts={**GPU, "gpu": "NVIDIA H100 80GB HBM3"})
    refused = invoke("compare", before, other_gpu)
    assert refused.exit_code == 2
    assert "H100" in refused.output
    fp32 = Case(**{**vars(CASE), "dtype": "fp32", "fp32_mode": "tf32"})
    refused = invoke("compare", before, write_run(tmp_path / "fp32", row(case=fp32)))
    assert refused.exit_code == 2
    assert "precisions" in refused.output
    # Another driver or torch may be the reason to compare.
    newer = write_run(tmp_path / "newer", row(), facts={**GPU, "torch": "3"})
    assert invoke("compare", before, newer).exit_code == 0


def made_up_sweep() -> list[dict]:
    rows = []
    for T in (64, 256, 1024):
        for B in (1, 16):
            for H in (64, 256):
                case = Case(T=T, B=B, I=H, H=H, dtype="bf16", fp32_mode="none", device="cuda")
                for peer, us in (("tritonrnn", 0.4 * T), ("nn_cudnn", 2.0 * T)):
                    speedup = 2.0 * T / us if H == 64 or peer == "nn_cudnn" else 0.9
                    rows.append(
                        row(
                            peer,
                            us,
                            case,
                            limit_us=0.2 * T,
                            pct_of_limit=100 * 0.2 * T / us,
                            speedup_vs_nn=speedup,
                            speedup_vs_nn_p10=0.99 * speedup,
                            speedup_vs_nn_p90=1.01 * speedup,
                            saved_MiB=T * B * H / 2**19,
                            peak_MiB=T * B * H / 2**18,
                            limit_kind="serial",
                        )
                    )
    return [*rows, {**FAILED, "peer": "flashrnn", "error": "flashrnn is not installed"}]


@pytest.mark.slow
def test_report_of_a_gpu_renders_all_of_its_sections_and_pictures(tmp_path):
    write_run(tmp_path, *made_up_sweep())
    (tmp_path / tables.CALIBRATION).write_text(
        '{"device": "NVIDIA H200", "measured": {"hbm_TBps": 4.3}, "missing": {},'
        ' "published": {"hbm_TBps": 4.8}}'
    )
    result = invoke("report", tmp_path)
    assert result.exit_code == 0
    text = (tmp_path / report.REPORT).read_text()
    for words in (
        *("NVIDIA H200", "4.3", "4.8", "flashrnn is not installed", "geometric mean"),
        *("slower: 6 of 12 cells", "fastest", "tritonrnn us/step", "nn_cudnn saved MiB"),
    ):
        assert words in text, words
    assert report.write(tmp_path).read_text() == text
    assert "fallback" not in text
    pictures = sorted(path.name for path in (tmp_path / report.PICTURES).iterdir())
    assert [name.split("-")[0] for name in pictures] == sorted(
        ["limit", "map", "memory", "speedup", "step", "time"]
    )
    assert all(f"({report.PICTURES}/{name})" in text for name in pictures)


def test_report_of_failures_alone_renders(tmp_path):
    write_run(tmp_path, FAILED)
    text = report.write(tmp_path).read_text()
    assert "Nothing was timed" in text
    assert "big" in text


def test_report_of_a_cpu_names_the_fallback(tmp_path):
    case = Case(T=8, B=1, I=2, H=3)
    facts = {"device": "cpu", "cpu": "abacus", "threads": 1}
    rows = (row(peer, case=case, speedup_vs_nn=1.0) for peer in ("nn_aten", "tritonrnn"))
    write_run(tmp_path, *rows, facts=facts)
    text = report.write(tmp_path).read_text()
    assert "fallback" in text
    # A second report overwrites the first, its pictures included.
    old = tmp_path / report.PICTURES / "old.png"
    old.touch()
    assert report.write(tmp_path).read_text() == text
    assert not old.exists()


RESULTS = Path(perf.__file__).parent / "results"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("run", ["cpu-2026-11-23", "cpu-2026-11-24", "cpu-amd-epyc"])
def test_committed_rows_load_with_the_names_of_today(run, name):
    assert "torch, walk" in (RESULTS / run / "rows.jsonl").read_text()
    ours = perf.load(RESULTS / run / name).set_index("peer").loc["tritonrnn"]
    assert ours["plan"].eq("torch, in-place").all()


def test_committed_runs_can_be_compared_and_reported(tmp_path):
    before, after = RESULTS / "cpu-2026-11-23", RESULTS / "cpu-2026-11-24"
    compared = invoke("compare", before, after)
    assert compared.exit_code in (0, 1)
    assert len(compare.compare(before, after)) == len(perf.load(before))
    shutil.copytree(RESULTS / "cpu-amd-epyc", tmp_path, dirs_exist_ok=True)
    text = report.write(tmp_path).read_text()
    assert "torch, in-place" in text
    assert "torch, walk" not in text


def test_targets_of_the_cpu_are_judged_if_every_case_is_there():
    def judged(rows: pd.DataFrame) -> dict[str, str]:
        *_, last = report.speedups(rows)
        return dict(line.split(": ") for line in last.splitlines() if "the target of" in line)

    rows = perf.load(RESULTS / "cpu-2026-11-24")
    # As README has them.
    for kind, mean in {"infer": "1.18", "fwdbwd": "1.95"}.items():
        assert judged(rows)[f"- {kind}, padded"].startswith(mean)
    assert all(said.endswith("is met.") for said in judged(rows).values())
    assert len(judged(rows)) == 3
    one = (rows["peer"] == "tritonrnn") & (rows["mode"] == "infer") & (rows["B"] == 1)
    assert one.sum() == 1
    assert judged(rows[~one]) == {}
    # A case that was not timed misses its target, and no other.
    rows.loc[one, "speedup_vs_nn"] = float("nan")
    assert judged(rows)["- infer, padded"].endswith("is NOT met.")
    assert judged(rows)["- fwdbwd, padded"].endswith("is met.")


def test_static_rows_have_the_names_of_today():
    path = RESULTS / "static/sm_90.jsonl"
    [*rows] = tables.read_rows(path)
    assert {row["interleave"] for row in rows} == {1, 2}
    assert not any("turns" in row for row in rows)


@pytest.mark.parametrize(
    ("plan", "now"),
    [
        ("torch, native", "torch, aten"),
        ("torch, recorded", "torch, composite"),
        ("triton, resident: tiles of 16", "triton, resident: tiles of 16"),
        (None, None),
    ],
)
def test_old_names_are_replaced(plan, now):
    row = {"peer": "nn_native", "plan": plan, "error": "torch, walk"}
    expected = {"peer": "nn_no_cudnn", "plan": now, "error": "torch, walk"}
    assert tables.renamed(row) == expected
    assert tables.renamed(expected) == expected


def test_load_joins_the_facts_of_each_run(tmp_path):
    rows = perf.load(write_run(tmp_path, row()))
    assert rows["gpu"].tolist() == ["NVIDIA H200"]
    with pytest.raises(FileNotFoundError):
        perf.load(tmp_path / "nowhere")
