"""convert: torch's modules made ours inside a model, and nothing else changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tritonrnn

pytestmark = pytest.mark.usefixtures("torch_back_end")

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "dropout": 0.4},
    {"dtype": torch.float64},
]


class Tagger(nn.Module):
    """RNNs as children, in containers and two levels down; other modules beside them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 3)
        self.rnn = nn.RNN(3, 5, 2, bidirectional=True)
        self.stack = nn.ModuleList([nn.RNN(10, 4), nn.RNN(4, 4, nonlinearity="relu")])
        self.named = nn.ModuleDict({"cell": nn.RNNCell(4, 6), "deep": nn.Sequential(nn.RNN(6, 7))})
        self.lstm = nn.LSTM(7, 3)
        self.gru = nn.GRU(3, 3)
        self.nothing = None
        self.register_module("absent", None)

    def forward(self, words):
        x, _ = self.rnn(self.embedding(words))
        for rnn in self.stack:
            x, _ = rnn(x)
        x = torch.stack([self.named["cell"](x_t) for x_t in x])
        x, _ = self.named["deep"](x)
        x, _ = self.lstm(x)
        return self.gru(x)[0]


WORDS = torch.randint(9, (5, 2), generator=torch.Generator().manual_seed(0))


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bare_rnn_becomes_ours(options):
    module = nn.RNN(3, 5, **options)
    text, parameters = repr(module), dict(module.named_parameters())
    x = torch.randn(4, 2, 3, dtype=options.get("dtype"))
    torch.manual_seed(1)
    expected = module(x)
    assert tritonrnn.convert(module) is module
    assert type(module) is tritonrnn.RNN
    assert repr(module) == text
    after = dict(module.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_bare_cell_becomes_ours(nonlinearity):
    cell = nn.RNNCell(3, 5, nonlinearity=nonlinearity)
    x, parameters = torch.randn(2, 3), list(cell.parameters())
    expected = cell(x)
    assert tritonrnn.convert(cell) is cell
    assert type(cell) is tritonrnn.RNNCell
    assert all(a is b for a, b in zip(cell.parameters(), parameters))
    torch.testing.assert_close(cell(x), expected)


def test_model_keeps_its_identity_and_everything_else():
    model = Tagger()
    expected = model(WORDS)
    before, parameters = kinds(model), dict(model.named_parameters())
    others = {name: module for name, module in model.named_modules() if "RNN" not in repr(module)}
    assert tritonrnn.convert(model) is model
    replaced = {nn.RNN: tritonrnn.RNN, nn.RNNCell: tritonrnn.RNNCell}
    assert kinds(model) == {name: replaced.get(kind, kind) for name, kind in before.items()}
    assert list(kinds(model)) == list(before)
    assert sum(kind is tritonrnn.RNN for kind in kinds(model).values()) == 4
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert all(model.get_submodule(name) is module for name, module in others.items())
    torch.testing.assert_close(model(WORDS), expected)


def test_converting_twice_changes_nothing():
    model = tritonrnn.convert(Tagger())
    modules = list(model.modules())
    tritonrnn.convert(model)
    assert all(a is b for a, b in zip(model.modules(), modules))
    module = tritonrnn.RNN(3, 5)
    assert tritonrnn.convert(module) is module


def test_model_without_an_rnn_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    assert tritonrnn.convert(model) is model
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh]


@pytest.mark.parametrize(("model", "name"), [(3, "int"), (nn.RNN, "type")], ids=["int", "class"])
def test_what_is_no_module_is_a_type_error(model, name):
    with pytest.raises(TypeError, match=rf"^Expected model to be a torch\.nn\.Module, got {name}$"):
        tritonrnn.convert(model)


def test_optimizer_built_before_still_trains():
    curves = []
    for converted in (False, True):
        torch.manual_seed(2)
        model = Tagger()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if converted:
            tritonrnn.convert(model)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(WORDS).square().mean()
            loss.backward()
            assert all(p.grad is not None for p in model.rnn.parameters())
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][2] != curves[0][0]


def test_module_used_in_two_places_is_replaced_once():
    shared = nn.RNN(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "other": nn.RNN(3, 3)})
    tritonrnn.convert(model)
    assert type(model["a"]) is tritonrnn.RNN
    assert model["a"] is model["b"][0]
    assert model["other"] is not model["a"]


def test_parameters_tied_between_modules_stay_tied():
    model = nn.ModuleList([nn.RNN(3, 3), nn.RNN(3, 3)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    tritonrnn.convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert len(list(model.parameters())) == 7


def test_module_that_holds_itself_is_converted():
    model = nn.Sequential(nn.RNN(3, 3))
    holder = nn.Module()
    holder.inner = model
    model.holder = nn.ModuleList()
    holder.again = model
    tritonrnn.convert(holder)
    assert type(holder.inner[0]) is tritonrnn.RNN
    assert holder.inner is holder.again


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_survives_module_by_module(training):
    model = Tagger()
    model.train(training)
    model.rnn.train(not training)
    tritonrnn.convert(model)
    assert model.rnn.training is not training
    assert model.stack[0].training is training
    model.eval()
    assert not model.rnn.training


def test_devices_and_dtypes_survive():
    model = Tagger()
    model.rnn.double()
    model.stack[1].to("meta")
    model.named["cell"].to(torch.bfloat16)
    tritonrnn.convert(model)
    assert {p.dtype for p in model.rnn.parameters()} == {torch.float64}
    assert all(p.is_meta for p in model.stack[1].parameters())
    assert {p.dtype for p in model.named["cell"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    assert model.rnn(torch.randn(4, 2, 3).double())[0].dtype == torch.float64


def test_frozen_parameters_stay_frozen():
    model = nn.Sequential(nn.RNN(3, 5))
    model[0].weight_hh_l0.requires_grad_(False)
    tritonrnn.convert(model)
    model[0](torch.randn(4, 2, 3))[0].sum().backward()
    assert model[0].weight_hh_l0.grad is None
    assert model[0].weight_ih_l0.grad is not None


def test_hooks_survive_with_their_module_and_can_be_removed():
    model = nn.Sequential(nn.RNN(3, 5))
    seen, modules = [], set()

    def seeing(what):
        def hook(module, *_):
            seen.append(what)
            modules.add(module)

        return hook

    handles = [
        model[0].register_forward_pre_hook(seeing("before")),
        model[0].register_forward_hook(seeing("after")),
        model[0].register_forward_hook(
            lambda m, a, k, out: seen.append(sorted(k)), with_kwargs=True
        ),
        model[0].register_full_backward_pre_hook(seeing("backward, before")),
        model[0].register_full_backward_hook(seeing("backward")),
        model[0].register_state_dict_pre_hook(seeing("saving")),
        model[0].register_state_dict_post_hook(seeing("saved")),
        model[0].register_load_state_dict_pre_hook(seeing("loading")),
        model[0].register_load_state_dict_post_hook(seeing("loaded")),
    ]
    tritonrnn.convert(model)
    # What only the original would keep alive is gone.
    gc.collect()
    x = torch.randn(4, 2, 3, requires_grad=True)

    def use():
        seen.clear()
        model[0](x, hx=None)[0].sum().backward()
        model.load_state_dict(model.state_dict())
        return seen

    expected = ["before", "after", ["hx"], "backward, before", "backward"]
    assert use() == [*expected, "saving", "saved", "loading", "loaded"]
    assert modules == {model[0]}
    assert type(model[0]) is tritonrnn.RNN
    for handle in handles:
        handle.remove()
    assert use() == []


def test_whatever_refers_to_a_module_refers_to_what_it_became():
    """Among it methods that somebody bound, weak references, and the module's own attributes."""
    model = nn.Sequential(nn.RNN(3, 5))
    bound, weak, others = model[0].forward, weakref.ref(model[0]), [model[0]]
    model[0].me = others
    tritonrnn.convert(model)
    gc.collect()
    assert bound.__self__ is weak() is others[0] is model[0].me[0] is model[0]


def test_hook_that_changes_the_output_still_does():
    rnn = nn.RNN(3, 5)
    rnn.register_forward_hook(lambda module, arguments, results: (results[0] * 0, results[1]))
    output, h_n = tritonrnn.convert(rnn)(torch.randn(4, 2, 3))
    assert not output.any()
    assert h_n.any()


class OwnForward(nn.RNN):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return 2 * output, h_n


class OwnMethod(nn.RNN):
    """Its forward is torch's; the rest is its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.temperature = 3.0

    def describe(self):
        return f"{self.hidden_size} at {self.temperature}"


class OwnCell(nn.RNNCell):
    def forward(self, input, hx=None):
        return 2 * super().forward(input, hx)


class OwnForwardInherited(OwnForward):
    pass


def overriding(name: str) -> type[nn.RNN]:
    """A subclass with a method of its own, which does what the overridden one does."""

    def method(self, *arguments):
        return getattr(super(cls, self), name)(*arguments)

    cls = type(f"own {name}", (nn.RNN,), {name: method})
    return cls


OVERRIDDEN = [
    "__reduce_ex__",
    "__setattr__",
    "__setstate__",
    "_init_flat_weights",
    "_replicate_for_data_parallel",
    "_update_flat_weights",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "flatten_parameters",
    "get_expected_hidden_size",
    "permute_hidden",
]
SUBCLASSES = [OwnForward, OwnForwardInherited, OwnCell, *map(overriding, OVERRIDDEN)]


@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_subclasses_with_methods_of_their_own_that_torch_calls_are_left_alone(kind):
    module = kind(3, 5)
    model = nn.Sequential(module, nn.RNN(3, 5))
    tritonrnn.convert(model)
    assert model[0] is module
    assert type(module) is kind
    assert type(model[1]) is tritonrnn.RNN
    assert tritonrnn.convert(module) is module


def test_module_with_a_forward_of_its_own_is_left_alone():
    """As accelerate and others set one on an instance."""
    module = nn.RNN(3, 5)
    theirs = module.forward
    module.forward = lambda *arguments: (2 * theirs(*arguments)[0], None)
    assert type(tritonrnn.convert(module)) is nn.RNN


class BySteps(nn.RNN):
    """Built past the constructor that sets ``nonlinearity``."""

    def __init__(self):
        nn.RNNBase.__init__(self, "RNN_RELU", 3, 5)


def another_mode() -> nn.RNN:
    module = nn.RNN(3, 5)
    module.mode = "RNN_RELU"
    return module


@pytest.mark.parametrize("build", [BySteps, another_mode])
def test_mode_decides_as_in_torch(build):
    module, x = build(), torch.randn(4, 2, 3)
    expected, _ = module(x)
    tritonrnn.convert(module)
    assert type(module) is not nn.RNN
    torch.testing.assert_close(module(x)[0], expected)
    module.mode = "RNN_TANH"
    assert module(x)[0].min() < 0
    module.mode = "LSTM"
    with pytest.raises(AssertionError, match="mode must be RNN_TANH or RNN_RELU, got LSTM"):
        module(x)


def test_module_that_torch_would_not_run_is_left_alone():
    module = nn.RNN(3, 5)
    module.mode = "LSTM"
    assert type(tritonrnn.convert(module)) is nn.RNN


def test_subclass_with_torchs_forward_keeps_what_is_its_own():
    module = OwnMethod(3, 5, 2)
    x = torch.randn(4, 2, 3)
    expected = module(x)
    converted = tritonrnn.convert(nn.Sequential(module))[0]
    assert isinstance(converted, OwnMethod)
    assert tritonrnn.explain(converted, x).backend == "torch"
    assert converted.describe() == "5 at 3.0"
    torch.testing.assert_close(converted(x), expected)
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        duplicated = duplicate(converted)
        assert duplicated.describe() == "5 at 3.0"
        assert torch.equal(duplicated(x)[0], converted(x)[0])


def weight_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")


def prune_half(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")


@pytest.mark.parametrize("kind", [nn.RNN, OwnMethod])
@pytest.mark.parametrize("change", [weight_norm, prune_half, old_weight_norm])
def test_weights_that_are_computed_still_are(change, kind):
    module = kind(3, 5, 2)
    change(module)
    x = torch.randn(4, 2, 3)
    expected, _ = module(x)
    names = [name for name, _ in module.named_parameters()]
    converted = tritonrnn.convert(nn.Sequential(module))[0]
    assert tritonrnn.explain(converted, x).backend == "torch"
    assert isinstance(converted, OwnMethod) == (kind is OwnMethod)
    assert [name for name, _ in converted.named_parameters()] == names
    torch.testing.assert_close(converted(x)[0], expected)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(converted(x)[0], expected)
    converted(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())
    if change is weight_norm:
        nn.utils.parametrize.remove_parametrizations(converted, "weight_hh_l0")
        assert "weight_hh_l0" in dict(converted.named_parameters())
        assert tritonrnn.explain(converted, x).backend == "torch"


def test_attributes_and_buffers_of_the_user_survive():
    module = nn.RNN(3, 5)
    module.note = "mine"
    module.register_buffer("mask", torch.ones(5))
    converted = tritonrnn.convert(module)
    assert converted.note == "mine"
    assert converted.mask is module.mask
    assert "mask" in converted.state_dict()


def test_state_dict_of_the_model_is_unchanged():
    model = Tagger()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = tritonrnn.convert(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    Tagger().load_state_dict(after)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_model_can_be_copied(duplicate):
    model = tritonrnn.convert(Tagger()).eval()
    expected = model(WORDS)
    duplicated = duplicate(model)
    assert type(duplicated.rnn) is tritonrnn.RNN
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(duplicated(WORDS), expected)
    duplicated.double()
    assert {p.dtype for p in duplicated.parameters()} == {torch.float64}


def test_new_weight_assigned_after_conversion_is_used():
    converted = tritonrnn.convert(nn.RNN(3, 5))
    x = torch.randn(4, 2, 3)
    converted(x)
    converted.weight_ih_l0 = nn.Parameter(torch.zeros(5, 3))
    reference = nn.RNN(3, 5)
    reference.load_state_dict(converted.state_dict())
    torch.testing.assert_close(converted(x)[0], reference(x)[0])
    assert not dict(converted.named_parameters())["weight_ih_l0"].any()


def test_child_of_a_subclass_is_replaced_with_it():
    class Nest(nn.RNN):
        pass

    nest = Nest(3, 5)
    nest.inner = nn.RNN(5, 5)
    converted = tritonrnn.convert(nest)
    assert isinstance(converted, Nest)
    assert isinstance(converted.inner, tritonrnn.RNN)
