"""The targets of the CPU path: their verdicts, and a tiny run of the command."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

import perf
from perf.__main__ import app
from perf.bench import cpu, presets


def case_id(T: int, layout: str) -> str:
    return f"T{T}-{layout}"


def made_up_rows(cases: Iterable[tuple[int, str, float, float]]) -> pd.DataFrame:
    """Return rows from (T, the target it counts for, median speedup, p10 of the noise)."""
    rows = []
    for T, counts_for, speedup, noise_p10 in cases:
        for peer, p10, p50 in (
            (cpu.REFERENCE, 1.0, 1.0),
            (cpu.AGAIN, noise_p10, 1.0),
            (cpu.OURS, 0.9 * speedup, speedup),
        ):
            layout = "packed" if counts_for == "train_packed" else "padded"
            rows.append(
                {
                    "case_id": case_id(T, layout),
                    "layout": layout,
                    "mode": "infer" if counts_for == "infer" else "fwdbwd",
                    "peer": peer,
                    "device": "cpu",
                    "status": "ok" if p50 == p50 else "wrong",
                    "wall_us_p50": 100 / p50,
                    "speedup_vs_nn_p10": p10,
                    "speedup_vs_nn": p50,
                    "speedup_vs_nn_p90": 1.1 * p50,
                }
            )
    return pd.DataFrame(rows)


def test_summary_means_and_verdict():
    summary = cpu.summarize(
        made_up_rows(
            [
                (1, "infer", 1.3, 0.9),
                (2, "infer", 0.8, 0.9),
                (3, "infer", 0.95, 0.9),
                (1, "train", 4.0, 0.9),
                (2, "train", 1.0, 0.9),
            ]
        )
    )
    assert summary["mode"].tolist() == ["train"] * 2 + ["infer"] * 3
    assert summary["nn_us"].tolist() == 5 * [100.0]
    assert summary["tritonrnn_us"].tolist() == pytest.approx([25, 100, 100 / 1.3, 125, 100 / 0.95])
    assert summary["slower"].tolist() == [False, False, False, True, False]
    means = cpu.geometric_means(summary)
    assert means == pytest.approx({"train": 2.0, "infer": (1.3 * 0.8 * 0.95) ** (1 / 3)})
    met, missed, slower = cpu.verdict(summary)
    assert met.startswith("train: 2.00 times")
    assert met.endswith("target of 1.8 is met.")
    assert missed.endswith("target of 1.1 is NOT met.")
    assert slower.startswith("SLOWER: infer T2-padded runs at 0.800")


def test_verdict_meets_no_target_with_a_case_that_was_not_timed():
    summary = cpu.summarize(
        made_up_rows([(1, "train_packed", 4.0, 0.9), (2, "train_packed", math.nan, 0.9)])
    )
    wrong, missed, _ = cpu.verdict(summary)
    assert wrong.startswith("WRONG: train_packed T2-packed")
    assert missed.endswith("NOT met.")


def test_units_are_five_cases_in_three_modes():
    units = cpu.units()
    assert sorted((unit.case.layout, *unit.modes) for unit in units) == 5 * [
        ("packed", "fwdbwd")
    ] + 5 * [("padded", "fwdbwd", "infer")]
    assert all(
        names == (cpu.REFERENCE, cpu.AGAIN, cpu.OURS) for u in units for names in u.modes.values()
    )


def cpu_command(*more: str):
    arguments = ("cpu", "--rounds", "2", "--seconds", "0", "--threads", "1", *more)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.slow
def test_cpu_command_checks_times_and_writes(monkeypatch, tmp_path):
    sizes = {"T": "5", "B": "3", "I": "4", "H": "6", "layers": "1", "directions": "1"}
    sizes |= {"layouts": "packed", "modes": "fwdbwd"}
    units = presets.units("cpu", sizes, (cpu.REFERENCE, cpu.AGAIN, cpu.OURS), "cpu")
    monkeypatch.setattr(cpu, "units", lambda: units)
    result = cpu_command("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "train_packed:" in result.output
    rows = perf.load(tmp_path)
    assert set(rows["peer"]) == {cpu.REFERENCE, cpu.AGAIN, cpu.OURS}
    assert (rows["status"] == "ok").all()
    assert (rows["threads"] == 1).all()


def test_cpu_command_fails_for_a_wrong_result(monkeypatch):
    rows = made_up_rows([(5, "infer", math.nan, 0.9)])
    monkeypatch.setattr(cpu, "run_units", lambda *arguments, **options: None)
    monkeypatch.setattr(cpu.tables, "load", lambda folder: rows)
    monkeypatch.setattr(
        cpu, "units", lambda: [SimpleNamespace(case=SimpleNamespace(case_id=case_id(5, "padded")))]
    )
    result = cpu_command()
    assert result.exit_code == 1
    assert "WRONG: infer T5" in result.output
