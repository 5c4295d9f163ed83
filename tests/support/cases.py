"""Cases of torch.nn.RNN, named by their shape, and checks of what they return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import tritonrnn
from tests.support.oracle import assert_as_accurate, elman

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
LAYOUTS = ("time-major", "batch-first", "unbatched", "packed", "unsorted")
PACKED = ("packed", "unsorted")


@dataclass(frozen=True)
class Case:
    """T steps, B sequences, I input features, H hidden units, L layers, D directions."""

    T: int = 7
    B: int = 5
    I: int = 6  # noqa: E741
    H: int = 9
    L: int = 1
    D: int = 1
    nonlinearity: str = "tanh"
    bias: bool = True
    hx: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "time-major"
    dropout: float = 0.0
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}", f"L{self.L}", f"D{self.D}"]
        parts += [self.layout, self.nonlinearity, DTYPE_NAMES[self.dtype]]
        parts += ["nobias"] * (not self.bias) + ["nohx"] * (not self.hx)
        parts += [f"dropout{self.dropout}"] * (self.dropout > 0)
        return "-".join(parts)

    @property
    def is_packed(self) -> bool:
        return self.layout in PACKED

    @property
    def options(self) -> dict:
        return {
            "num_layers": self.L,
            "nonlinearity": self.nonlinearity,
            "bias": self.bias,
            "batch_first": self.layout == "batch-first",
            "dropout": self.dropout,
            "bidirectional": self.D == 2,
        }

    def module(self, module_class: type[nn.Module] = nn.RNN) -> nn.Module:
        """Return the module; its weights depend on the seed only, not on its class or dtype."""
        torch.manual_seed(self.seed)
        module = module_class(self.I, self.H, **self.options)
        return module.to(self.device, self.dtype)

    def lengths(self) -> Tensor:
        """Return lengths from T down to 1; unsorted, the two shortest come first."""
        if not self.is_packed:
            return torch.full((self.B,), self.T)
        lengths = torch.linspace(self.T, 1, self.B).long()
        if self.layout == "unsorted":
            lengths = lengths.roll(2)
        return lengths

    def tensors(self, scale: float = 4.0) -> tuple[Tensor, Tensor | None]:
        """Return the data of the input and ``hx``, as leaves, large enough to saturate tanh."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shapes = {
            "time-major": (self.T, self.B, self.I),
            "batch-first": (self.B, self.T, self.I),
            "unbatched": (self.T, self.I),
        }
        rows = (int(self.lengths().sum()), self.I)
        data = scale * torch.randn(shapes.get(self.layout, rows), generator=generator)
        data = data.to(self.device, self.dtype).requires_grad_()
        if not self.hx:
            return data, None
        shape = (self.L * self.D, self.H) if self.layout == "unbatched" else self.state_shape
        hx = torch.randn(shape, generator=generator)
        return data, hx.to(self.device, self.dtype).requires_grad_()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (self.L * self.D, self.B, self.H)

    def input(self, data: Tensor) -> Tensor | PackedSequence:
        """Return the module's input, which shares the memory of ``data``."""
        if not self.is_packed:
            return data
        indices = pack_padded_sequence(
            torch.zeros(self.T, self.B, 1), self.lengths(), enforce_sorted=self.layout == "packed"
        )
        order = [
            None if rows is None else rows.to(self.device)
            for rows in (indices.sorted_indices, indices.unsorted_indices)
        ]
        return PackedSequence(data, indices.batch_sizes, *order)

    def cotangents(self, output: Tensor, h_n: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return tuple(
            torch.randn(y.shape, generator=generator).to(self.device, self.dtype)
            for y in (output, h_n)
        )

    def written_out(self, weights: Iterable[Tensor], data: Tensor, hx: Tensor | None):
        """Return ``(output, h_n)`` by :func:`elman`, each sequence alone, laid out as ``data``."""
        weights = list(weights)
        options = {
            "nonlinearity": self.nonlinearity,
            "num_layers": self.L,
            "bidirectional": self.D == 2,
        }
        if self.layout == "unbatched":
            state = data.new_zeros(self.L * self.D, self.H) if hx is None else hx
            output, h_n = elman(data[:, None], state[:, None], weights, **options)
            return output[:, 0], h_n[:, 0]
        if hx is None:
            hx = data.new_zeros(self.state_shape)
        flat = data.reshape(-1, self.I)
        output = flat.new_zeros(len(flat), self.D * self.H)
        last = []
        for b, own_rows in enumerate(self.rows):
            # A batch of one: torch refuses to map forward AD over products with a vector.
            sequence, state = elman(flat[own_rows, None], hx[:, b, None], weights, **options)
            output = output.index_put((own_rows,), sequence[:, 0])
            last.append(state)
        return output.reshape(*data.shape[:-1], self.D * self.H), torch.cat(last, dim=1)

    @cached_property
    def rows(self) -> list[Tensor]:
        """Return the rows of each sequence in the flattened data, in the caller's order."""
        row = torch.arange(int(self.lengths().sum()))
        if self.layout == "batch-first":
            return list(row.view(self.B, self.T))
        if not self.is_packed:
            return list(row.view(self.T, self.B).T)
        packed = pack_padded_sequence(
            torch.arange(self.T * self.B).view(self.T, self.B),
            self.lengths(),
            enforce_sorted=self.layout == "packed",
        ).data.tolist()
        where = {token: row for row, token in enumerate(packed)}
        return [
            torch.tensor([where[t * self.B + b] for t in range(length)])
            for b, length in enumerate(self.lengths().tolist())
        ]


def plain(output: Tensor | PackedSequence) -> Tensor:
    """Return the tensor in an output."""
    return output.data if isinstance(output, PackedSequence) else output


def run(case: Case, module: nn.Module, data: Tensor, hx: Tensor | None) -> dict[str, Tensor]:
    """Return the output, the final state and every gradient, by name."""
    output, h_n = module(case.input(data), hx)
    return with_gradients(case, module, data, hx, plain(output), h_n)


def with_gradients(case, module, data, hx, output, h_n) -> dict[str, Tensor]:
    """Return the results of a call and the gradient of every leaf, by name."""
    leaves = {"input": data, "hx": hx, **dict(module.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    cotangents = [c.to(y.dtype) for c, y in zip(case.cotangents(output, h_n), (output, h_n))]
    gradients = torch.autograd.grad((output, h_n), list(leaves.values()), cotangents)
    results = {f"grad of {name}": g for name, g in zip(leaves, gradients)}
    return {"output": output.detach(), "h_n": h_n.detach(), **results}


def exact(case: Case, module: nn.Module, data: Tensor, hx: Tensor | None) -> dict[str, Tensor]:
    """Return what :func:`run` does, by the written-out recurrence in float64."""
    data, hx = (None if x is None else x.detach().double().requires_grad_() for x in (data, hx))
    wide = case.module().double()
    wide.load_state_dict(module.state_dict())
    return with_gradients(case, wide, data, hx, *case.written_out(wide.parameters(), data, hx))


def pair(case: Case, module_class: type[nn.Module] = tritonrnn.RNN) -> tuple[nn.Module, nn.Module]:
    """Return torch.nn.RNN and ours, or what is to be tried, with the same weights."""
    theirs = case.module(nn.RNN)
    ours = case.module(module_class)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_results(got: dict, expected: dict, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


class RecordedCalls(TorchDispatchMode):
    """Record the names of the operators called, and the storages of their results."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(
                    storage._cdata, (StorageWeakRef(storage), storage.nbytes())
                )
        return results

    def bytes_alive(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())


def assert_accurate_over(
    cases: list[Case], scale: float = 4.0, module_class: type[nn.Module] = tritonrnn.RNN
) -> None:
    """Check that the median error over draws of a case is about torch.nn.RNN's."""
    expected, truth, got = [], [], []
    for case in cases:
        theirs, ours = pair(case, module_class)
        data, hx = case.tensors(scale)
        expected.append(run(case, theirs, data, hx))
        truth.append(exact(case, theirs, data, hx))
        got.append(run(case, ours, data, hx))
        assert got[-1].keys() == expected[-1].keys()
    for name in expected[0]:
        assert_as_accurate(
            *([draw[name] for draw in draws] for draws in (got, expected, truth)), name
        )


def assert_as_accurate_as_on_cpu(case: Case, got: dict[str, Tensor]) -> None:
    """Check results, of any device and mode, against torch.nn.RNN's in training on the CPU."""
    case = replace(case, device="cpu", dropout=0.0)
    arguments = (case, case.module(), *case.tensors())
    expected, truth = run(*arguments), exact(*arguments)
    for name in truth:
        assert_as_accurate([got[name].cpu()], [expected[name]], [truth[name]], name)


def assert_autocast_as_accurate(
    case: Case,
    dtype: torch.dtype,
    input_dtype: torch.dtype,
    module_class: type[nn.Module] = tritonrnn.RNN,
) -> None:
    """Check that a call under autocast to ``dtype`` returns that, as accurate as torch.nn.RNN's.

    On CUDA torch.nn.RNN returns float16 whatever the dtype. There it is called in the dtype, and
    without autocast, which rounds the same values.
    """
    theirs, ours = pair(case, module_class)
    data, hx = case.tensors()
    data = data.detach().to(input_dtype).requires_grad_()
    truth = exact(case, theirs, data, hx)

    def under_autocast(module: nn.Module) -> dict[str, Tensor]:
        with torch.autocast(case.device, dtype):
            output, h_n = module(case.input(data), hx)
        # The backward of autocast runs outside of it.
        return with_gradients(case, module, data, hx, plain(output), h_n)

    got = under_autocast(ours)
    assert got["output"].dtype == got["h_n"].dtype == dtype
    if case.device == "cuda":
        cast = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (data, hx)]
        expected = run(case, theirs.to(dtype), *cast)
        # Exact: gradients have been rounded to it before they were cast.
        got = {name: result.to(dtype) for name, result in got.items()}
    else:
        expected = under_autocast(theirs)
    for name in expected:
        assert_as_accurate([got[name]], [expected[name]], [truth[name]], name)


def assert_no_shared_storage(case: Case) -> None:
    """Check that no gradient shares memory with another, with a result or with an argument."""
    _, ours = pair(case)
    data, hx = case.tensors()
    output, h_n = ours(case.input(data), hx)
    cotangents = case.cotangents(plain(output), h_n)
    leaves = {"input": data, "hx": hx, **dict(ours.named_parameters())}
    given = {"cotangent of output": cotangents[0], "cotangent of h_n": cotangents[1], **leaves}
    gradients = torch.autograd.grad(
        (plain(output), h_n), leaves.values(), cotangents, retain_graph=True
    )
    owners = {x.untyped_storage().data_ptr(): name for name, x in given.items()}
    owners[plain(output).untyped_storage().data_ptr()] = "output"
    for name, gradient in zip(leaves, gradients):
        owner = owners.setdefault(gradient.untyped_storage().data_ptr(), f"gradient of {name}")
        assert owner == f"gradient of {name}"
    torch.autograd.backward((plain(output), h_n), cotangents)
    assert len({x.grad.untyped_storage().data_ptr() for x in leaves.values()}) == len(leaves)


def assert_cotangents_of_any_memory(case: Case) -> None:
    """Check that gradients depend on the values of cotangents alone, which nothing overwrites."""
    _, ours = pair(case)
    data, hx = case.tensors()
    output, h_n = ours(case.input(data), hx)
    results, leaves = (plain(output), h_n), (data, hx, *ours.parameters())
    cotangents = case.cotangents(*results)
    expected = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    forms = {
        "contiguous": torch.clone,
        "transposed": lambda x: x.mT.contiguous().mT,
        "negative view": lambda x: torch._neg_view(-x),
        "between vectors": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    }
    for name, form in forms.items():
        given = [form(x) for x in cotangents]
        got = torch.autograd.grad(results, leaves, given, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(got, expected)), name
        assert all(torch.equal(x, y) for x, y in zip(given, cotangents)), name
    for ours, theirs in (
        (
            lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
            torch.zeros_like,
        ),
        (lambda x: x.new_ones(()).expand_as(x), torch.ones_like),
    ):
        got, expected = (
            torch.autograd.grad(results, leaves, [form(x) for x in cotangents], retain_graph=True)
            for form in (ours, theirs)
        )
        assert all(torch.equal(x, y) for x, y in zip(got, expected))


def assert_zero_gradients(case: Case) -> None:
    """Check that an empty batch leaves every parameter a gradient of zeros."""
    theirs, ours = pair(case)
    data, hx = case.tensors()
    got, expected = run(case, ours, data, hx), run(case, theirs, data, hx)
    assert_same_results(got, expected)
    output, h_n = ours(data)
    (output.sum() + h_n.sum()).backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def as_function(case: Case, module: nn.Module):
    """Return ``(data, hx, *weights) -> (output, h_n)`` and its arguments, ``hx`` if given."""
    names = [name for name, _ in module.named_parameters()]
    data, hx = case.tensors(0.7)
    packed = case.input(data)

    def function(data, *others):
        hx, *weights = others if case.hx else (None, *others)
        input = packed._replace(data=data) if case.is_packed else data
        parameters = dict(zip(names, weights))
        output, h_n = torch.func.functional_call(module, parameters, (input, hx))
        return plain(output), h_n

    weights = [weight.detach().clone().requires_grad_() for weight in module.parameters()]
    return function, (data, *([hx] if case.hx else []), *weights)
