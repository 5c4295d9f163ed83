"""Errors have torch's type and wording, and are raised before any work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import tritonrnn
from tests.support.cases import RecordedCalls

# In place, and by torch's own kernels.
pytestmark = [
    pytest.mark.usefixtures("torch_back_end", "fewest_steps"),
    pytest.mark.parametrize("fewest_steps", [1, 1000], ids=["long", "short"], indirect=True),
]


def packed_rows(rows: int, batch_sizes: list[int], width: int = 3) -> PackedSequence:
    return PackedSequence(torch.ones(rows, width), torch.tensor(batch_sizes))


BAD_CALLS = {
    "1-D input": lambda: (torch.ones(3),),
    "4-D input": lambda: (torch.ones(1, 4, 2, 3),),
    "input size": lambda: (torch.ones(4, 2, 4),),
    "input size, unbatched": lambda: (torch.ones(4, 2),),
    "input size, packed": lambda: (packed_rows(3, [2, 1], width=4),),
    "input dtype float64": lambda: (torch.ones(4, 2, 3).double(),),
    "input dtype int64": lambda: (torch.ones(4, 2, 3).long(),),
    "input dtype, packed": lambda: (packed_rows(3, [2, 1])._replace(data=torch.ones(3, 3).half()),),
    "input device": lambda: (torch.ones(4, 2, 3, device="meta"),),
    "3-D packed data": lambda: (PackedSequence(torch.ones(2, 1, 3), torch.tensor([1, 1])),),
    "T = 0": lambda: (torch.ones(0, 2, 3),),
    "T = 0, unbatched": lambda: (torch.ones(0, 3),),
    "T = 0 and B = 0": lambda: (torch.ones(0, 0, 3),),
    "hx layers": lambda: (torch.ones(4, 2, 3), torch.ones(1, 2, 5)),
    "hx batch": lambda: (torch.ones(4, 2, 3), torch.ones(4, 3, 5)),
    "hx batch of 1": lambda: (torch.ones(4, 2, 3), torch.ones(4, 1, 5)),
    "hx size": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 6)),
    "1-D hx": lambda: (torch.ones(4, 2, 3), torch.ones(5)),
    "2-D hx of a batch": lambda: (torch.ones(4, 2, 3), torch.ones(4, 5)),
    "4-D hx": lambda: (torch.ones(4, 2, 3), torch.ones(1, 4, 2, 5)),
    "3-D hx of no batch": lambda: (torch.ones(4, 3), torch.ones(4, 1, 5)),
    "hx size of no batch": lambda: (torch.ones(4, 3), torch.ones(4, 6)),
    "hx device": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 5, device="meta")),
    "hx batch, packed": lambda: (packed_rows(3, [2, 1]), torch.ones(4, 3, 5)),
    "2-D hx, packed": lambda: (packed_rows(3, [2, 1]), torch.ones(4, 5)),
    "no input": lambda: (),
    "None": lambda: (None,),
    "a list": lambda: ([1.0, 2.0],),
}
# torch raises these in the middle of its work, with the message of an inner operator.
TYPE_ONLY = {
    "hx dtype": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 5).double()),
    "hx dtype int64": lambda: (torch.ones(4, 2, 3), torch.ones(4, 2, 5).long()),
    "hx dtype, packed": lambda: (packed_rows(3, [2, 1]), torch.ones(4, 2, 5).double()),
    "hx batch of 1, unsorted": lambda: (unsorted(), torch.ones(4, 1, 5)),
}


def unsorted() -> PackedSequence:
    return pack_sequence([torch.ones(1, 3), torch.ones(2, 3)], enforce_sorted=False)


def raised(function, *arguments, **options) -> Exception:
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_torchs_own(call, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    arguments = BAD_CALLS[call]()
    if batch_first and call == "T = 0":
        arguments = (arguments[0].transpose(0, 1),)
    ours = tritonrnn.RNN(3, 5, **options)
    expected = raised(nn.RNN(3, 5, **options), *arguments)
    message = str(expected).replace("RNN.forward()", f"{type(ours).__name__}.forward()")
    with pytest.raises(type(expected), match=f"^{re.escape(message)}$"):
        ours(*arguments)


@pytest.mark.parametrize("call", TYPE_ONLY)
def test_errors_from_the_middle_of_torch_keep_their_type(call):
    options = {"num_layers": 2, "bidirectional": True}
    arguments = TYPE_ONLY[call]()
    expected = raised(nn.RNN(3, 5, **options), *arguments)
    with pytest.raises(type(expected)):
        tritonrnn.RNN(3, 5, **options)(*arguments)


SILENT_FAULTS = {
    "more rows than batch_sizes": (lambda: (packed_rows(7, [2, 2, 1]),), "7.*5|5.*7"),
    "a last step of no rows": (lambda: (packed_rows(4, [2, 2, 0]),), "batch_sizes"),
    "more states than sequences": (lambda: (unsorted(), torch.ones(4, 3, 5)), "hidden size|hx"),
    "more states than sequences, H": (lambda: (unsorted(), torch.ones(4, 9, 5)), "hidden size|hx"),
}


@pytest.mark.feature(
    "refuses surplus rows in `hx` and in a `PackedSequence`, and a 0 in `batch_sizes`",
    nn="silently wrong",
)
@pytest.mark.parametrize("fault", SILENT_FAULTS)
def test_silent_faults_of_torch_raise(fault, implementation):
    arguments, match = SILENT_FAULTS[fault]
    module = implementation.rnn(3, 5, num_layers=2, bidirectional=True)
    with pytest.raises((RuntimeError, ValueError), match=match):
        module(*arguments())


@pytest.mark.parametrize(
    ("rows", "batch_sizes"), [(4, [2, 2, 1]), (5, [2, 3]), (0, []), (3, [2, -1, 2])], ids=str
)
def test_impossible_packed_sequences_raise(rows, batch_sizes):
    packed = PackedSequence(torch.ones(rows, 3), torch.tensor(batch_sizes, dtype=torch.int64))
    with pytest.raises(Exception) as theirs:
        nn.RNN(3, 5)(packed)
    with pytest.raises(theirs.type, match="batch_sizes"):
        tritonrnn.RNN(3, 5)(packed)


@pytest.mark.parametrize("call", [*BAD_CALLS, *TYPE_ONLY, *SILENT_FAULTS])
def test_errors_come_before_any_work(call):
    """Before the error, no tensor larger than one element is allocated but a batch_sizes' copy."""
    module = tritonrnn.RNN(3, 5, num_layers=2, bidirectional=True)
    faults = {name: arguments for name, (arguments, _) in SILENT_FAULTS.items()}
    arguments = {**BAD_CALLS, **TYPE_ONLY, **faults}[call]()
    known = [*module.parameters()]
    known += [x for argument in arguments if argument is not None for x in leaves_of(argument)]
    known = {x.untyped_storage()._cdata for x in known if isinstance(x, torch.Tensor)}
    with RecordedCalls() as calls:
        raised(module, *arguments)
    packed = [x.batch_sizes for x in arguments if isinstance(x, PackedSequence)]
    largest = max([8, *(batch_sizes.nbytes for batch_sizes in packed)])
    made = [n for key, (_, n) in calls.storages.items() if key not in known and n > largest]
    assert not made, calls.names


def leaves_of(argument):
    return argument if isinstance(argument, (PackedSequence, list)) else [argument]


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_autocast_does_not_cast_integers(nonlinearity):
    module = tritonrnn.RNN(3, 5, nonlinearity=nonlinearity)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="dtype"):
        module(torch.ones(4, 2, 3, dtype=torch.int64))
