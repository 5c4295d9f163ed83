"""The command line: ``python -m perf``. Each command imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure tritonrnn against its peers. Run from a checkout, with the extra 'perf'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OutFolder = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder for the rows, as CSV and Parquet; they join those already there.",
    ),
]


@app.command()
def words(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training words.")] = 3,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each direction.")] = 128,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    out: OutFolder = None,
    try_words: Annotated[
        str, typer.Option("--try", help="Words of your own to classify at the end.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the batches.")] = 0,
    top: Annotated[
        int, typer.Option(min=20, help="How far down each language's word list to go.")
    ] = 9_200,
) -> None:
    """Learn to tell a word's language from its spelling, with torch.nn.RNN and with tritonrnn.

    A bidirectional RNN reads the letters of 87,000 words of 14 languages, in packed batches. It is
    trained on the same batches from the same seed with torch.nn.RNN, with tritonrnn.RNN, and with
    a twin of torch.nn.RNN that starts one unit in the last place away: the drift between the twins
    says how much of a difference between the loss curves is rounding.

    Exits with 1 when the loss curves of torch.nn.RNN and tritonrnn.RNN disagree.
    """
    import torch

    from perf.words import run

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
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each peer.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.0, help="Least time of a sample.")] = 0.05,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch may use.")] = 2,
    out: OutFolder = None,
    seed: Annotated[int, typer.Option(help="Of the inputs, the weights and the order.")] = 0,
) -> None:
    """Time tritonrnn.RNN against torch.nn.RNN on the CPU: training, packed training, inference.

    Every result is checked against a float64 run before it is timed. Then torch.nn.RNN,
    torch.nn.RNN again (the noise) and tritonrnn.RNN take samples in rounds, in random order, and
    speedups are taken within a round.

    Exits with 1 when a result is wrong. A missed target is told, and is no error.
    """
    from perf.cpu import run

    raise typer.Exit(
        0 if run(rounds=rounds, seconds=seconds, threads=threads, out=out, seed=seed) else 1
    )


@app.command()
def static(
    arch: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942.")] = "sm_90",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, too.")] = None,
) -> None:
    """Compile every plan for a GPU that need not be there, and show what the compiler made."""
    from perf import static

    static.static(arch, json)


if __name__ == "__main__":
    app(prog_name="python -m perf")
