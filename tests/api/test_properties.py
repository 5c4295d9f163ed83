"""What holds for every shape, on random sizes, lengths and options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import tritonrnn
from tests.support.cases import LAYOUTS, Case, exact, plain, run

pytestmark = pytest.mark.usefixtures("torch_back_end")

# What the tests below are decorated with.
SETTINGS = settings()

cases = st.builds(
    Case,
    T=st.integers(1, 9),
    B=st.integers(1, 6),
    I=st.integers(1, 7),
    H=st.integers(1, 9),
    L=st.integers(1, 3),
    D=st.integers(1, 2),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    bias=st.booleans(),
    hx=st.booleans(),
    dtype=st.just(torch.float64),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=7)
options = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 2),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
    }
)


def sequences_of(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(length, 3) for length in lengths]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def built(options: dict) -> tritonrnn.RNN:
    torch.manual_seed(0)
    return tritonrnn.RNN(3, 4, **options, dtype=torch.float64)


def test_examples_are_drawn_by_the_profile_asked_for(pytestconfig):
    asked = pytestconfig.getoption("--hypothesis-profile") or "suite"
    assert SETTINGS.max_examples == settings.get_profile(asked).max_examples
    assert SETTINGS.derandomize == (asked == "suite")


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@given(case=cases)
def test_results_are_the_written_out_recurrences(case):
    ours = case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    assert_close(run(case, ours, data, hx), exact(case, ours, data, hx))


@given(case=cases)
def test_results_are_torchs(case):
    theirs, ours = case.module(nn.RNN), case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    assert_close(run(case, ours, data, hx), run(case, theirs, data, hx))


@given(lengths=lengths, options=options)
def test_packed_sequences_are_each_as_if_alone(lengths, options):
    """Values and gradients: packing is a layout only."""
    module = built(options)
    together = [sequence.requires_grad_() for sequence in sequences_of(lengths)]
    packed = pack_sequence(together, enforce_sorted=False)
    hx = torch.ones(module(packed)[1].shape, dtype=torch.float64, requires_grad=True)
    output, h_n = module(packed, hx)
    padded, _ = pad_packed_sequence(output)
    loss = output.data.pow(3).sum() + h_n.pow(2).sum()
    leaves = [*together, hx, *module.parameters()]
    gradients = torch.autograd.grad(loss, leaves)
    loss_alone = 0
    for b, sequence in enumerate(together):
        alone, last = module(sequence, hx[:, b])
        assert_close(padded[: lengths[b], b], alone)
        assert_close(h_n[:, b], last)
        loss_alone = loss_alone + alone.pow(3).sum() + last.pow(2).sum()
    assert_close(gradients, torch.autograd.grad(loss_alone, leaves))


@given(lengths=lengths, options=options, seed=st.integers(0, 9))
def test_order_of_packed_sequences_does_not_matter(lengths, options, seed):
    module = built(options)
    sequences = sequences_of(lengths)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    _, h_n = module(pack_sequence(sequences, enforce_sorted=False))
    _, permuted = module(pack_sequence([sequences[b] for b in order], enforce_sorted=False))
    assert_close(permuted, h_n[:, order])


@given(case=cases.filter(lambda case: case.layout == "time-major" and case.D == 1), t=st.data())
def test_sequence_may_be_split_anywhere_with_the_state_carried(case, t):
    module = case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    cut = t.draw(st.integers(1, case.T))
    expected, h_n = module(data, hx)
    first, state = module(data[:cut], hx)
    if cut < case.T:
        second, state = module(data[cut:], state)
        first = torch.cat([first, second])
    assert_close(first, expected)
    assert_close(state, h_n)


@given(case=cases.filter(lambda case: case.layout == "time-major"))
def test_batch_first_is_a_transpose(case):
    module = case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    expected, expected_h_n = module(data, hx)
    module.batch_first = True
    output, h_n = module(data.transpose(0, 1), hx)
    assert_close(output.transpose(0, 1), expected)
    assert_close(h_n, expected_h_n)


@given(case=cases.filter(lambda case: case.L == 1 and case.D == 2))
def test_h_n_is_the_output_at_the_last_step_of_each_direction(case):
    """Each direction's final state is its output at its own last step."""
    module = case.module(tritonrnn.RNN)
    data, hx = case.tensors()
    output, h_n = module(case.input(data), hx)
    output = plain(output).reshape(-1, 2 * case.H)
    final = h_n.unsqueeze(1) if case.layout == "unbatched" else h_n
    rows = [torch.arange(case.T)] if case.layout == "unbatched" else case.rows
    for b, own in enumerate(rows):
        assert_close(output[own[-1], : case.H], final[0, b])
        assert_close(output[own[0], case.H :], final[1, b])
