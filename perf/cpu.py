"""``python -m perf cpu``: tritonrnn.RNN against torch.nn.RNN on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import tritonrnn
from perf import environment, tables
from perf.cases import Case, Workload
from perf.timing import Job, time_in_rounds

CASES = (
    Case(T=100, B=1, I=32, H=32, layers=1, directions=1),
    Case(T=200, B=8, I=64, H=64, layers=1, directions=1),
    Case(T=100, B=32, I=64, H=128, layers=2, directions=2),
    Case(T=256, B=16, I=128, H=256, layers=1, directions=1),
    Case(T=64, B=64, I=256, H=512, layers=1, directions=1),
)

# The geometric mean of the speedups that each mode is to reach.
TARGETS = {"train": 1.8, "train_packed": 2.5, "infer": 1.1}

# torch.nn.RNN takes part twice: what it gains on itself is the noise.
REFERENCE = "torch.nn.RNN"
AGAIN = "torch.nn.RNN again"
OURS = "tritonrnn.RNN"
PEERS: dict[str, Callable[..., nn.RNNBase]] = {
    REFERENCE: nn.RNN,
    AGAIN: nn.RNN,
    OURS: tritonrnn.RNN,
}

# A result may be off by twice the error of nn.RNN, or by rounding where nn.RNN happens to be exact.
ALLOWED_ERRORS = 2.0
LEAST_TOLERANCE = 8 * torch.finfo(torch.float32).eps


def results_of(module: nn.RNNBase, workload: Workload, mode: str) -> list[Tensor]:
    """Return all that a run computes: output, ``h_n``, and in training the gradients."""
    if mode == "infer":
        return list(workload.infer(module))
    tokens = workload.tokens.clone().requires_grad_()
    results = workload.train(module, tokens)
    gradients = [tensor.grad for tensor in (tokens, *module.parameters())]
    module.zero_grad()
    # Every parameter of an RNN has a part in its output.
    return [*(result.detach() for result in results), *(g for g in gradients if g is not None)]


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error of any result, each relative to its own largest number."""
    if [tensor.shape for tensor in results] != [tensor.shape for tensor in exact]:
        return float("inf")
    errors = [
        (result.double() - truth).abs().max() / truth.abs().max()
        for result, truth in zip(results, exact)
    ]
    return float(torch.stack(errors).max())


def measure(
    case: Case, mode: str, *, rounds: int, seconds: float, seed: int, random: Random
) -> pd.DataFrame:
    """Check the peers, then time those whose results are right.

    Args:
        case: The sizes.
        mode: One of ``TARGETS``.
        rounds: Samples of each peer.
        seconds: Least time of a sample.
        seed: Of the weights and the input.
        random: Chooses the order of the peers in each round.

    Returns:
        One row for each peer.
    """
    workload = Workload.make(case, packed=mode == "train_packed", seed=seed)
    modules = {peer: case.make_module(cls, seed) for peer, cls in PEERS.items()}
    exact = results_of(case.make_module(nn.RNN, seed).double(), workload.to(torch.float64), mode)
    errors = {
        peer: relative_error(results_of(module, workload, mode), exact)
        for peer, module in modules.items()
    }
    tolerance = max(ALLOWED_ERRORS * errors[REFERENCE], LEAST_TOLERANCE)
    right = {peer: module for peer, module in modules.items() if errors[peer] <= tolerance}
    samples = time_in_rounds(
        {peer: _job(module, workload, mode) for peer, module in right.items()},
        rounds=rounds,
        seconds=seconds,
        random=random,
    )
    rows = []
    for peer in PEERS:
        row: dict[str, object] = {
            "case_id": case.case_id,
            "peer": peer,
            "mode": mode,
            **vars(case),
            "nonlinearity": "tanh",
            "layout": "packed" if mode == "train_packed" else "padded",
            "dtype": "float32",
            "device": "cpu",
            "status": "ok" if peer in right else "wrong",
            "max_rel_err": errors[peer],
            "tolerance": tolerance,
        }
        if peer in right:
            row |= quantiles("wall_us", [1e6 * sample[peer] for sample in samples])
            row |= quantiles(
                "speedup_vs_nn", [sample[REFERENCE] / sample[peer] for sample in samples]
            )
        rows.append(row | {"n_samples": len(samples) if peer in right else 0})
    return pd.DataFrame(rows)


def _job(module: nn.RNNBase, workload: Workload, mode: str) -> Job:
    if mode == "infer":
        return Job(call=lambda: workload.infer(module), reset=lambda: None)
    tokens = workload.tokens.clone().requires_grad_()

    def reset() -> None:
        tokens.grad = None
        module.zero_grad()

    return Job(call=lambda: workload.train(module, tokens), reset=reset)


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the columns ``name_p10``, ``name_p50`` and ``name_p90``."""
    series = pd.Series(values)
    return {f"{name}_p{percent}": float(series.quantile(percent / 100)) for percent in (10, 50, 90)}


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each case and mode: times, speedup, and the noise of nn.RNN.

    Args:
        rows: Those of :func:`measure`.

    Returns:
        A table; its ``slower`` says whether tritonrnn is slower than nn.RNN by more than nn.RNN
        is slower than itself: its median speedup is below 1 and below the noise's p10.
    """
    keys = ["case_id", "mode"]
    reference, again, ours = (
        rows[rows["peer"] == peer].set_index(keys) for peer in (REFERENCE, AGAIN, OURS)
    )
    speedup = ours["speedup_vs_nn_p50"]
    summary = pd.DataFrame(
        {
            "nn_us": reference["wall_us_p50"],
            "tritonrnn_us": ours["wall_us_p50"],
            "speedup_p10": ours["speedup_vs_nn_p10"],
            "speedup_p50": speedup,
            "speedup_p90": ours["speedup_vs_nn_p90"],
            "noise_p10": again["speedup_vs_nn_p10"],
            "noise_p90": again["speedup_vs_nn_p90"],
            "slower": (speedup < 1) & (speedup < again["speedup_vs_nn_p10"]),
            "status": ours["status"],
        }
    )
    return summary.reset_index()


def geometric_means(summary: pd.DataFrame) -> dict[str, float]:
    """Return the geometric mean of each mode's median speedups."""
    return {
        # A case that was not timed leaves its mode without a mean.
        str(mode): math.exp(group["speedup_p50"].map(math.log).mean(skipna=False))
        for mode, group in summary.groupby("mode", sort=False)
    }


def verdict(summary: pd.DataFrame) -> list[str]:
    """Return, in plain sentences, which targets are met."""
    sentences = [
        f"WRONG: {row['mode']} {row['case_id']} differs from float64; it was not timed."
        for _, row in summary[summary["status"] != "ok"].iterrows()
    ]
    for mode, speedup in geometric_means(summary).items():
        met = "met" if speedup >= TARGETS[mode] else "NOT met"
        sentences.append(
            f"{mode}: {speedup:.2f} times as fast as torch.nn.RNN in the geometric mean; "
            f"the target of {TARGETS[mode]} is {met}."
        )
    slower = summary[summary["slower"]]
    sentences += [
        f"SLOWER: {row['mode']} {row['case_id']} runs at {row['speedup_p50']:.3f} of the speed "
        f"of torch.nn.RNN, below the {row['noise_p10']:.3f} that its noise explains."
        for _, row in slower.iterrows()
    ]
    if slower.empty:
        sentences.append("No case is slower than torch.nn.RNN beyond its noise against itself.")
    return sentences


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*, rounds: int, seconds: float, threads: int, out: Path | None, seed: int) -> bool:
    """Measure every case in every mode, print the tables, write the rows to ``out``.

    Args:
        rounds: Samples of each peer.
        seconds: Least time of a sample.
        threads: Threads that torch may use.
        out: Folder for the rows, written as each case ends, if they are wanted.
        seed: Of the weights, the inputs and the order of the peers.

    Returns:
        Whether every result was right.
    """
    console = Console()
    random = Random(seed)
    run_id = environment.new_run_id()
    measured = []
    with torch_threads(threads), Progress(console=console, transient=True) as progress:
        if out is not None:
            tables.add_environment(out, run_id, environment.describe(torch.device("cpu")))
        bar = progress.add_task("", total=len(CASES) * len(TARGETS))
        for mode in TARGETS:
            for case in CASES:
                progress.update(bar, description=f"{mode} {case.case_id}")
                rows = measure(
                    case, mode, rounds=rounds, seconds=seconds, seed=seed, random=random
                ).assign(run_id=run_id)
                if out is not None:
                    tables.append_rows(out, "cpu", rows)
                measured.append(rows)
                progress.advance(bar)
    summary = summarize(pd.concat(measured, ignore_index=True))
    formats = ("", "", ".0f", ".0f", ".2f", ".2f", ".2f", ".2f", ".2f", "", "")
    print(summary.to_markdown(index=False, floatfmt=formats))
    print()
    print("\n".join(verdict(summary)))
    return bool((summary["status"] == "ok").all())
