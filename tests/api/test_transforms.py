"""Double backward, forward AD, torch.func and checkpointing, as on torch.nn.RNN."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import tritonrnn
from tests.support.cases import Case, as_function, pair, plain
from tests.support.implementations import here_and_on_gpu, implementations

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # torch's own rules for forward AD are scripted at their first use.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

TRANSFORMED = [
    Case(
        T=3, B=3, I=2, H=2, L=L, D=D, layout=layout, nonlinearity=nonlinearity, dtype=torch.float64
    )
    for layout, (L, D), nonlinearity in [
        ("time-major", (1, 1), "tanh"),
        ("time-major", (2, 2), "tanh"),
        ("batch-first", (1, 2), "tanh"),
        ("unbatched", (2, 1), "relu"),
        ("packed", (1, 1), "tanh"),
        ("unsorted", (2, 2), "tanh"),
    ]
]
transformed = pytest.mark.parametrize("case", TRANSFORMED, ids=str)
checked = pytest.mark.parametrize(
    "case", [*TRANSFORMED, replace(TRANSFORMED[2], bias=False, hx=False)], ids=str
)


@checked
def test_gradcheck_passes_backward_and_forward(case):
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    assert gradcheck(function, arguments, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("case", TRANSFORMED[:1] + TRANSFORMED[4:5], ids=str)
def test_gradcheck_passes_element_by_element(case):
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    assert gradcheck(function, arguments)


@checked
def test_gradgradcheck_passes(case):
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    assert gradgradcheck(function, arguments, fast_mode=True)


def second_derivatives(case: Case, module_class: type[nn.Module]) -> list[torch.Tensor]:
    """Return the gradients of a gradient penalty, as of a Wasserstein critic."""
    module = case.module(module_class)
    data, hx = case.tensors()
    output, h_n = module(case.input(data), hx)
    loss = plain(output).square().sum() + h_n.sum()
    gradients = torch.autograd.grad(loss, [data, hx], create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    leaves = [data, hx, *module.parameters()]
    # relu has no second derivative in its biases: torch returns None or zero.
    second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
    return [gradient.cpu() for gradient in second]


@pytest.mark.feature("double backward, vectorised jacobians", nn_on_gpu="no")
@transformed
@here_and_on_gpu
def test_double_backward_agrees_with_torch(case, where, implementation, monkeypatch):
    # On a GPU float32 is held to results of a CPU, which knows no TF32.
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    expected = second_derivatives(replace(case, dtype=implementation.dtype), nn.RNN)
    got = second_derivatives(implementation.of(case), implementation.rnn)
    torch.testing.assert_close(got, expected, **implementation.tolerance)


@pytest.mark.feature("double backward, vectorised jacobians")
def test_vectorised_jacobian_agrees_with_the_loop(implementation):
    case = implementation.of(replace(TRANSFORMED[0], hx=False))
    module, (data, _) = case.module(implementation.rnn), case.tensors(1.0)
    expected, got = (
        torch.autograd.functional.jacobian(lambda x: module(x)[0], data, vectorize=vectorize)
        for vectorize in (False, True)
    )
    torch.testing.assert_close(got, expected)


def scalar(function):
    def loss(*arguments):
        output, h_n = function(*arguments)
        return (output * output.detach().cos()).sum() + h_n.pow(3).sum()

    return loss


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(scalar(f))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(scalar(f))(x),
    "jacobian": torch.autograd.functional.jacobian,
    "jacobian-vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "jacobian-forward": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "jvp-of-two-vjps": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos()),
    "hvp": lambda f, x: torch.autograd.functional.hvp(scalar(f), x, x.cos()),
    "double-vjp": lambda f, x: torch.autograd.functional.hessian(scalar(f), x),
}


OF_TORCH_FUNC = ["grad", "jvp", "jacrev", "jacfwd", "hessian", "jacobian-forward"]
FEWER = [(TRANSFORMED[1], 0, transform) for transform in OF_TORCH_FUNC]


@pytest.mark.feature("`torch.func.grad`, `jacrev`, `jvp`, forward AD", triton="yes, on torch")
@implementations(
    "case,argument,transform",
    nn=FEWER,
    # Of the input, of hx and of weight_hh.
    torch=product(TRANSFORMED, (0, 1, 3), TRANSFORMS),
    triton=FEWER,
)
def test_transforms_agree_with_the_recurrence_written_out(
    case, argument, transform, implementation
):
    """Not with torch.nn.RNN, which takes no packed input under torch.func."""
    case = implementation.of(case)
    function, arguments = as_function(case, case.module(implementation.rnn))
    arguments = [x.detach() for x in arguments]
    # Cached before the transform, inside which lengths can't be read.
    assert case.rows

    def tried(x):
        return function(*arguments[:argument], x, *arguments[argument + 1 :])

    def written_out(x):
        data, hx, *weights = [*arguments[:argument], x, *arguments[argument + 1 :]]
        return case.written_out(weights, data, hx)

    expected = TRANSFORMS[transform](written_out, arguments[argument])
    assert any(x.any() for x in tree_leaves(expected))
    torch.testing.assert_close(TRANSFORMS[transform](tried, arguments[argument]), expected)


LEAVES = ["input", "hx", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]
FEWER = [(TRANSFORMED[1], leaf) for leaf in LEAVES]


@pytest.mark.feature("`torch.func.grad`, `jacrev`, `jvp`, forward AD", triton="yes, on torch")
@implementations("case,leaf", nn=FEWER, torch=product(TRANSFORMED, LEAVES), triton=FEWER)
def test_forward_ad_has_no_silent_zero_tangent(case, leaf, implementation):
    case = implementation.of(case)
    tangents = []
    for module in pair(case, implementation.rnn):
        data, hx = (x.detach() for x in case.tensors())
        with forward_ad.dual_level():
            parameters = {n: p.detach() for n, p in module.named_parameters()}
            leaves = {"input": data, "hx": hx, **parameters}
            tangent = torch.linspace(-1, 1, leaves[leaf].numel()).to(data)
            leaves[leaf] = forward_ad.make_dual(leaves[leaf], tangent.view(leaves[leaf].shape))
            output, h_n = torch.func.functional_call(
                module,
                {name: leaves[name] for name in parameters},
                (case.input(leaves["input"]), leaves["hx"]),
            )
            tangents.append([forward_ad.unpack_dual(y).tangent for y in (plain(output), h_n)])
    for expected, got in zip(*tangents):
        assert expected.any()
        assert got is not None
        torch.testing.assert_close(got, expected)


@pytest.mark.feature("activation checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["recomputed", "reentrant"])
@pytest.mark.parametrize("layout", ["time-major", "packed"])
def test_checkpointing_agrees_and_repeats_dropout(layout, use_reentrant, implementation):
    case = implementation.of(Case(layout=layout, L=2, dropout=0.4, dtype=torch.float64))
    ours = case.module(implementation.rnn)
    data, hx = case.tensors()

    def function(data, hx):
        output, h_n = ours(case.input(data), hx)
        return plain(output), h_n

    results = []
    for call in (function, lambda *a: checkpoint(function, *a, use_reentrant=use_reentrant)):
        ours.zero_grad()
        data.grad = None
        torch.manual_seed(3)
        output, h_n = call(data, hx)
        (output.square().sum() + h_n.sum()).backward()
        results.append([data.grad, *(parameter.grad for parameter in ours.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_operator_called_by_itself_has_no_silent_zero_tangent(grad_mode):
    """As an exported program calls it."""
    case = Case(D=2, dtype=torch.float64)
    module = case.module(tritonrnn.RNN)
    data, _ = (x.detach() for x in case.tensors())
    weights = [weight.detach() for weight in module.parameters()]
    with grad_mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(data, torch.ones_like(data))
        output, _ = torch.ops.tritonrnn.elman(
            dual, None, weights, None, None, "time_major", "tanh", True, "torch"
        )
        expected, _ = module(dual)
        tangent, other = (forward_ad.unpack_dual(y).tangent for y in (output, expected))
    torch.testing.assert_close(tangent, other)


@pytest.mark.parametrize("create_graph", [True, False], ids=["create_graph", "plain"])
@pytest.mark.parametrize("source", ["cotangent", "input"])
def test_forward_ad_of_a_backward_has_no_silent_zero_tangent(source, create_graph):
    """Forward over reverse: the tangent of a gradient, by either of what it depends on."""
    case = Case(D=2, dtype=torch.float64)
    tangents = []
    for module in pair(case):
        data, hx = case.tensors()
        with forward_ad.dual_level():
            x, cotangent = data, torch.ones(case.T, case.B, 2 * case.H, dtype=torch.float64)
            direction = torch.linspace(-1, 1, data.numel(), dtype=torch.float64).view(data.shape)
            if source == "input":
                x = forward_ad.make_dual(data, direction)
            output, _ = module(x, hx)
            if source == "cotangent":
                cotangent = forward_ad.make_dual(cotangent, cotangent.cumsum(0))
            (gradient,) = torch.autograd.grad(output, data, cotangent, create_graph=create_graph)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    assert tangents[0].any()
    torch.testing.assert_close(tangents[1], tangents[0])


def test_forward_ad_entered_after_the_forward_pass_has_no_silent_zero_tangent():
    case = Case(layout="packed", D=2, dtype=torch.float64)
    tangents = []
    for module in pair(case):
        data, hx = case.tensors()
        output = plain(module(case.input(data), hx)[0])
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(torch.ones_like(output), output.detach().cos())
            (gradient,) = torch.autograd.grad(output, data, cotangent)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    assert tangents[0].any()
    torch.testing.assert_close(tangents[1], tangents[0])
