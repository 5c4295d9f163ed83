"""torch's own kernels, which differentiate once, serve second derivatives as well.

On a GPU they are cuDNN's. Elsewhere they are imitated, for CPU tensors of any length.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import tritonrnn
from tests.support.cases import (
    Case,
    as_function,
    assert_as_accurate_as_on_cpu,
    assert_same_results,
    pair,
    run,
)
from tests.support.cudnn import imitated_kernels, through_cudnn
from tests.support.implementations import slow
from tritonrnn import dispatch, ops, validation
from tritonrnn.paths import aten, inplace

# torch's rules for forward AD are scripted at their first use; its compiler imports what warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def walks(monkeypatch):
    """Return the list of walks in torch's operators, one entry each."""
    taken = []
    recurrence = inplace.recurrence

    def recorded(*arguments, **options):
        taken.append(options["epilogue"])
        return recurrence(*arguments, **options)

    monkeypatch.setattr(inplace, "recurrence", recorded)
    return taken


def choose_aten(monkeypatch):
    """Let torch's own kernels serve every call, of any length, that torch is to serve."""

    def by_aten(choose):
        def choose_aten(*arguments, **sizes):
            choice = choose(*arguments, **sizes)
            return replace(choice, plan="aten") if choice.plan == "in-place" else choice

        return choose_aten

    for module in (dispatch, ops):
        monkeypatch.setattr(module, "choose_now", by_aten(module.choose_now))
    # Without its memory of other tests, and of this one in others.
    monkeypatch.setattr(validation, "choose_by_steps", dispatch.choose_by_steps.__wrapped__)


@pytest.fixture
def kernels(request, monkeypatch):
    """Return an imitation of cuDNN's kernels or of MIOpen's that serves on the CPU."""
    name = getattr(request, "param", "_cudnn_rnn")
    choose_aten(monkeypatch)
    monkeypatch.setattr(aten, "is_differentiated_once", lambda input: True)
    if name == "miopen_rnn":
        monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(aten, "has_reserve", lambda input: True)
    monkeypatch.setattr(torch, "rnn_relu", through_cudnn(0))
    monkeypatch.setattr(torch, "rnn_tanh", through_cudnn(1))
    with imitated_kernels(name) as kernels, tritonrnn.backend("torch"):
        yield kernels


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """Return a device on which torch's own kernels serve every call, of any length."""
    if request.param == "cpu":
        request.getfixturevalue("kernels")
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
def test_first_derivative_is_that_of_the_kernels(case, device, request):
    case = replace(case, device=device)
    theirs, ours = pair(case)
    got = run(case, ours, *case.tensors())
    if device == "cpu":
        assert request.getfixturevalue("kernels").backwards == 1
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
@pytest.mark.slow
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


def program_of(module, case, how):
    """Return the module as a program that chooses its kernels when it runs."""
    if how == "exported":
        data, hx = (None if x is None else x.detach() for x in case.tensors())
        arguments = (case.input(data), hx)
        return torch.export.export(module, arguments, strict=False).module()
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=how)


def named_as_in_module(results):
    return {name.replace("_orig_mod.", ""): result for name, result in results.items()}


@pytest.fixture
def _compiles_in_this_process():
    """In others, torch 2.11 may wait minutes for its workers to end."""
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.usefixtures("_compiles_in_this_process")
@pytest.mark.parametrize(
    ("case", "how", "kernels"),
    [
        *((case, "exported", "_cudnn_rnn") for case in CASES),
        *(slow(case, "aot_eager", "_cudnn_rnn") for case in (CASES[1], CASES[4])),
        *(slow(case, "aot_eager", "miopen_rnn") for case in (CASES[1], CASES[3])),
        slow(CASES[1], "inductor", "_cudnn_rnn"),
    ],
    indirect=["kernels"],
    ids=str,
)
def test_program_takes_the_kernels_forward_and_backward(case, how, kernels, walks):
    theirs, ours = pair(case)
    got = run(case, program_of(ours, case, how), *case.tensors())
    assert (kernels.forwards, kernels.backwards) == (case.L, case.L)
    assert not walks
    assert_same_results(named_as_in_module(got), run(case, theirs, *case.tensors()))


@pytest.mark.gpu
@aten_cases
def test_program_on_a_gpu_walks_in_no_pass(case, walks):
    case = replace(case, device="cuda")
    theirs, ours = pair(case)
    with tritonrnn.backend("torch"):
        got = run(case, program_of(ours, case, "aot_eager"), *case.tensors())
    assert not walks
    assert_same_results(named_as_in_module(got), run(case, theirs, *case.tensors()))


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:RNN module weights are not part of single")
@pytest.mark.parametrize("how", ["eager", "exported", "trial"])
@pytest.mark.parametrize("layout", ["batch-first", "packed"])
def test_users_are_not_warned_of_where_weights_lie(layout, how, capfd):
    """torch.nn.RNN keeps those in bfloat16 in no buffer, and is warned of it in each call."""
    case = Case(L=2, D=2, layout=layout, dtype=torch.bfloat16, device="cuda")
    module = case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    if how == "trial":
        sizes = case.input(data).batch_sizes if case.is_packed else None
        settings = sizes, "packed" if case.is_packed else "batch_major", "tanh", True
        weights = list(module.parameters())
        with torch.no_grad():
            aten.forward_with_reserve(data, hx, weights, *settings, num_layers=2)
    else:
        with tritonrnn.backend("torch"):
            called = program_of(module, case, how) if how == "exported" else module
            run(case, called, data, hx)
            with torch.no_grad():
                called(case.input(data), hx)
    # Where torch can't hand a warning to Python, it prints it.
    assert "RNN module weights" not in capfd.readouterr().err


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["exported", "aot_eager"])
def test_program_that_needs_no_gradient_reserves_nothing(how, mode, kernels):
    case = CASES[1]
    _, ours = pair(case)
    data, hx = case.tensors()
    with mode():
        program = program_of(ours, case, how)
        torch.testing.assert_close(program(data, hx), ours(data, hx))
    assert kernels.forwards == 0


@pytest.mark.parametrize("retain_graph", [True, False])
def test_exported_program_is_differentiated_again(retain_graph, device):
    """By the kernels if its graph is retained, and in operations if the gradient is to be one."""
    case = replace(CASES[0], device=device)
    program = program_of(case.module(tritonrnn.RNN), case, "exported")
    function, arguments = as_function(case, program)
    if not retain_graph:
        assert gradgradcheck(function, arguments, fast_mode=True, nondet_tol=1e-12)
        return
    results = function(*arguments)
    cotangents = case.cotangents(*results)
    first, second = (
        torch.autograd.grad(results, arguments, cotangents, retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second)


def test_program_walks_in_both_passes_where_the_kernels_reserve_nothing(
    kernels, walks, monkeypatch
):
    """As with ``torch.backends.cudnn.enabled = False``."""
    monkeypatch.setattr(aten, "has_reserve", lambda input: False)
    case = CASES[0]
    theirs, ours = pair(case)
    got = run(case, program_of(ours, case, "exported"), *case.tensors())
    assert walks == ["tanh", "tanh_grad"]
    assert_same_results(got, run(case, theirs, *case.tensors()))


def test_what_is_longer_than_cudnn_takes_is_walked():
    plans = [
        dispatch.choose_now(
            "torch", torch.device("cuda"), torch.float64,
            T=T, B=1, G=1, H=8, nonlinearity="tanh",
        ).plan
        for T in (65535, 65536)
    ]  # fmt: skip
    assert plans == ["aten", "in-place"]


@pytest.mark.feature("more than 65,535 steps", nn_on_gpu="no")
@pytest.mark.gpu
def test_65536_steps_run_and_train(implementation):
    case = implementation.of(Case(T=65536, B=1, H=4, dtype=torch.bfloat16))
    assert_as_accurate_as_on_cpu(case, run(case, case.module(implementation.rnn), *case.tensors()))
