"""Parse the command line, ``python -m perf``; each command imports what it needs when it runs."""

import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure tritonrnn against its peers. Run from a checkout, with the extra 'perf'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Rounds = Annotated[int, typer.Option(min=1, help="Samples of each peer.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Shortest time of a sample.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of torch on the CPU; 0: its choice.")]
Seed = Annotated[int, typer.Option(help="Seed of the inputs, the weights and the order.")]


def _device(name: str) -> str:
    """Return the name of a device after checking that it exists."""
    if name == "cpu":
        return name
    # Imported here, so that --help does not wait for torch.
    import torch

    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise typer.BadParameter(f"Expected cpu, cuda or cuda:1, got {name!r}")
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise typer.BadParameter(f"There is no {name}: torch {torch.__version__} sees {found} GPUs")
    return name


Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...", callback=_device)]
Axis = Annotated[
    str | None,
    typer.Option(help="Integers: 1,16 or 64:1024:x2 or 10:50:+10. In place of the preset's."),
]


_LENGTHS = "equal, linear, uniform, words, lognormal"


def _names(axis: str, names: str) -> typer.models.OptionInfo:
    return typer.Option(
        f"--{axis}", help=f"Any of {names}; after commas, in place of the preset's."
    )


Run = Annotated[Path, typer.Argument(exists=True, help="A folder of a run, or its rows.")]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder for the rows, as CSV and Parquet; rows that it holds are kept.",
    ),
]


@app.command()
def run(
    preset: Annotated[str, typer.Option(help="smoke, cpu, headline, packed or full.")] = "smoke",
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder for the rows; cells with a row are not rerun."),
    ] = Path("perf/results/latest"),
    device: Device = "cpu",
    peer_names: Annotated[
        str,
        typer.Option("--peers", help="Names after commas; module:Class for a peer of your own."),
    ] = "",
    T: Axis = None,
    B: Axis = None,
    I: Axis = None,  # noqa: E741
    H: Axis = None,
    layers: Axis = None,
    directions: Axis = None,
    mode: Annotated[str | None, _names("mode", "infer, fwd, bwd, fwdbwd")] = None,
    dtype: Annotated[str | None, _names("dtype", "fp32, bf16, fp16, fp64")] = None,
    fp32_mode: Annotated[str | None, _names("fp32-mode", "tf32, ieee")] = None,
    layout: Annotated[str | None, _names("layout", "padded, packed, jagged")] = None,
    lengths: Annotated[str | None, _names("lengths", _LENGTHS)] = None,
    nonlinearity: Annotated[str | None, _names("nonlinearity", "tanh, relu")] = None,
    rounds: Rounds = 20,
    seconds: Seconds = 0.05,
    max_seconds: Annotated[float, typer.Option(help="Most time for a case and mode.")] = 60.0,
    timeout: Annotated[
        str, typer.Option(help="A worker that sends nothing for longer is ended.")
    ] = "300s",
    budget: Annotated[str, typer.Option(help="Stop after 90s, 9m or 2h; resume later.")] = "",
    threads: Threads = 0,
    seed: Seed = 0,
) -> None:
    """Measure many cases, every peer side by side, each case in a process of its own.

    Every result is checked against float64 before it is timed. A failure is a row with its reason.
    Each row is written as soon as it is known: stop the command at any moment, and run it again to
    continue.

    Exits with 1 when a result was wrong, or a peer raised, crashed or hung.
    """
    from perf.bench import presets
    from perf.bench.measure import Settings
    from perf.bench.run import OtherMachineError, run

    texts = {"T": T, "B": B, "I": I, "H": H, "layers": layers, "directions": directions}
    texts |= {"modes": mode, "dtypes": dtype, "fp32_modes": fp32_mode, "layouts": layout}
    texts |= {"lengths": lengths, "nonlinearities": nonlinearity}
    try:
        rows = run(
            presets.units(preset, texts, [name for name in peer_names.split(",") if name], device),
            out,
            Settings(rounds, seconds, max_seconds, threads, seed),
            device=device,
            timeout_s=presets.seconds(timeout),
            budget_s=presets.seconds(budget) if budget else float("inf"),
        )
    except (ValueError, OtherMachineError) as error:
        raise typer.BadParameter(str(error)) from error
    failed = {"wrong", "error", "timeout"} & {row["status"] for row in rows}
    raise typer.Exit(1 if failed else 0)


@app.command()
def calibrate(
    device: Device = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Takes calibration.json, for runs with the same --out."),
    ] = None,
) -> None:
    """Measure the constants of the roofline model, and show them beside the published ones."""
    import torch

    from perf.roofline import calibrate

    typer.echo(calibrate.run(torch.device(device), out).to_markdown(index=False, floatfmt=".4g"))


@app.command()
def accept(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for all results and for the state.")
    ],
    budget: Annotated[str, typer.Option(help="Time for all steps: 90s, 9m or 2h.")] = "540s",
    device: Device = "cuda",
    again: Annotated[str, typer.Option(help="Names of steps to repeat, after commas.")] = "",
) -> None:
    """Check on a GPU, in one command, that the kernels are right and safe, and how fast they are.

    Compiles in parallel, runs the GPU tests, runs each plan under compute-sanitizer, measures the
    constants of the roofline model and a balanced sample of cells, reports, and packs one archive.
    Stop it at any moment, and run it again to continue. On a CPU, the steps that need a GPU are
    reported as unavailable.

    Exits with 1 when a step failed.
    """
    from perf.bench import presets
    from perf.session import steps
    from perf.session.accept import accept

    try:
        records = accept(
            out,
            device,
            presets.seconds(budget),
            [name.strip() for name in again.split(",") if name],
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(steps.table(records))
    if any(record.status == "unfinished" for record in records.values()):
        typer.echo("\nNot everything is done; run the same command again to continue.")
    raise typer.Exit(1 if any(record.status == "failed" for record in records.values()) else 0)


@app.command()
def tune(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the rows and the table.")],
    preset: Annotated[str, typer.Option(help="Whose padded cases to time.")] = "headline",
    device: Device = "cuda",
    budget: Annotated[str, typer.Option(help="Stop after 90s, 9m or 2h; resume later.")] = "540s",
) -> None:
    """Time every feasible plan of each shape, and print what the chosen plan loses to the best.

    Run the same command again to measure what the budget left. On a CPU, the plans of the torch
    path are timed.
    """
    from perf.bench import presets
    from perf.session import tune

    try:
        table = tune.run(out, preset, device, presets.seconds(budget))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(tune.summary(table))
    typer.echo(f"\n{out / tune.PAGE}")


@app.command()
def report(folder: Run) -> None:
    """Write report.md and pictures into a folder of results."""
    from perf.report import summary as report

    typer.echo(report.write(folder))


@app.command()
def compare(before: Run, after: Run) -> None:
    """Judge cell by cell whether AFTER is faster than BEFORE by more than the noise.

    Exits with 1 if a cell is slower or lost, with 2 if the runs can't be compared.
    """
    from perf.report import compare

    try:
        table = compare.compare(before, after)
    except compare.NotComparableError as error:
        typer.echo(f"They can't be compared. {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(table.to_markdown(index=False, floatfmt=".3f"))
    typer.echo(f"\n{compare.summary(table)}")
    raise typer.Exit(1 if compare.has_regressed(table) else 0)


@app.command()
def show(
    case: Annotated[str, typer.Argument(help="A case_id, or a part of it that no other has.")],
    folder: Run = Path("perf/results/latest"),
) -> None:
    """Show all rows of a case."""
    from perf.report import tables

    rows = tables.load(folder)
    found = sorted({name for name in rows["case_id"] if case in name})
    found = [case] if case in found else found
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
def env(device: Device = "cpu") -> None:
    """Show the facts that the results of a run here would depend on."""
    import json

    import torch

    from perf.bench import environment

    typer.echo(json.dumps(environment.describe(torch.device(device)), indent=2))


@app.command()
def schema() -> None:
    """Show the columns of a table of results, with their units."""
    from perf.report import schema

    typer.echo(schema.document())


@app.command()
def words(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training words.")] = 3,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each direction.")] = 128,
    device: Device = "cpu",
    out: OutFolder = None,
    try_words: Annotated[
        str, typer.Option("--try", help="Words of your own to classify at the end.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the batches.")] = 0,
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
    import torch

    from perf.training.words import run

    agrees = run(
        epochs=epochs,
        hidden_size=hidden,
        device=torch.device(device),
        out=out,
        own_words=try_words.split(),
        seed=seed,
        top=top,
    )
    raise typer.Exit(0 if agrees else 1)


@app.command()
def cpu(
    rounds: Rounds = 20,
    seconds: Seconds = 0.05,
    threads: Threads = 2,
    out: OutFolder = None,
    seed: Seed = 0,
) -> None:
    """Judge tritonrnn.RNN against torch.nn.RNN on the CPU: training, packed training, inference.

    Measures the preset ``cpu`` with torch.nn.RNN, torch.nn.RNN again (the noise) and tritonrnn.RNN.
    Exits with 1 when a result is wrong. A missed target is printed, and is no error.
    """
    from perf.bench import cpu
    from perf.bench.measure import Settings

    settings = Settings(rounds=rounds, sample_s=seconds, threads=threads, seed=seed)
    raise typer.Exit(0 if cpu.run(settings, out) else 1)


@app.command()
def static(
    arch: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942.")] = "sm_90",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, too.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only bf16, fp16, tf32, fp32.")] = None,
    plan: Annotated[list[str] | None, typer.Option(help="Only plans of this name.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Only this many hidden units.")] = None,
) -> None:
    """Compile every plan for a GPU that need not be there, and show what the compiler made."""
    from perf.compile import static

    static.static(arch, json, dtype, plan, size)


@app.command()
def launches() -> None:
    """Count what a layer launches on a GPU, forward and backward, in every layout.

    No GPU need be there. D is the number of directions; lengths are new in every batch of real
    data, and seen before in the layers above the first.
    """
    from perf.bench import launches

    typer.echo(launches.table().to_markdown(index=False))


@app.command()
def adding(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1_000,
    T: Annotated[int, typer.Option("--T", min=2, help="Steps of a sequence.")] = 50,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 64,
    threads: Threads = 0,
    device: Device = "cpu",
    out: OutFolder = None,
    seed: Seed = 0,
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
    agrees = run(
        steps=steps, T=T, hidden_size=hidden, device=torch.device(device), out=out, seed=seed
    )
    raise typer.Exit(0 if agrees else 1)


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


if __name__ == "__main__":
    app(prog_name="python -m perf")
