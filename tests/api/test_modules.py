"""tritonrnn.RNN and RNNCell as modules: construction, parameters, saving, copying, printing."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

import tritonrnn
from tests.support.cases import DTYPE_NAMES

pytestmark = pytest.mark.usefixtures("torch_back_end")

PAIRS = {"RNN": (nn.RNN, tritonrnn.RNN), "RNNCell": (nn.RNNCell, tritonrnn.RNNCell)}
CONSTRUCTIONS = [
    ("RNN", (3, 5), {}),
    ("RNN", (3, 5, 2), {}),
    ("RNN", (3, 5, 2, "relu"), {}),
    ("RNN", (3, 5, 2, "relu", False, True, 0.25, True), {}),
    ("RNN", (3, 5), {"num_layers": 3, "bias": False, "bidirectional": True}),
    ("RNN", (3, 5), {"nonlinearity": "relu", "batch_first": True, "dtype": torch.float64}),
    ("RNN", (3, 5, 2), {"dropout": 0.5, "bidirectional": True, "dtype": torch.bfloat16}),
    ("RNN", (), {"input_size": 1, "hidden_size": 1}),
    ("RNNCell", (3, 5), {}),
    ("RNNCell", (3, 5, False), {}),
    ("RNNCell", (3, 5, True, "relu"), {}),
    ("RNNCell", (3, 5), {"bias": False, "nonlinearity": "relu", "dtype": torch.float64}),
]
constructions = pytest.mark.parametrize(
    ("kind", "arguments", "options"),
    CONSTRUCTIONS,
    ids=[f"{kind}{arguments}{options}" for kind, arguments, options in CONSTRUCTIONS],
)


def built(kind, arguments, options, seed=3) -> tuple[nn.Module, nn.Module]:
    """Return torch's module and ours, built from the same seed."""
    modules = []
    for module_class in PAIRS[kind]:
        torch.manual_seed(seed)
        modules.append(module_class(*arguments, **options))
    return tuple(modules)


def an_input(kind, module):
    shape = (4, 2, module.input_size) if kind == "RNN" else (2, module.input_size)
    return torch.randn(shape, dtype=next(module.parameters()).dtype)


def assert_close(got, expected) -> None:
    """Compare with torch's tolerances, in low precision with those of values around 1."""
    low = {"rtol": 0.016, "atol": 0.016} if got.dtype in (torch.bfloat16, torch.float16) else {}
    torch.testing.assert_close(got, expected, **low)


def result(module, *arguments):
    y = module.eval()(*arguments)
    return y[0] if isinstance(y, tuple) else y


@constructions
def test_parameters_have_torchs_names_order_and_values(kind, arguments, options):
    theirs, ours = built(kind, arguments, options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for expected, got in zip(theirs.parameters(), ours.parameters()):
        assert isinstance(got, nn.Parameter)
        assert got.dtype == expected.dtype
        assert got.requires_grad
        assert torch.equal(got, expected)


@constructions
def test_construction_draws_as_many_random_numbers_as_torch(kind, arguments, options):
    states = []
    for module_class in PAIRS[kind]:
        torch.manual_seed(11)
        module_class(*arguments, **options)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@constructions
def test_attributes_are_torchs(kind, arguments, options):
    theirs, ours = built(kind, arguments, options)
    names = ["input_size", "hidden_size", "bias", "nonlinearity", "training"]
    if kind == "RNN":
        names += ["mode", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size"]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name)
    if kind == "RNN":
        shapes = [[[tuple(w.shape) for w in ws] for ws in m.all_weights] for m in (theirs, ours)]
        assert shapes[0] == shapes[1]


@constructions
def test_repr_is_torchs(kind, arguments, options):
    theirs, ours = built(kind, arguments, options)
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(ours) == repr(theirs)


@constructions
def test_state_dict_goes_both_ways(kind, arguments, options):
    theirs, _ = built(kind, arguments, options, seed=1)
    _, ours = built(kind, arguments, options, seed=2)
    x = an_input(kind, ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    expected = result(ours, x)
    theirs.load_state_dict(ours.state_dict())
    assert_close(result(theirs, x), expected)
    _, other = built(kind, arguments, options, seed=4)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(result(other, x), expected)


def test_state_dict_loads_with_assign():
    source = tritonrnn.RNN(3, 5, 2)
    x = torch.randn(4, 2, 3)
    expected, _ = source(x)
    module = tritonrnn.RNN(3, 5, 2)
    module(x)
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(module(x)[0], expected)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@constructions
def test_copies_are_equal_and_independent(kind, arguments, options, duplicate):
    _, module = built(kind, arguments, options)
    x = an_input(kind, module)
    expected = result(module, x)
    # Copied after a call: what a call leaves on the module is copied as well.
    duplicated = duplicate(module)
    assert type(duplicated) is type(module)
    assert repr(duplicated) == repr(module)
    assert torch.equal(result(duplicated, x), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(result(duplicated, x), expected)
    assert not result(module, x).any()


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.half().float()],
    ids=["fp64", "bf16", "fp16-fp32"],
)
@constructions
def test_conversion_of_the_dtype_is_followed(kind, arguments, options, convert):
    theirs, ours = (convert(module) for module in built(kind, arguments, options))
    x = an_input(kind, ours)
    for module in (theirs, ours):
        assert next(module.parameters()).dtype == x.dtype
    assert result(ours, x).dtype == x.dtype
    assert_close(result(ours, x), result(theirs, x))


def test_module_made_on_meta_can_be_emptied_and_loaded():
    source = nn.RNN(3, 5, 2, bidirectional=True)
    ours = tritonrnn.RNN(3, 5, 2, bidirectional=True, device="meta")
    assert all(parameter.is_meta for parameter in ours.parameters())
    ours.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(ours(x)[0], source(x)[0])


def test_flatten_parameters_does_nothing():
    module = tritonrnn.RNN(3, 5, 2)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    assert module.flatten_parameters() is None
    assert [parameter.data_ptr() for parameter in module.parameters()] == before


def test_reset_parameters_draws_torchs_values():
    theirs, ours = nn.RNN(3, 5, 2), tritonrnn.RNN(3, 5, 2)
    for module in (theirs, ours):
        torch.manual_seed(8)
        module.reset_parameters()
    assert all(torch.equal(*pair) for pair in zip(theirs.parameters(), ours.parameters()))


def test_kinds_are_what_the_readme_says():
    """No nn.RNN, which torch.compile(fullgraph=True) refuses, but an RNNBase."""
    module = tritonrnn.RNN(3, 5)
    assert isinstance(module, nn.RNNBase)
    assert not isinstance(module, nn.RNN)
    assert type(module).__name__ == "RNN"
    cell = tritonrnn.RNNCell(3, 5)
    assert isinstance(cell, nn.RNNCellBase)
    assert type(cell).__name__ == "RNNCell"


def test_subclass_may_add_to_forward():
    class Doubled(tritonrnn.RNN):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return 2 * output, h_n

    module = Doubled(3, 5)
    x = torch.randn(4, 2, 3)
    plain = tritonrnn.RNN(3, 5)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], 2 * plain(x)[0])


class Noting(nn.Module):
    """A mixin behind the RNN in the order of methods, as Pyro's is."""

    def __setattr__(self, name, value):
        noted.append(("set", name))
        super().__setattr__(name, value)

    def __setstate__(self, state):
        noted.append(("restored", None))
        super().__setstate__(state)

    def _replicate_for_data_parallel(self):
        noted.append(("replicated", None))
        return super()._replicate_for_data_parallel()


noted = []


class TheirsNoting(nn.RNN, Noting):
    pass


class OursNoting(tritonrnn.RNN, Noting):
    pass


@pytest.mark.parametrize("convert", [False, True], ids=["ours", "converted"])
def test_methods_of_a_mixin_are_called_as_in_torch(convert):
    results = []
    for theirs in (True, False):
        module = TheirsNoting(3, 5) if theirs or convert else OursNoting(3, 5)
        if not theirs:
            tritonrnn.convert(module)
            assert tritonrnn.explain(module, torch.ones(4, 2, 3)).backend == "torch"
        noted.clear()
        module.watched = 1
        module.weight_hh_l0 = nn.Parameter(torch.zeros(5, 5))
        copy.deepcopy(module)
        replica = module._replicate_for_data_parallel()
        assert not replica._parameters
        # How often each keeps its own books is its own matter.
        results.append([note for note in noted if not str(note[1]).startswith("_")])
    assert results[0] == results[1]
    assert ("set", "watched") in results[1]


def test_subclass_may_use_any_name_but_torchs():
    """Ours has no attribute that torch's has not."""
    theirs, ours = nn.RNN(3, 5), tritonrnn.RNN(3, 5)
    assert set(dir(ours)) <= set(dir(theirs))
    assert set(dir(tritonrnn.RNNCell(3, 5))) <= set(dir(nn.RNNCell(3, 5)))


BAD_CONSTRUCTIONS = [
    ("RNN", (3, 5, 1, "sigmoid"), {}),
    ("RNN", (3, 5), {"nonlinearity": "TANH"}),
    ("RNN", (3, 5), {"nonlinearity": None}),
    # The bias in the place where nn.RNN takes the nonlinearity.
    ("RNN", (3, 5, 1, True), {}),
    ("RNN", (3, 5, 1, "tanh"), {"nonlinearity": "relu"}),
    ("RNN", (3, 5), {"proj_size": 2}),
    ("RNN", (3, 5), {"proj_size": 0}),
    ("RNN", (0, 5), {}),
    ("RNN", (-3, 5), {}),
    ("RNN", (3, 0), {}),
    ("RNN", (3, 5, 0), {}),
    ("RNN", (3.0, 5), {}),
    ("RNN", (3, "5"), {}),
    ("RNN", (3, 5), {"bias": 1}),
    ("RNN", (3, 5), {"batch_first": None}),
    ("RNN", (3, 5, 2), {"dropout": 1.5}),
    ("RNN", (3, 5, 2), {"dropout": -0.1}),
    ("RNN", (3, 5, 2), {"dropout": True}),
    ("RNN", (3, 5, 2), {"dropout": "much"}),
    ("RNN", (3, 5), {"dtype": torch.int32}),
    ("RNN", (3, 5), {"colour": "red"}),
    ("RNN", (3,), {}),
    ("RNN", (), {}),
    ("RNNCell", (3,), {}),
    ("RNNCell", (-3, 5), {}),
    ("RNNCell", (3, 5), {"dtype": torch.int32}),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "options"),
    BAD_CONSTRUCTIONS,
    ids=[f"{kind}{arguments}{options}" for kind, arguments, options in BAD_CONSTRUCTIONS],
)
def test_bad_constructions_raise_torchs_errors(kind, arguments, options):
    theirs, ours = PAIRS[kind]
    try:
        theirs(*arguments, **options)
    except Exception as error:
        expected = error
    # Python's message for a call that fits no signature names the class.
    wording = "__init__" if "__init__()" in str(expected) else f"^{re.escape(str(expected))}$"
    with pytest.raises(type(expected), match=wording):
        ours(*arguments, **options)


def test_dropout_on_one_layer_warns_where_torch_warns():
    """The warning points at the caller's line."""
    for module_class in PAIRS["RNN"]:
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            module_class(3, 5, dropout=0.5)
        assert len(caught) == 1


# RNNCell's forward.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("shape", [(5, 6), (6,), (1, 6), (0, 6)], ids=str)
@pytest.mark.parametrize(
    ("nonlinearity", "dtype"),
    [("tanh", torch.float64), ("relu", torch.float64), ("tanh", torch.complex128)],
    ids=["tanh-fp64", "relu-fp64", "tanh-complex128"],
)
def test_cell_agrees_with_torch(shape, hx, bias, nonlinearity, dtype):
    theirs, ours = built("RNNCell", (6, 9, bias, nonlinearity), {"dtype": dtype})
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    state = torch.randn(*shape[:-1], 9, dtype=dtype, requires_grad=True) if hx else None
    results = []
    for cell in (theirs, ours):
        y = cell(x, state)
        leaves = [x, *([state] if hx else []), *cell.parameters()]
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(y.shape, dtype=dtype, generator=generator)
        results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for expected, got in zip(*results):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)
    storages = {g.untyped_storage().data_ptr() for g in results[1] if g.numel()}
    assert len(storages) == sum(g.numel() > 0 for g in results[1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get
)
def test_cell_low_precision_agrees_with_torch(dtype):
    theirs, ours = built("RNNCell", (6, 9), {"dtype": dtype})
    x, state = torch.randn(5, 6).to(dtype), torch.randn(5, 9).to(dtype)
    assert_close(ours(x, state), theirs(x, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get)
def test_cell_autocast_returns_torchs_dtypes(dtype):
    theirs, ours = built("RNNCell", (6, 9), {})
    x, state = torch.randn(5, 6), torch.randn(5, 9)
    with torch.autocast("cpu", dtype):
        expected, got = theirs(x, state), ours(x, state)
    assert_close(got, expected)


def test_cell_passes_gradcheck_and_gradgradcheck():
    cell = tritonrnn.RNNCell(2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (x, state))
    assert torch.autograd.gradgradcheck(cell, (x, state))


def test_cell_called_step_by_step_agrees_with_rnn():
    rnn = tritonrnn.RNN(6, 9, dtype=torch.float64)
    cell = tritonrnn.RNNCell(6, 9, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in rnn.state_dict().items()})
    x = torch.randn(7, 5, 6, dtype=torch.float64)
    output, h_n = rnn(x)
    state, states = None, []
    for x_t in x:
        state = cell(x_t, state)
        states.append(state)
    torch.testing.assert_close(torch.stack(states), output)
    torch.testing.assert_close(state, h_n[0])


BAD_CELL_CALLS = {
    "3-D input": lambda: (torch.ones(1, 2, 3),),
    "0-D input": lambda: (torch.tensor(1.0),),
    "input size": lambda: (torch.ones(2, 4),),
    "input size, unbatched": lambda: (torch.ones(4),),
    "hx size": lambda: (torch.ones(2, 3), torch.ones(2, 6)),
    "hx batch": lambda: (torch.ones(2, 3), torch.ones(3, 5)),
    "1-D hx of a batch": lambda: (torch.ones(2, 3), torch.ones(5)),
    "2-D hx of no batch": lambda: (torch.ones(3), torch.ones(1, 5)),
    "3-D hx": lambda: (torch.ones(2, 3), torch.ones(1, 2, 5)),
    "float64 input": lambda: (torch.ones(2, 3).double(),),
    "int64 input": lambda: (torch.ones(2, 3).long(),),
    "float64 hx": lambda: (torch.ones(2, 3), torch.ones(2, 5).double()),
    "hx device": lambda: (torch.ones(2, 3), torch.ones(2, 5, device="meta")),
    "None": lambda: (None,),
}


@pytest.mark.parametrize("serves", ["torch", "triton", "a transform"])
@pytest.mark.parametrize("call", BAD_CELL_CALLS)
def test_cell_errors_are_torchs_own(call, serves):
    arguments = BAD_CELL_CALLS[call]()
    with pytest.raises((RuntimeError, ValueError, AttributeError, IndexError)) as expected:
        nn.RNNCell(3, 5)(*arguments)
    cell = tritonrnn.RNNCell(3, 5)
    if serves == "triton" and torch.cuda.is_available():
        cell, arguments = cell.cuda(), [x if x is None else x.cuda() for x in arguments]
    run = (
        (lambda f: torch.func.vjp(f, torch.ones(1))) if serves == "a transform" else lambda f: f(0)
    )
    with (
        tritonrnn.backend("triton" if serves == "triton" else "torch"),
        pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"),
    ):
        run(lambda _: cell(*arguments))


def test_cell_with_an_unknown_nonlinearity_raises_torchs_type():
    """torch.nn.RNNCell raises in forward, ours when it is built."""
    with pytest.raises(RuntimeError):
        nn.RNNCell(3, 5, nonlinearity="sigmoid")(torch.ones(2, 3))
    with pytest.raises((RuntimeError, ValueError), match="sigmoid"):
        tritonrnn.RNNCell(3, 5, nonlinearity="sigmoid")(torch.ones(2, 3))
