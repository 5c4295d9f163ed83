"""Models that each version of tritonrnn saves once, for later versions to load.

``python -m tests.support.saved tests/data/saved/VERSION`` saves them with the version at hand, the
arguments and the results of a call beside each. tests/api/test_saved.py loads every such folder.
Run it with the oldest torch that the version supports: a newer torch may not be loaded by an older
one. The classes here are named in the files, so they stay, under their names. The folder ``0.1.0``
was written before the modules of the package were renamed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import tritonrnn


class NamedRNN(nn.RNN):
    """A user's subclass of ``torch.nn.RNN``, with an attribute of its own."""

    def __init__(self, name: str, *args, **options):
        super().__init__(*args, **options)
        self.name = name


class Tagger(nn.Module):
    """Read a padded batch with and without lengths and resets, and one that it packs itself."""

    def __init__(self):
        super().__init__()
        self.rnn = tritonrnn.RNN(3, 4, bias=False, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor, data: Tensor, batch_sizes: Tensor):
        packed, h_n = self.rnn(PackedSequence(data, batch_sizes))
        return *self.rnn(x), *self.rnn(x, lengths=lengths, reset=reset), packed.data, h_n


def tagger_arguments(B: int, T: int) -> tuple[Tensor, ...]:
    """Return arguments of :class:`Tagger`. The packed sequences have T to 1 steps."""
    lengths, batch_sizes = torch.arange(B) % (T + 1), torch.arange(T, 0, -1)
    reset = torch.arange(B * T).view(B, T) % 3 == 0
    return torch.randn(B, T, 3), lengths, reset, torch.randn(int(batch_sizes.sum()), 3), batch_sizes


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return each model to be saved whole, by the name of its file, and a call's arguments."""
    named = tritonrnn.convert(NamedRNN("mine", 3, 4, nonlinearity="relu", bidirectional=True))
    return {
        "rnn": (tritonrnn.RNN(3, 4, 2, dropout=0.5).eval(), (torch.randn(5, 2, 3),)),
        "cell": (tritonrnn.RNNCell(3, 4), (torch.randn(2, 3), torch.randn(2, 4))),
        "converted": (named, (torch.randn(5, 2, 3), torch.randn(2, 2, 4))),
    }


def exported(model: Tagger) -> torch.export.ExportedProgram:
    """Export the model for any number of steps and sequences."""
    B, T, N, packed_T = (torch.export.Dim(name) for name in ("B", "T", "N", "packed_T"))
    shapes = ({0: B, 1: T}, {0: B}, {0: B, 1: T}, {0: N}, {0: packed_T})
    return torch.export.export(model, tagger_arguments(2, 5), dynamic_shapes=shapes, strict=False)


def save(folder: Path) -> None:
    """Save the models, a state_dict and an exported program, each with a call and its results."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    calls = {}
    with torch.no_grad():
        for name, (model, arguments) in models().items():
            torch.save(model, folder / f"{name}.pt")
            calls[name] = arguments, model(*arguments)
        tagger = Tagger()
        torch.save(tagger.state_dict(), folder / "state_dict.pt")
        torch.export.save(exported(tagger), folder / "program.pt2")
        # Sizes that the export did not see.
        arguments = tagger_arguments(7, 3)
        calls["program"] = calls["state_dict"] = arguments, tagger(*arguments)
    torch.save(calls, folder / "calls.pt")


if __name__ == "__main__":
    # By its own name: the classes of this module would be pickled as those of __main__ otherwise.
    from tests.support import saved

    saved.save(Path(sys.argv[1]))
