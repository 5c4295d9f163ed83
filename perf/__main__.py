"""Parse the command line, ``python -m perf``; each command imports what it needs when it runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from perf import options
from perf.options import names, refused

app = typer.Typer(
    help="Measure tritonrnn against its peers. Run from a checkout, with the extra 'perf'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _exit_code(rows: Iterable[Mapping[str, object]]) -> int:
    return int(any(row["status"] in ("wrong", "error", "timeout") for row in rows))


@app.command()
def run(
    preset: Annotated[
        str, typer.Option(help="smoke, cpu, short, headline, packed or full.")
    ] = "smoke",
    out: options.Out = Path("perf/results/latest"),
    device: options.Device = "cpu",
    peer_names: Annotated[
        str,
        typer.Option("--peers", help="Names after commas; module:Class for a peer of your own."),
    ] = "",
    T: options.Size = None,
    B: options.Size = None,
    I: options.Size = None,  # noqa: E741
    H: options.Size = None,
    layers: options.Size = None,
    directions: options.Size = None,
    mode: Annotated[str | None, names("infer, fwd, bwd, fwdbwd")] = None,
    dtype: Annotated[str | None, names("fp32, bf16, fp16, fp64")] = None,
    fp32_mode: Annotated[str | None, names("tf32, ieee")] = None,
    layout: Annotated[str | None, names("padded, packed, jagged, lengths, cell")] = None,
    lengths: Annotated[str | None, names("equal, linear, uniform, words, lognormal")] = None,
    nonlinearity: Annotated[str | None, names("tanh, relu")] = None,
    rounds: options.Rounds = 20,
    seconds: options.Seconds = 0.05,
    max_seconds: Annotated[float, typer.Option(help="Most time for a case and mode.")] = 60.0,
    timeout: Annotated[
        str, typer.Option(help="A worker that sends nothing for longer is ended.")
    ] = "300s",
    budget: options.Budget = "1000h",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
) -> None:
    """Measure many cases, every peer side by side, each case in a process of its own.

    Every result is checked against float64 before it is timed. A failure is a row with its reason.
    Each row is written as soon as it is known: stop the command at any moment, and run it again to
    continue.

    Exits with 1 when a result was wrong, or a peer raised, crashed or hung.
    """
    from perf.bench import presets
    from perf.bench.measure import Settings
    from perf.bench.sweep import Sweep

    axes = {"T": T, "B": B, "I": I, "H": H, "layers": layers, "directions": directions}
    axes |= {"mode": mode, "dtype": dtype, "fp32_mode": fp32_mode, "layout": layout}
    axes |= {"lengths": lengths, "nonlinearity": nonlinearity}
    peers = [name for name in peer_names.split(",") if name]
    with refused():
        timeout_s, budget_s = presets.seconds(timeout), presets.seconds(budget)
        settings = Settings(rounds, seconds, max_seconds, threads, seed, timeout_s, budget_s)
        rows = Sweep(presets.units(preset, axes, peers, device), out, settings, device).run()
    raise typer.Exit(_exit_code(rows))


@app.command()
def cpu(
    short: Annotated[
        bool, typer.Option("--short", help="The preset short: sequences of 1 to 64 steps.")
    ] = False,
    rounds: options.Rounds = 20,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Shortest time of a sample; by default 0.05, 0.01 if --short."),
    ] = None,
    threads: options.Threads = 2,
    out: options.KeptIn = None,
    seed: options.Seed = 0,
) -> None:
    """Judge tritonrnn.RNN against torch.nn.RNN on the CPU: training, packed training, inference.

    Runs the preset ``cpu`` with torch.nn.RNN, torch.nn.RNN again (the noise) and tritonrnn.RNN, and
    prints what ``report`` says of the speed. A missed target is no error.

    With --short, runs the preset ``short`` in one process, and prints where a call is slower.

    Exits with 1 when a result was wrong, or a peer raised, crashed or hung.
    """
    from perf.bench import presets
    from perf.bench.measure import Settings
    from perf.bench.sweep import Sweep
    from perf.report import short_table, summary, tables

    if seconds is None:
        seconds = 0.01 if short else 0.05
    settings = Settings(rounds, seconds, threads=threads, seed=seed, one_process=short)
    preset = "short" if short else "cpu"
    units = presets.units(preset, {}, ("nn_aten", "nn_again", "tritonrnn"), "cpu")
    with TemporaryDirectory() as scratch, refused():
        folder = out or Path(scratch)
        rows = Sweep(units, folder, settings, "cpu").run()
        shown = short_table.paragraphs if short else summary.speedups
        typer.echo("\n\n".join(shown(tables.load(folder))))
    raise typer.Exit(_exit_code(rows))


@app.command()
def calibrate(
    device: options.Device = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Takes calibration.json, for runs with the same --out."),
    ] = None,
) -> None:
    """Measure the constants of the roofline model, and show them beside the published ones.

    Exits with 1 when one could not be measured on a GPU.
    """
    from perf.roofline import calibrate

    table = calibrate.run(device, out)
    missing = table.loc[table["not measured because"].notna(), "constant"]
    typer.echo(table.to_markdown(index=False, floatfmt=".4g"))
    typer.echo(f"\nMeasured: {table['measured'].count()}; missing: {', '.join(missing) or 'none'}.")
    raise typer.Exit(int(device != "cpu" and not missing.empty))


@app.command()
def accept(
    pieces: Annotated[
        list[str] | None, typer.Argument(help="Any of right, fast, why; by default all.")
    ] = None,
    out: options.Out = Path("out/accept"),
    archive: Annotated[
        Path | None, typer.Option(help="File that takes all results; by default in --out.")
    ] = None,
    budget: options.Budget = "540s",
    device: options.Device = "cuda",
    again: Annotated[str, typer.Option(help="Names of steps to repeat, after commas.")] = "",
) -> None:
    """Find out on a GPU whether the kernels are right, how fast they are, and why.

    Runs what is not done yet: tests, sanitizer, calibration, cells, plans, profiles; perf/GPU.md
    lists the steps. Stop it at any moment, and run it again to continue. On a CPU, the steps that
    need a GPU are unavailable.

    Exits with 1 when a step failed.
    """
    from perf.bench import presets
    from perf.session import accept as session
    from perf.session import tune

    repeated = [name.strip() for name in again.split(",") if name]
    with refused():
        records = session.accept(
            out, device, presets.seconds(budget), pieces or session.PIECES, repeated, archive
        )
    typer.echo(f"{tune.summary(tune.read(out))}\n\n{session.table(records)}")
    if any(record.status not in session.FINAL for record in records.values()):
        typer.echo("\nNot everything is done; run the same command again to continue.")
    raise typer.Exit(1 if any(record.status == "failed" for record in records.values()) else 0)


@app.command()
def tune(
    out: options.Out,
    preset: Annotated[str, typer.Option(help="Whose cases to try.")] = "headline",
    plan: Annotated[str | None, typer.Option(help="The only plan to try.")] = None,
    device: options.Device = "cuda",
) -> None:
    """Try every plan on the GPU at hand: is it right, and is it faster than cuDNN?

    The trials are those that a first call makes, and serve every later process. What has been tried
    is not tried again: stop the command at any moment, and run it again to continue. With
    TRITONRNN_AUTOTUNE=verify, nothing is timed.

    Exits with 1 when a plan is wrong or fails, with 5 when there was nothing to try.
    """
    from perf.session import tune

    with refused():
        trials, beside = tune.run(out, preset, device, plan)
    typer.echo(f"{tune.summary(trials)}\n\n{tune.verdict(beside)}")
    if not beside.empty:
        typer.echo("\n" + beside.head(10).to_markdown(index=False, floatfmt=".3g"))
    if trials.empty:
        raise typer.Exit(5)
    raise typer.Exit(int(trials["verdict"].isin(["wrong", "failed"]).any()))


@app.command()
def report(folder: options.Run) -> None:
    """Write report.md and pictures into a folder of results."""
    from perf.report import summary as report

    typer.echo(report.write(folder))


@app.command()
def compare(before: options.Run, after: options.Run) -> None:
    """Judge cell by cell whether AFTER is faster than BEFORE by more than the noise.

    Exits with 1 if a cell is slower or lost, with 2 if the runs can't be compared.
    """
    from perf.report import compare

    with refused():
        table = compare.compare(before, after)
    typer.echo(table.to_markdown(index=False, floatfmt=".3f"))
    typer.echo(f"\n{compare.summary(table)}")
    raise typer.Exit(1 if compare.has_regressed(table) else 0)


@app.command()
def show(
    case: Annotated[str, typer.Argument(help="A case_id, or a part of it that no other has.")],
    folder: options.Run = Path("perf/results/latest"),
) -> None:
    """Show all rows of a case."""
    from perf.report import tables

    rows = tables.load(folder)
    found = sorted({name for name in rows["case_id"] if case in name})
    if len(found) != 1:
        raise typer.BadParameter(f"Expected one case, found {len(found)}: {', '.join(found)}")
    of_case = rows[rows["case_id"] == found[0]].dropna(axis=1, how="all")
    for mode, cells in of_case.groupby("mode", observed=True):
        typer.echo(f"\n{found[0]} {mode}\n")
        table = cells.drop(columns=["case_id", "mode"]).astype({"peer": "string"})
        table = table.set_index("peer").T
        # Transposed, a row mixes values and texts.
        short = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
        typer.echo(short.where(table.notna(), "").to_markdown(disable_numparse=True))


@app.command()
def env(device: options.Device = "cpu") -> None:
    """Show the facts that the results of a run here would depend on."""
    import json

    from perf.bench import environment

    typer.echo(json.dumps(environment.describe(device), indent=2))


@app.command()
def schema() -> None:
    """Show the columns of a table of results, with their units."""
    from perf.report import schema

    typer.echo(schema.document())


@app.command()
def static(
    arch: Annotated[str, typer.Option(help="sm_80, ..., sm_120, or gfx942.")] = "sm_90",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, too.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only bf16, fp16, tf32, fp32.")] = None,
    plan: Annotated[list[str] | None, typer.Option(help="Only plans of this name.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Only this many hidden units.")] = None,
    every: Annotated[bool, typer.Option(help="Every epilogue and layout of each size.")] = False,
) -> None:
    """Compile every plan for a GPU that need not be there, and show what the compiler made."""
    from perf.compile import static

    with refused():
        rows = static.run(arch, dtype, plan, size, every=every)
    typer.echo(rows.to_string(index=False))
    if json is not None:
        rows.assign(**static.versions(arch)).to_json(json, orient="records", lines=True)


@app.command()
def launches() -> None:
    """Count what a layer launches on a GPU, forward and backward, in every layout.

    No GPU need be there. D is the number of directions; lengths are new in every batch of real
    data, and seen before in the layers above the first.
    """
    from perf.bench import launch_counts

    typer.echo(launch_counts.table().to_markdown(index=False))


@app.command()
def features(
    differences: Annotated[
        bool, typer.Option("--differences", help="Only what one can do and the other can't.")
    ] = False,
    tests: Annotated[
        list[str] | None, typer.Argument(help="Files, and options of pytest after --.")
    ] = None,
) -> None:
    """Run the tests of features, and print what torch.nn.RNN and tritonrnn.RNN can do.

    A test proves a feature on torch.nn.RNN, on the torch path and on the Triton path, which without
    a GPU runs in Triton's interpreter. Below the table is why a cell is not "yes".

    Exits with 1 when a test did not do what its mark says.
    """
    from perf.features import run

    outcomes = run(tests or [])
    typer.echo(outcomes.markdown(differences))
    raise typer.Exit(0 if outcomes.are_as_said else 1)


@app.command()
def words(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training words.")] = 3,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each direction.")] = 128,
    device: options.Device = "cpu",
    out: options.KeptIn = None,
    seed: options.Seed = 0,
    top: Annotated[
        int, typer.Option(min=20, help="How far down each language's word list to go.")
    ] = 9_200,
) -> None:
    """Learn a word's language from its spelling, with torch.nn.RNN and with tritonrnn.

    A bidirectional RNN reads the letters of 87,000 words of 14 languages, in packed batches. It is
    trained on the same batches from the same seed with torch.nn.RNN, with tritonrnn.RNN, and with
    a twin of torch.nn.RNN that starts one unit in the last place away: the drift between the twins
    shows how much of a difference between the loss curves is rounding.

    Exits with 1 when the loss curves of torch.nn.RNN and tritonrnn.RNN disagree.
    """
    from perf.training.words import run

    agrees = run(epochs=epochs, hidden_size=hidden, device=device, out=out, seed=seed, top=top)
    raise typer.Exit(0 if agrees else 1)


@app.command()
def adding(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1_000,
    T: Annotated[int, typer.Option("--T", min=2, help="Steps of a sequence.")] = 50,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 64,
    threads: options.Threads = 0,
    device: options.Device = "cpu",
    out: options.KeptIn = None,
    seed: options.Seed = 0,
) -> None:
    """Learn to add two marked numbers far apart, with torch.nn.RNN and with tritonrnn.

    A relu RNN that starts at the identity (Le, Jaitly & Hinton 2015, arXiv:1504.00941) reads T
    numbers, two of them marked, and outputs their sum. It is trained as in ``words``: on the same
    batches with torch.nn.RNN, tritonrnn.RNN and a perturbed twin of torch.nn.RNN. With --out, the
    learning curves are drawn there as well.

    Exits with 1 when the loss curves of torch.nn.RNN and tritonrnn.RNN disagree.
    """
    import torch

    from perf.training.adding import run

    if threads:
        torch.set_num_threads(threads)
    agrees = run(steps=steps, T=T, hidden_size=hidden, device=device, out=out, seed=seed)
    raise typer.Exit(0 if agrees else 1)


if __name__ == "__main__":
    app(prog_name="python -m perf")
