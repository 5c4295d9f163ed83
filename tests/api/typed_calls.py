"""What a type checker makes of a user's calls. Read by mypy, run by nobody."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import tritonrnn


def calls(x: Tensor, packed: PackedSequence, either: Tensor | PackedSequence) -> None:
    """Call everything with everything: as torch.nn's, a call returns what it was given."""
    rnn, cell, weights = tritonrnn.RNN(3, 4), tritonrnn.RNNCell(3, 4), [x]
    run = tritonrnn.functional.rnn
    assert_type(nn.RNN(3, 4).forward(x), tuple[Tensor, Tensor])
    assert_type(rnn.forward(x), tuple[Tensor, Tensor])
    assert_type(rnn.forward(x, x, lengths=x, reset=x), tuple[Tensor, Tensor])
    assert_type(rnn.forward(packed), tuple[PackedSequence, Tensor])
    assert_type(run(x, None, weights), tuple[Tensor, Tensor])
    assert_type(run(x, x, weights, lengths=x, reset=x), tuple[Tensor, Tensor])
    assert_type(run(packed, x, weights), tuple[PackedSequence, Tensor])
    assert_type(rnn.forward(either)[0], Tensor | PackedSequence)
    assert_type(cell.forward(x), Tensor)
    assert_type(tritonrnn.functional.rnn_cell(x, None, x, x), Tensor)
    assert_type(tritonrnn.convert(nn.Sequential()), nn.Sequential)
    assert_type(tritonrnn.convert(rnn), tritonrnn.RNN)
