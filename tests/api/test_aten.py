"""torch's own kernels, which differentiate once, serve second derivatives as well.

On a GPU they are cuDNN's. Elsewhere they are imitated by torch's kernels for the CPU, taken for CPU
tensors of any length, with a backward pass that can't be differentiated.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import tritonrnn
from tests.support.cases import Case, as_function, assert_same_results, pair, run
from tritonrnn import dispatch, validation
from tritonrnn.paths import aten

# torch's rules for forward AD are scripted at their first use; its compiler imports what warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Once(torch.autograd.Function):
    """torch's kernels, differentiable once as cuDNN's are."""

    calls = 0

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.set_materialize_grads(False)
        ctx.sources = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        with torch.enable_grad():
            ctx.results = function(*ctx.sources)
        ctx.save_for_backward(*tensors, ctx.results[0].detach())
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # Raises if one of them was changed in place, the output included.
        assert ctx.saved_tensors
        known = [(y, grad) for y, grad in zip(ctx.results, grads) if grad is not None]
        if not known:
            return (None,) * (1 + len(ctx.sources))
        Once.calls += 1
        wanted = [x for x in ctx.sources if x.requires_grad]
        results, grads = zip(*known)
        found = iter(torch.autograd.grad(results, wanted, grads, retain_graph=True))
        return None, *(next(found) if x.requires_grad else None for x in ctx.sources)


def differentiated_once(function):
    def run(data, *arguments):
        is_packed = isinstance(arguments[1], torch.Tensor)
        seq_metadata = arguments[:1] if is_packed else ()
        hx, weights, *settings = arguments[is_packed:]

        def of_tensors(data, hx, *weights):
            return function(data, *seq_metadata, hx, weights, *settings)

        return Once.apply(of_tensors, data, hx, *weights)

    return run


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """Return a device on which torch's own kernels serve every call, of any length."""
    if request.param == "cpu":

        def by_aten(choose):
            def choose_aten(*arguments, **sizes):
                choice = choose(*arguments, **sizes)
                return replace(choice, plan="aten") if choice.plan == "in-place" else choice

            return choose_aten

        monkeypatch.setattr(dispatch, "choose_now", by_aten(dispatch.choose_now))
        remembered = by_aten(validation._checked_choice)
        monkeypatch.setattr(validation, "_checked_choice", remembered)
        monkeypatch.setattr(aten, "is_differentiated_once", lambda input: True)
        for name in ("rnn_tanh", "rnn_relu"):
            monkeypatch.setattr(torch, name, differentiated_once(getattr(torch, name)))
        monkeypatch.setattr(Once, "calls", 0)
    with tritonrnn.backend("torch"):
        yield request.param


CASES = [
    Case(T=4, B=3, I=2, H=3, L=L, D=D, layout=layout, nonlinearity=nonlinearity, hx=hx,
         dtype=torch.float64)
    for layout, (L, D), nonlinearity, hx in [
        ("time-major", (1, 1), "tanh", True),
        ("batch-first", (2, 2), "tanh", False),
        ("unbatched", (2, 1), "relu", True),
        ("packed", (1, 2), "relu", False),
        ("unsorted", (2, 1), "tanh", True),
    ]
]  # fmt: skip
aten_cases = pytest.mark.parametrize("case", CASES, ids=str)


@aten_cases
def test_torch_kernels_serve_the_call(case, device):
    case = replace(case, device=device)
    _, ours = pair(case)
    data, hx = case.tensors()
    assert tritonrnn.explain(ours, case.input(data), hx).plan == "aten"


@aten_cases
def test_first_derivative_is_that_of_the_kernels(case, device):
    case = replace(case, device=device)
    theirs, ours = pair(case)
    got = run(case, ours, *case.tensors())
    if device == "cpu":
        assert Once.calls == 1
    assert_same_results(got, run(case, theirs, *case.tensors()))


@aten_cases
def test_gradcheck_and_gradgradcheck_pass(case, device):
    case = replace(case, device=device)
    function, arguments = as_function(case, case.module(tritonrnn.RNN))
    # cuDNN sums the gradients of weights in no fixed order.
    options = {"fast_mode": True, "nondet_tol": 1e-12 if device == "cuda" else 0}
    assert gradcheck(function, arguments, **options)
    assert gradgradcheck(function, arguments, **options)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_second_derivative_drops_the_same_units(case, device):
    case = replace(case, device=device, dropout=0.5, L=3)
    function, arguments = as_function(case, case.module(tritonrnn.RNN))

    def seeded(*arguments):
        torch.manual_seed(7)
        return function(*arguments)

    options = {"fast_mode": True, "nondet_tol": 1e-12 if device == "cuda" else 0}
    assert gradcheck(seeded, arguments, **options)
    assert gradgradcheck(seeded, arguments, **options)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["recomputed", "reentrant"])
def test_checkpointing_repeats_dropout(use_reentrant, device):
    case = Case(L=3, dropout=0.5, dtype=torch.float64, device=device)
    _, ours = pair(case)
    data, hx = case.tensors()
    gradients = []
    for call in (ours, lambda *a: checkpoint(ours, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        output, h_n = call(data, hx)
        loss = output.square().sum() + h_n.sum()
        data.grad = None
        loss.backward()
        gradients.append(data.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("of", ["output", "h_n"])
def test_second_derivative_of_one_result_alone(of, device):
    case = Case(L=2, D=2, dtype=torch.float64, device=device)
    outcomes = []
    for module in pair(replace(case, device="cpu")):
        # On torch's CPU kernels, which can be differentiated twice, and here.
        where = "cpu" if isinstance(module, torch.nn.RNN) else device
        module.to(where)
        data, hx = (x.detach().to(where).requires_grad_() for x in case.tensors())
        output, h_n = module(data, hx)
        result = output if of == "output" else h_n
        # Some of the parameters only, as an optimizer of one part of a model has them.
        leaves = [data, *list(module.parameters())[1::2]]
        first = torch.autograd.grad(result.pow(3).sum(), leaves, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        second = torch.autograd.grad(penalty, [*leaves, hx])
        outcomes.append([x.cpu() for x in (*first, *second)])
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_many_gradients_at_once_agree_with_one_by_one(device):
    case = Case(T=3, B=2, I=2, H=2, dtype=torch.float64, device=device)
    module = case.module(tritonrnn.RNN)
    data, _ = case.tensors()

    def function(x):
        return module(x)[0]

    expected = torch.autograd.functional.jacobian(function, data)
    got = torch.autograd.functional.jacobian(function, data, vectorize=True)
    torch.testing.assert_close(got, expected)


def test_forward_ad_entered_after_the_forward_pass_has_no_silent_zero_tangent(device):
    case = Case(dtype=torch.float64, device=device)
    module = case.module(tritonrnn.RNN)
    data, _ = case.tensors()
    output, _ = module(data)
    direction = output.detach().cos()
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(output), direction)
        (gradient,) = torch.autograd.grad(output, data, cotangent, retain_graph=True)
        tangent = forward_ad.unpack_dual(gradient).tangent
    # A gradient is linear in its cotangent.
    (expected,) = torch.autograd.grad(output, data, direction)
    torch.testing.assert_close(tangent, expected)


def test_h_n_may_be_changed_in_place_and_output_never_wrongly(device):
    case = Case(dtype=torch.float64, device=device)
    module = case.module(tritonrnn.RNN)
    data, hx = case.tensors()

    def gradient(change):
        output, h_n = change(*module(data, hx))
        return torch.autograd.grad(output.square().sum() + h_n.square().sum(), data)

    expected = gradient(lambda output, h_n: (output, h_n * 3))
    got = gradient(lambda output, h_n: (output, h_n.mul_(3)))
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(lambda output, h_n: (output.mul_(3), h_n))


def test_compiled_program_takes_the_kernels_forward(device, monkeypatch):
    case = Case(L=2, D=2, layout="batch-first", dtype=torch.float64, device=device)
    _, ours = pair(case)
    taken = []
    forward = aten.forward

    def recorded(*arguments, **options):
        taken.append(arguments[0].shape)
        return forward(*arguments, **options)

    expected = run(case, ours, *case.tensors())
    monkeypatch.setattr(aten, "forward", recorded)
    monkeypatch.setattr("tritonrnn.ops.choose_now", dispatch.choose_now)
    torch._dynamo.reset()
    got = run(case, torch.compile(ours, fullgraph=True, backend="aot_eager"), *case.tensors())
    torch._dynamo.reset()
    assert len(taken) == case.L
    got = {name.replace("_orig_mod.", ""): result for name, result in got.items()}
    assert_same_results(got, expected)


def test_what_is_longer_than_cudnn_takes_is_walked():
    plans = [
        dispatch.choose_now(
            "torch", torch.device("cuda"), torch.float64,
            T=T, B=1, G=1, H=8, nonlinearity="tanh",
        ).plan
        for T in (65535, 65536)
    ]  # fmt: skip
    assert plans == ["aten", "in-place"]


@pytest.mark.gpu
def test_65536_steps_run_and_train():
    case = Case(T=65536, B=1, H=4, dtype=torch.float64)
    outcomes = []
    for device in ("cpu", "cuda"):
        module = case.module(tritonrnn.RNN).to(device)
        data = case.tensors()[0].detach().to(device)
        output, h_n = module(data)
        (output.square().sum() + h_n.sum()).backward()
        outcomes.append([output.cpu(), h_n.cpu(), *(p.grad.cpu() for p in module.parameters())])
    torch.testing.assert_close(outcomes[1], outcomes[0])
