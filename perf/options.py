"""Define the options that several commands of ``python -m perf`` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def existing(device: str) -> str:
    """Return the name of a device after checking that it exists."""
    if device == "cpu":
        return device
    # Imported here, so that --help does not wait for torch.
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device not in gpus and not (device == "cuda" and gpus):
        seen = ", ".join(gpus) or "no GPU"
        raise typer.BadParameter(f"There is no {device}: torch {torch.__version__} sees {seen}")
    return device


@contextmanager
def refused() -> Iterator[None]:
    """Show an argument that can't be used as typer shows one that can't be parsed."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Rounds = Annotated[int, typer.Option(min=1, help="Samples of each peer.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Shortest time of a sample.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of torch on the CPU; 0: its choice.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn: inputs, weights, the order.")]
Device = Annotated[
    str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...", callback=existing)
]
Out = Annotated[
    Path, typer.Option(file_okay=False, help="Folder for the results; what it holds is not rerun.")
]
KeptIn = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Folder for the results; what it holds is kept."),
]
Budget = Annotated[str, typer.Option(help="Stop after 90s, 9m or 2h; resume later.")]
Run = Annotated[Path, typer.Argument(exists=True, help="A folder of a run, or its rows.")]
Size = Annotated[
    str | None,
    typer.Option(help="Integers: 1,16 or 64:1024:x2 or 10:50:+10. In place of the preset's."),
]


def names(known: str) -> typer.models.OptionInfo:
    """Return the option of an axis that has names."""
    return typer.Option(help=f"Any of {known}; after commas, in place of the preset's.")
