"""Short sequences are left to torch's own kernels on a CPU: nothing but the speed shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import tritonrnn
from tests.support.cases import Case, assert_same_results, pair, run
from tritonrnn import validation

pytestmark = pytest.mark.usefixtures("torch_back_end")
# Steps beyond what the in-place path serves at least, in training.
AROUND = pytest.mark.parametrize("beyond", [-1, 0], ids=["below", "from"])


def test_readme_states_the_limits(fewest_steps):
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    inference, training, mapped_inference, mapped_training = fewest_steps.values()
    assert f"in training fewer than {training} steps, of both directions together, and" in text
    assert f"fewer than {inference} without a graph; packed or with `lengths=`" in text
    assert f"get the batch packed, fewer than {mapped_training} and {mapped_inference}." in text


@AROUND
@pytest.mark.parametrize("layout", ["time-major", "batch-first", "unbatched", "unsorted"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
def test_results_are_the_same_on_both_sides(beyond, layout, hx, fewest_steps):
    # Of all directions.
    T = (fewest_steps[layout == "unsorted", True] + 1) // 2 + beyond
    case = Case(T=T, L=2, D=2, layout=layout, hx=hx, dtype=torch.float64)
    theirs, ours = pair(case)
    data, h_0 = case.tensors()
    plan = tritonrnn.explain(ours, case.input(data), h_0).plan
    assert plan == ("aten" if beyond < 0 else "in-place")
    expected = run(case, theirs, *case.tensors())
    got = run(case, ours, data, h_0)
    assert_same_results(got, expected)
    assert_same_results(run(case, ours, *case.tensors()), got, rtol=0, atol=0)


@AROUND
def test_inference_has_a_limit_of_its_own(beyond, fewest_steps):
    module, x = tritonrnn.RNN(3, 5), torch.randn(fewest_steps[False, False] + beyond, 2, 3)
    with torch.no_grad():
        assert tritonrnn.explain(module, x).plan == ("aten" if beyond < 0 else "in-place")
        expected = nn.RNN(3, 5)
        expected.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), expected(x))


@AROUND
@pytest.mark.parametrize("wants", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("mapped", [False, True], ids=["padded", "lengths"])
def test_batch_first_output_is_contiguous_on_both_sides(mapped, wants, beyond, fewest_steps):
    T = fewest_steps[mapped, wants] + beyond
    module = tritonrnn.RNN(3, 5, batch_first=True)
    lengths = torch.tensor([T, 1]) if mapped else None
    with torch.set_grad_enabled(wants):
        assert module(torch.randn(2, T, 3), lengths=lengths)[0].is_contiguous()


@pytest.mark.parametrize("mapped", [False, True], ids=["padded", "packed"])
def test_call_that_wants_no_gradient_is_inference(mapped, fewest_steps):
    module, x = tritonrnn.RNN(3, 5), torch.randn(fewest_steps[mapped, False] - 1, 2, 3)
    if mapped:
        x = nn.utils.rnn.pack_padded_sequence(x, [len(x)] * 2)
    for wants, plan in [(True, "in-place"), (False, "aten")]:
        module.requires_grad_(wants)
        assert tritonrnn.explain(module, x).plan == plan


@AROUND
def test_output_may_be_changed_in_place_where_torchs_may(beyond, fewest_steps):
    module, x = tritonrnn.RNN(3, 5), torch.randn(fewest_steps[False, True] + beyond, 2, 3)
    output, _ = module(x)
    changed = output.relu_()
    if beyond < 0:
        changed.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.sum().backward()


@AROUND
def test_second_derivatives_are_there_on_both_sides(beyond, fewest_steps):
    module = tritonrnn.RNN(2, 3, dtype=torch.float64)
    x = torch.randn(
        fewest_steps[False, True] + beyond, 2, 2, dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradgradcheck(module, (x,))


@AROUND
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_torchs_masks_on_both_sides(beyond, batch_first, fewest_steps):
    layout = "batch-first" if batch_first else "time-major"
    case = Case(T=fewest_steps[False, True] + beyond, H=16, L=3, dropout=0.5, layout=layout)
    outputs = []
    for module in pair(case):
        torch.manual_seed(1)
        outputs.append(module(case.input(case.tensors()[0]))[0])
    torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("training", [True, False])
def test_masks_with_lengths_are_the_same_with_and_without_a_graph(training, fewest_steps):
    """A checkpoint runs a call without a graph, and then again with one."""
    # With a graph in place. Without, and with no masks to draw, by torch's kernels.
    T = fewest_steps[True, True]
    module, x = tritonrnn.RNN(3, 5, 2, dropout=0.5).train(training), torch.randn(T, 2, 3)
    lengths, outputs = torch.tensor([T, 1]), []
    for wants in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(wants):
            plan = tritonrnn.explain(module, x, lengths=lengths).plan
            assert plan == ("in-place" if wants or training else "aten")
            outputs.append(module(x, lengths=lengths)[0])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("T", [1, 3])
def test_hx_of_a_sequence_without_a_token_spoils_no_gradient(T, fewest_steps):
    module, hx = tritonrnn.RNN(3, 5), torch.zeros(1, 2, 5)
    hx[0, 1] = torch.nan
    output, h_n = module(torch.randn(T, 2, 3), hx, lengths=torch.tensor([T, 0]))
    assert h_n[0, 1].isnan().all()
    gradients = torch.autograd.grad(output.sum() + h_n[0, 0].sum(), list(module.parameters()))
    assert not any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize(
    "given", [{"reset": torch.eye(4, 2).bool()}, {"lengths": torch.ones(2).long()}]
)
def test_tracer_of_fake_tensors_takes_no_short_path(given, fewest_steps):
    module, x = tritonrnn.RNN(3, 5), torch.randn(4, 2, 3)
    weights = dict(module.named_parameters())

    def run(weights, x, **given):
        return torch.func.functional_call(module, weights, (x,), given)[0]

    [(name, value)] = given.items()
    traced = make_fx(lambda w, x, v: run(w, x, **{name: v}), tracing_mode="fake")
    graph = traced(weights, x, value)
    torch.testing.assert_close(graph(weights, x, value), module(x, **given)[0])


# One step: whether a sequence has it, or starts anew in it, is a matter of its hx.

STEPS = {
    "lengths": {"lengths": torch.tensor([1, 0, 1])},
    "reset": {"reset": torch.tensor([[True, False, False]])},
    "both": {
        "lengths": torch.tensor([1, 0, 0]),
        "reset": torch.tensor([[True, False, True]]),
    },
}


@pytest.mark.parametrize("given", STEPS)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("layout", ["time-major", "batch-first"])
@pytest.mark.parametrize(("L", "D"), [(1, 1), (2, 2)])
def test_one_step_is_what_each_sequence_makes_of_it(given, hx, layout, L, D):
    case = Case(T=1, B=3, L=L, D=D, hx=hx, layout=layout, dtype=torch.float64)
    batch_first = layout == "batch-first"
    theirs, ours = pair(case)
    arguments = STEPS[given]
    alive = arguments.get("lengths", torch.ones(3)) > 0
    marked = arguments.get("reset", torch.zeros(1, 3))[0] > 0

    data, h_0 = case.tensors()
    # What is padding is not read.
    steps = case.input(data).movedim(int(batch_first), 0)
    x = steps.masked_fill(~alive[:, None], torch.nan).movedim(0, int(batch_first))
    turned = {k: v.T if v.dim() == 2 and batch_first else v for k, v in arguments.items()}
    assert tritonrnn.explain(ours, x, h_0, **turned).plan == "aten"
    output, h_n = ours(x, h_0, **turned)
    got = results_of(output.movedim(int(batch_first), 0)[0], h_n, data, h_0, ours)

    data, h_0 = case.tensors()
    steps = case.input(data).movedim(int(batch_first), 0)
    initial = data.new_zeros(L * D, 3, case.H) if h_0 is None else h_0
    outputs, finals = [], []
    for b in range(3):
        h_b = initial[:, b : b + 1]
        if marked[b] and alive[b]:
            # The second direction comes from the other side.
            h_b = h_b * (torch.arange(L * D) % D > 0)[:, None, None]
        if alive[b]:
            y, h_b = theirs(steps[:, b : b + 1].movedim(0, int(batch_first)), h_b)
        outputs.append(y.reshape(-1) if alive[b] else data.new_zeros(D * case.H))
        finals.append(h_b)
    expected = results_of(torch.stack(outputs), torch.cat(finals, 1), data, h_0, theirs)
    for ours_, theirs_ in zip(got, expected):
        torch.testing.assert_close(ours_, theirs_)


def results_of(output, h_n, data, h_0, module) -> list[torch.Tensor]:
    (output.sin().sum() + h_n.cos().sum()).backward()
    leaves = [data, *([] if h_0 is None else [h_0]), *module.parameters()]
    return [output, h_n, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("given", STEPS)
def test_one_step_is_judged_by_the_kernel_that_it_would_launch(given, monkeypatch):
    """With lengths or resets that has a row map, whatever the number of steps."""
    asked = []

    def recorded(*arguments, **call):
        asked.append(call["mapped"])
        return choose(*arguments, **call)

    choose = validation.choose
    monkeypatch.setattr(validation, "choose", recorded)
    # As where kernels may serve.
    monkeypatch.setattr(validation, "asked_where_steps_decide", lambda data: None)
    tritonrnn.RNN(3, 5)(torch.randn(1, 3, 3), **STEPS[given])
    assert asked == [True]
