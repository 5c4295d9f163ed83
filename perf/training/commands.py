"""Parse the command lines of ``python -m perf words`` and ``adding``."""

from __future__ import annotations

from typing import Annotated

import typer

from perf.options import Device, KeptIn, Seed, Threads


def words(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training words.")] = 3,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each direction.")] = 128,
    device: Device = "cpu",
    out: KeptIn = None,
    try_words: Annotated[
        str, typer.Option("--try", help="Words of your own to classify at the end.")
    ] = "",
    seed: Seed = 0,
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


def adding(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1_000,
    T: Annotated[int, typer.Option("--T", min=2, help="Steps of a sequence.")] = 50,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 64,
    threads: Threads = 0,
    device: Device = "cpu",
    out: KeptIn = None,
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
