"""Ragged batches beyond PackedSequence: lengths, resets, jagged nested tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritonrnn
from tests.support.cases import DTYPE_NAMES, assert_same_results
from tests.support.implementations import implementations
from tests.support.oracle import assert_as_accurate, elman

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    # torch's own rules for forward AD are scripted at their first use, and its compiler imports
    # modules of its own that warn.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    # Its compiler looks at that of nested tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, I = 9, 3  # noqa: E741
LENGTHS = {
    "all": None,
    "unsorted": (4, 9, 1, 6, 2),
    "zeros": (0, 3, 0, 9, 1),
    "short": (3, 0, 1, 2, 2),
    "none": (0, 0, 0, 0, 0),
}


@dataclass(frozen=True)
class Ragged:
    """A padded batch ``(T, 5, I)`` whose sequences end early, are reset in between, or both."""

    lengths: str = "unsorted"
    reset: bool = False
    L: int = 1
    D: int = 1
    nonlinearity: str = "tanh"
    batch_first: bool = False
    hx: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    H: int = 4
    B: int = 5

    def __str__(self) -> str:
        parts = [f"T{T}", f"B{self.B}", f"I{I}", f"H{self.H}", f"L{self.L}", f"D{self.D}"]
        parts += [self.lengths, self.nonlinearity, DTYPE_NAMES[self.dtype]]
        parts += ["reset"] * self.reset + ["batch-first"] * self.batch_first
        parts += ["nobias"] * (not self.bias) + ["nohx"] * (not self.hx)
        return "-".join(parts)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.H)

    def module(self, module_class: type[nn.Module] = tritonrnn.RNN) -> nn.Module:
        torch.manual_seed(0)
        module = module_class(
            I,
            self.H,
            self.L,
            nonlinearity=self.nonlinearity,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.D == 2,
        )
        return module.to(self.device, self.dtype)

    @property
    def ends(self) -> list[int]:
        lengths = LENGTHS[self.lengths]
        return [T] * self.B if lengths is None else list(lengths)

    def marks(self) -> Tensor:
        """Return where to reset, ``[T, B]``: often, at step 0 and behind the ends as well."""
        return torch.rand(T, self.B, generator=self.generator) < 0.3

    def arguments(self) -> dict[str, Tensor]:
        given = {}
        if LENGTHS[self.lengths] is not None:
            given["lengths"] = torch.tensor(self.ends, device=self.device)
        if self.reset:
            given["reset"] = self.place(self.marks()).to(self.device)
        return given

    def place(self, tensor: Tensor) -> Tensor:
        """Return a time-major tensor in the layout of the input."""
        return tensor.transpose(0, 1).contiguous() if self.batch_first else tensor

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return the input, NaN behind the ends, and hx, as leaves."""
        generator = self.generator
        x = 3 * torch.randn(T, self.B, I, generator=generator)
        for b, end in enumerate(self.ends):
            x[end:, b] = torch.nan
        hx = torch.randn(self.L * self.D, self.B, self.H, generator=generator)
        x, hx = (y.to(self.device, self.dtype).requires_grad_() for y in (self.place(x), hx))
        return x, hx if self.hx else None

    def stretches(self, b: int) -> list[range]:
        """Return the steps of sequence b, split where it is reset."""
        marks = self.marks()[:, b].tolist() if self.reset else [False] * T
        starts = [t for t in range(self.ends[b]) if t == 0 or marks[t]]
        return [range(*bounds) for bounds in zip(starts, [*starts[1:], self.ends[b]])]

    def written_out(
        self, weights: list[Tensor], x: Tensor, hx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run every stretch by itself, one token at a time."""
        options = {"nonlinearity": self.nonlinearity, "num_layers": self.L}
        options["bidirectional"] = self.D == 2
        x = x.transpose(0, 1) if self.batch_first else x
        if hx is None:
            hx = x.new_zeros(self.L * self.D, self.B, self.H)
        output = x.new_zeros(T, self.B, self.D * self.H)
        h_n = []
        for b in range(self.B):
            ends, stretches = hx[:, b], self.stretches(b)
            for index, steps in enumerate(stretches):
                # hx enters the first stretch, or from the other side the last.
                enters = torch.zeros(self.L, self.D, 1, dtype=self.dtype, device=x.device)
                enters[:, 0] = index == 0 and not (self.reset and self.marks()[0, b])
                enters[:, -1] += (self.D == 2) * (index == len(stretches) - 1)
                state = hx[:, b] * enters.flatten(0, 1)
                out, last = elman(x[list(steps), b], state, weights, **options)
                output = output.index_put((torch.tensor(steps), torch.tensor(b)), out)
                leaves = torch.zeros(self.L, self.D, 1, dtype=torch.bool, device=x.device)
                leaves[:, 0] = index == len(stretches) - 1
                leaves[:, -1] |= (self.D == 2) and index == 0
                ends = torch.where(leaves.flatten(0, 1), last, ends)
            h_n.append(ends)
        if not output.requires_grad:
            # There is no token, but a gradient is asked for.
            output.requires_grad_()
        return self.place(output), torch.stack(h_n, 1)

    def results(self, run, weights, x, hx) -> dict[str, Tensor]:
        """Return output, h_n and every gradient; cotangents are NaN behind the ends as well."""
        output, h_n = run(x, hx)
        generator = self.generator
        cotangents = [
            torch.randn(y.shape, generator=generator).to(y) for y in (self.place(output), h_n)
        ]
        for b, end in enumerate(self.ends):
            cotangents[0][end:, b] = torch.nan
        cotangents[0] = self.place(cotangents[0])
        leaves = {"x": x, "hx": hx, **{f"weight {i}": w for i, w in enumerate(weights)}}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(
            (output, h_n), list(leaves.values()), cotangents, materialize_grads=True
        )
        named = {f"grad of {name}": g for name, g in zip(leaves, gradients)}
        return {"output": output.detach(), "h_n": h_n.detach(), **named}

    def ours(self, module: nn.Module) -> dict[str, Tensor]:
        run = functools.partial(module, **self.arguments())
        return self.results(run, list(module.parameters()), *self.tensors())

    def theirs(self, module: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return the results of the written-out recurrence, in another dtype."""
        x, hx, *weights = (
            None if y is None else y.detach().to("cpu", dtype).requires_grad_()
            for y in (*self.tensors(), *module.parameters())
        )
        case = replace(self, dtype=dtype, device="cpu")
        return case.results(functools.partial(case.written_out, weights), weights, x, hx)


CASES = [
    Ragged("unsorted"),
    Ragged("unsorted", batch_first=True, D=2, L=2),
    Ragged("zeros", D=2, L=2, nonlinearity="relu"),
    Ragged("zeros", batch_first=True, hx=False),
    Ragged("short", D=2),
    Ragged("none", D=2, L=2),
    Ragged("all", reset=True),
    Ragged("all", reset=True, batch_first=True, D=2, L=2),
    Ragged("zeros", reset=True, D=2, L=2, nonlinearity="relu"),
    Ragged("unsorted", reset=True, batch_first=True, D=2, hx=False, bias=False),
    Ragged("none", reset=True, D=2),
]


ON_TRITON = [
    Ragged("zeros", L=2, D=2, dtype=torch.float32, H=5, device=DEVICE),
    Ragged("unsorted", batch_first=True, dtype=torch.bfloat16, H=19, hx=False, device=DEVICE),
    Ragged("none", D=2, dtype=torch.float32, device=DEVICE),
    Ragged("all", reset=True, batch_first=True, D=2, dtype=torch.float32, H=17, device=DEVICE),
    Ragged("zeros", reset=True, D=2, nonlinearity="relu", dtype=torch.float32, device=DEVICE),
]


@pytest.mark.feature(
    "`lengths=`, zeros allowed, and `reset=`: the state put back to zero before a step", nn="no"
)
@implementations("case", nn=CASES, torch=CASES, triton=ON_TRITON)
def test_ragged_batch_is_every_stretch_by_itself(case, implementation):
    module = case.module(implementation.rnn)
    got = case.ours(module)
    of_torch, exact = case.theirs(module, case.dtype), case.theirs(module)
    for name in exact:
        assert_as_accurate([got[name].cpu()], [of_torch[name]], [exact[name]], name)


@pytest.mark.parametrize("fewest_steps", [2 * T + 1], indirect=True)
@pytest.mark.parametrize("case", [case for case in CASES if not case.reset], ids=str)
def test_short_batch_with_lengths_is_packed_for_torchs_kernels(case, fewest_steps):
    module = case.module()
    x, hx = case.tensors()
    assert tritonrnn.explain(module, x, hx, **case.arguments()).plan == "aten"
    assert_same_results(case.ours(module), case.theirs(module))


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_lengths_are_what_packing_and_unpacking_gives(batch_first):
    case = Ragged("unsorted", L=2, D=2, batch_first=batch_first)
    ours, theirs = case.module(), case.module(nn.RNN)
    x, hx = (y.detach() for y in case.tensors())
    lengths = torch.tensor(case.ends)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    expected, expected_h_n = theirs(packed, hx)
    output, h_n = ours(x, hx, lengths=lengths)
    padded, _ = pad_packed_sequence(expected, batch_first=batch_first)
    torch.testing.assert_close(output, padded)
    torch.testing.assert_close(h_n, expected_h_n)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_lengths_are_integers_of_any_kind(dtype):
    case = Ragged("zeros")
    module, (x, hx) = case.module(), case.tensors()
    expected = module(x, hx, **case.arguments())
    got = module(x, hx, lengths=torch.tensor(case.ends, dtype=dtype))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in ON_TRITON if c.lengths != "all"], ids=str)
def test_lengths_lie_on_any_device(case):
    module, (x, hx) = case.module(), case.tensors()
    given = case.arguments()
    results = []
    for device in ("cpu", "cuda"):
        lengths = given["lengths"].to(device)
        results.append(module(x, hx, **{**given, "lengths": lengths}))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_lengths_and_reset_may_change_from_call_to_call():
    """What is cached of a tensor is read again when it changes, through NumPy as well."""
    case = Ragged("unsorted", reset=True)
    module, (x, hx) = case.module(), case.tensors()
    x = torch.nan_to_num(x)
    given = case.arguments()
    module(x, hx, **given)
    for name, change in (("lengths", [1, 2, 3, 4, 5]), ("reset", False)):
        given[name].numpy()[:] = change
        fresh = {name: tensor.clone() for name, tensor in given.items()}
        got, expected = module(x, hx, **given), module(x, hx, **fresh)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def described_by(name: str, given: Tensor) -> tuple[object, dict[str, Tensor]]:
    """An input whose sequences a tensor describes, and the arguments beside it."""
    data = torch.randn(9, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if name == "batch_sizes":
        return nn.utils.rnn.PackedSequence(data, given), {}
    if name == "offsets":
        return torch.nested.nested_tensor_from_jagged(data, offsets=given), {}
    return data.view(3, 3, I), {name: given}


DESCRIPTIONS = {
    "lengths": (3, 1, 2),
    "reset": ((True, False, False), (False, True, False), (False, False, True)),
    "batch_sizes": (4, 3, 2),
    "offsets": (0, 4, 7, 9),
}


def differentiated(run, module, input, given):
    """Run, and return the gradient of the weights as a function to be called later."""
    output, h_n = run(input, **given)
    output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    loss = (output.values() if output.is_nested else output).sin().abs().sum() + h_n.abs().sum()
    return lambda **options: torch.autograd.grad(loss, list(module.parameters()), **options)


def on_each(*paths: str) -> pytest.MarkDecorator:
    # torch differentiates no jagged tensor of complex numbers, nor by torch.func.
    pairs = [(name, path) for name in DESCRIPTIONS for path in paths]
    pairs = [pair for pair in pairs if pair != ("offsets", "composite")]
    return pytest.mark.parametrize(("name", "path"), pairs)


@pytest.mark.slow
@on_each("in-place", "composite", "twice", "triton", "compiled")
def test_what_describes_the_sequences_is_taken_at_the_call(name, path):
    """Whoever owns its memory may write to it before the backward pass, by torch or by NumPy."""
    torch._dynamo.reset()
    dtype = {"composite": torch.complex128, "triton": torch.float32}.get(path, torch.float64)
    module = tritonrnn.RNN(I, 4, 2, bidirectional=True, dtype=dtype)
    run = module
    if path == "compiled":
        run = torch.compile(module, backend="aot_eager", fullgraph=True)

    def gradients(change):
        given = torch.tensor(DESCRIPTIONS[name])
        input, arguments = described_by(name, given)
        input = input.to(dtype)
        with tritonrnn.backend("triton" if path == "triton" else "torch"):
            backward = differentiated(run, module, input, arguments)
        change(given)
        return backward(create_graph=path == "twice")

    def by_numpy(given):
        given.numpy()[:] = 1

    expected = gradients(lambda given: None)
    for change in (by_numpy, Tensor.zero_):
        for got, want in zip(gradients(change), expected):
            assert torch.equal(got, want)
    torch._dynamo.reset()


@pytest.mark.slow
@on_each("in-place", "composite", "triton")
def test_default_device_does_not_matter(name, path):
    """What is made inside lies where the input is, or on the CPU."""
    module = tritonrnn.RNN(I, 4, 2, bidirectional=True)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def gradients(input, arguments):
        def loss(weights):
            output, h_n = torch.func.functional_call(module, weights, (input,), arguments)
            output = output.data if name == "batch_sizes" else output
            return (output.values() if output.is_nested else output).sum() + h_n.sum()

        with tritonrnn.backend("triton" if path == "triton" else "torch"):
            if path == "composite":
                return list(torch.func.grad(loss)(weights).values())
            return list(torch.autograd.grad(loss({}), list(module.parameters())))

    # Apart, so that nothing is left from the call before.
    (input, arguments), again = (
        described_by(name, torch.tensor(DESCRIPTIONS[name])) for _ in range(2)
    )
    expected = gradients(input.to(torch.float32), arguments)
    input, arguments = again[0].to(torch.float32), again[1]
    # As good as "cuda", and at hand.
    with torch.device("meta"):
        got = gradients(input, arguments)
    torch.testing.assert_close(got, expected)


# torch makes no nested tensor of tensors on two devices.
@pytest.mark.parametrize("name", ["lengths", "reset", "batch_sizes"])
@pytest.mark.parametrize("hx", [False, True], ids=["nohx", "hx"])
def test_inputs_without_values_have_results_of_the_right_shape(name, hx):
    """On the meta device, beside sizes that have values."""
    module = tritonrnn.RNN(I, 4, 2, bidirectional=True, device="meta")
    input, arguments = described_by(name, torch.tensor(DESCRIPTIONS[name]))
    B = 4 if name == "batch_sizes" else 3
    state = torch.zeros(4, B, 4, device="meta") if hx else None
    if name == "batch_sizes":
        input = input._replace(data=input.data.to("meta", torch.float32))
    else:
        input = input.to("meta", torch.float32)
    output, h_n = module(input, state, **arguments)
    output = output.data if name == "batch_sizes" else output
    assert output.shape == ((9, 8) if name == "batch_sizes" else (3, 3, 8))
    assert h_n.shape == (4, B, 4)
    (output.sum() + h_n.sum()).backward()
    assert all(weight.grad.is_meta for weight in module.parameters())


def test_lengths_and_reset_may_be_fake():
    """A tracer of one's own has no values."""
    with FakeTensorMode():
        lengths, reset = torch.tensor([3, 1]), torch.zeros(5, 2, dtype=torch.bool)
        output, h_n = tritonrnn.RNN(I, 4)(torch.ones(5, 2, I), lengths=lengths, reset=reset)
    assert (output.shape, h_n.shape) == ((5, 2, 4), (1, 2, 4))


def test_ragged_tensors_of_inference_mode_serve_training():
    case = Ragged("unsorted", reset=True)
    with torch.inference_mode():
        given = case.arguments()
    module = case.module()
    results = case.results(
        functools.partial(module, **given), list(module.parameters()), *case.tensors()
    )
    assert_same_results(results, case.theirs(module))


def test_unbatched_sequence_can_be_reset():
    module = tritonrnn.RNN(I, 4).double()
    x, hx = torch.randn(T, I).double(), torch.randn(1, 4).double()
    reset = torch.arange(T) == 4
    output, h_n = module(x, hx, reset=reset)
    first, _ = module(x[:4], hx)
    second, last = module(x[4:])
    torch.testing.assert_close(output, torch.cat([first, second]))
    torch.testing.assert_close(h_n, last)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_empty_batch_can_be_reset(batch_first):
    module = tritonrnn.RNN(I, 4, batch_first=batch_first, bidirectional=True)
    grid = (0, T) if batch_first else (T, 0)
    output, h_n = module(torch.zeros(*grid, I), reset=torch.zeros(grid, dtype=torch.bool))
    (output.sum() + h_n.sum()).backward()
    assert all(torch.count_nonzero(weight.grad) == 0 for weight in module.parameters())


SMALL = [Ragged("zeros", D=2, H=2), Ragged("short", reset=True, L=2, D=2, H=2, batch_first=True)]


def as_function(case: Ragged):
    module = case.module()
    names = [name for name, _ in module.named_parameters()]
    x, hx = case.tensors()

    def function(x, hx, *weights):
        parameters = dict(zip(names, weights))
        return torch.func.functional_call(module, parameters, (x, hx), case.arguments())

    # Numerical differentiation can't start from NaN.
    x = torch.nan_to_num(x.detach()).requires_grad_()
    return function, (x, hx, *(w.detach().clone().requires_grad_() for w in module.parameters()))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_ragged_batches_pass_gradcheck_and_gradgradcheck(case):
    function, arguments = as_function(case)
    assert gradcheck(function, arguments, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("case", [Ragged("zeros", L=2, D=2, hx=False), *SMALL], ids=str)
def test_composite_path_agrees_under_torch_func(case):
    """torch.func takes the composite path: the padding may hold NaN there as well."""
    module = case.module()
    weights = dict(module.named_parameters())
    x, hx = case.tensors()

    def loss(weights, x, hx):
        output, h_n = torch.func.functional_call(module, weights, (x, hx), case.arguments())
        return output.square().sum() + h_n.sum()

    got = torch.func.grad(loss)(weights, x, hx)
    expected = torch.autograd.grad(loss(weights, x, hx), list(weights.values()))
    for name, gradient in zip(weights, expected):
        torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.slow
def test_ragged_batches_compile_to_one_graph_for_all_lengths(case):
    torch._dynamo.reset()
    module = case.module()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for lengths in (case.lengths, "unsorted", "none"):
        other = replace(case, lengths=lengths)
        run = functools.partial(compiled, **other.arguments())
        got = other.results(run, list(module.parameters()), *other.tensors())
        assert_same_results(got, other.theirs(module))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_ragged_batches_export_with_any_number_of_steps_and_sequences(case):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = case.module()

        def forward(self, x, hx, lengths, reset):
            return self.rnn(x, hx, lengths=lengths, reset=reset)

    def arguments(T, B):
        shape = (B, T) if case.batch_first else (T, B)
        states = torch.randn(case.L * case.D, B, case.H).double()
        marks = torch.rand(shape) < 0.3
        return torch.randn(*shape, I).double(), states, torch.arange(B) % (T + 1), marks

    model = Model()
    T_dim, B_dim = torch.export.Dim("T"), torch.export.Dim("B")
    grid = {0: B_dim, 1: T_dim} if case.batch_first else {0: T_dim, 1: B_dim}
    program = torch.export.export(
        model,
        arguments(5, 4),
        dynamic_shapes=(grid, {1: B_dim}, {0: B_dim}, grid),
        strict=False,
    )
    given = arguments(7, 6)
    torch.testing.assert_close(program.module()(*given), model(*given))


@pytest.mark.parametrize("name", ["lengths", "reset"])
def test_vmap_over_lengths_or_reset_is_a_clear_error(name):
    case = Ragged("unsorted", reset=True)
    module, (x, _), given = case.module(), case.tensors(), case.arguments()
    with pytest.raises(RuntimeError, match=f"{name} can't be what torch.func.vmap maps over"):
        torch.func.vmap(lambda one: module(x, **{name: one})[1])(given[name][None])


def test_vmap_over_the_input_takes_lengths_and_resets():
    case = Ragged("zeros", reset=True, D=2)
    module, (x, hx), given = case.module(), case.tensors(), case.arguments()
    x = torch.stack([x, 2 * x])
    output, h_n = torch.func.vmap(lambda one: module(one, hx, **given))(x)
    for index, one in enumerate(x):
        expected = module(one, hx, **given)
        torch.testing.assert_close((output[index], h_n[index]), expected)


# jagged nested tensors


def a_jagged(lengths=(3, 1, 5), features=I, **placed) -> Tensor:
    torch.manual_seed(1)
    placed = {"dtype": torch.float64, **placed}
    sequences = [torch.randn(length, features, **placed) for length in lengths]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)


@pytest.mark.feature("jagged nested tensors", nn="no")
@implementations("D", nn=[1, 2], torch=[1, 2], triton=[2])
def test_jagged_batch_is_every_sequence_by_itself(D, implementation):
    placed = {"dtype": implementation.dtype, "device": implementation.device}
    theirs, module = (
        module_class(I, 4, 2, bidirectional=D == 2, **placed)
        for module_class in (nn.RNN, implementation.rnn)
    )
    module.load_state_dict(theirs.state_dict())
    x = a_jagged((3, 1, 5, 2), **placed)
    hx = torch.randn(2 * D, 4, 4, **placed)
    output, h_n = module(x, hx)
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad(output.values().sin().sum() + h_n.sum(), leaves)
    apart = [one.detach().requires_grad_() for one in x.unbind()]
    results = [theirs(one[:, None], hx[:, b, None]) for b, one in enumerate(apart)]
    loss = sum(out.sin().sum() + last.sum() for out, last in results)
    expected = torch.autograd.grad(loss, [*apart, *theirs.parameters()])
    got = [*output.unbind(), h_n, gradients[0].values(), *gradients[1:]]
    wanted = [out[:, 0] for out, _ in results] + [torch.cat([last for _, last in results], 1)]
    wanted += [torch.cat(expected[:4]), *expected[4:]]
    torch.testing.assert_close(got, wanted, **implementation.tolerance)


def test_jagged_output_adds_to_its_input():
    module = tritonrnn.RNN(4, 4).double()
    x = a_jagged(features=4)
    output, _ = module(x)
    assert output.is_nested
    assert output.layout == torch.jagged
    assert output.offsets() is x.offsets()
    total = x + output
    torch.testing.assert_close(total.values(), x.values() + output.values())


def test_jagged_batch_takes_empty_sequences():
    module = tritonrnn.RNN(I, 4, bidirectional=True).double()
    x = torch.nested.nested_tensor_from_jagged(
        torch.randn(5, I).double(), offsets=torch.tensor([0, 0, 3, 3, 5, 5])
    )
    hx = torch.randn(2, 5, 4).double()
    output, h_n = module(x, hx)
    for b in (0, 2, 4):
        assert torch.equal(h_n[:, b], hx[:, b])
    first, last_of_first = module(x.values()[:3], hx[:, 1])
    second, last_of_second = module(x.values()[3:], hx[:, 3])
    expected = torch.cat([first, second])
    torch.testing.assert_close(output.values(), expected)
    torch.testing.assert_close(h_n[:, 1], last_of_first)
    torch.testing.assert_close(h_n[:, 3], last_of_second)
    weights = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(output.values().sin().sum(), weights),
        torch.autograd.grad(expected.sin().sum(), weights),
    )


@pytest.mark.slow
def test_jagged_batch_compiles_to_one_graph():
    torch._dynamo.reset()
    module = tritonrnn.RNN(4, 4).double()

    def model(x):
        output, h_n = module(x)
        return (x + output).values(), h_n

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in [(3, 2, 5), (4, 4, 2, 7)]:
        x = a_jagged(lengths, features=4)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_explain_names_the_jagged_layout():
    explanation = tritonrnn.explain(tritonrnn.RNN(I, 4).double(), a_jagged())
    assert explanation.layout == "jagged"
    assert explanation.shape == {"T": 5, "B": 3, "N": 9, "I": I, "H": 4, "L": 1, "D": 1}


# errors


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


def packed() -> nn.utils.rnn.PackedSequence:
    return pack_padded_sequence(x(4, 2, I), torch.tensor([4, 2]))


def with_holes() -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        x(9, I), offsets=torch.tensor([0, 4, 9]), lengths=torch.tensor([2, 3])
    )


def ragged_in_the_features() -> Tensor:
    return a_jagged(dtype=torch.float32).transpose(1, 2)


def strided() -> Tensor:
    return torch.nested.nested_tensor([x(2, I), x(3, I)], layout=torch.strided)


WRONG = {
    "lengths of another batch": (
        lambda: x(4, 2, I),
        {"lengths": torch.ones(3, dtype=int)},
        "shape",
    ),
    "lengths too long": (lambda: x(4, 2, I), {"lengths": torch.tensor([5, 1])}, r"\(5, 1\)"),
    "negative lengths": (lambda: x(4, 2, I), {"lengths": torch.tensor([-1, 1])}, r"\(-1, 1\)"),
    "fractional lengths": (lambda: x(4, 2, I), {"lengths": torch.ones(2)}, "float32"),
    "lengths as a list": (lambda: x(4, 2, I), {"lengths": [4, 2]}, "list"),
    "lengths of one sequence": (lambda: x(4, I), {"lengths": torch.tensor([4])}, "unbatched"),
    "lengths of packed": (packed, {"lengths": torch.tensor([4, 2])}, "packed"),
    "lengths of jagged": (with_holes, {"lengths": torch.tensor([4, 2])}, "nested"),
    "reset of packed": (packed, {"reset": torch.zeros(4, 2, dtype=bool)}, "packed"),
    "reset of another shape": (
        lambda: x(4, 2, I),
        {"reset": torch.zeros(2, 4, dtype=bool)},
        "shape",
    ),
    "reset of one sequence": (lambda: x(4, I), {"reset": torch.zeros(4, 1, dtype=bool)}, "shape"),
    "reset of floats": (lambda: x(4, 2, I), {"reset": torch.zeros(4, 2)}, "float32"),
    "holes": (with_holes, {}, "holes"),
    "ragged features": (ragged_in_the_features, {}, "dimension 1"),
    "strided": (strided, {}, "torch.jagged"),
    "features": (lambda: a_jagged(features=I + 1, dtype=torch.float32), {}, "input_size"),
    "hx of another batch": (
        lambda: a_jagged(dtype=torch.float32),
        {"hx": torch.zeros(1, 4, 4)},
        "hidden size",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_ragged_arguments_raise(what):
    make, arguments, message = WRONG[what]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        tritonrnn.RNN(I, 4)(make(), **arguments)
