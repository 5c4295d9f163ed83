"""Programs from RNN tutorials: by tritonrnn, by torch.nn and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
)

import tritonrnn

pytestmark = pytest.mark.usefixtures("torch_back_end")

T, B, I, H = 7, 4, 3, 5  # noqa: E741


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def twins(*arguments, **options) -> tuple[nn.Module, nn.Module]:
    """Return torch's module and ours with the same weights."""
    modules = []
    for module_class in (nn.RNN, tritonrnn.RNN):
        torch.manual_seed(1)
        modules.append(module_class(*arguments, **options))
    return tuple(modules)


def assert_all_close(*results) -> None:
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def by_addmm(rnn, x: Tensor, state: Tensor, layer: int = 0, suffix: str = "") -> Tensor:
    """Return the hidden states ``(T, B, H)`` of a layer and direction, with one addmm a term."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(rnn, f"{name}_l{layer}{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    states = []
    for x_t in x:
        state = torch.tanh(torch.addmm(b_ih, x_t, w_ih.T) + torch.addmm(b_hh, state, w_hh.T))
        states.append(state)
    return torch.stack(states)


def by_bmm(rnn, x: Tensor, state: Tensor) -> Tensor:
    """Return the same, batch first, by batched products of matrices and column vectors."""
    w_ih, w_hh, b_ih, b_hh = (p.unsqueeze(0) for p in rnn.parameters())
    batch = x.shape[0]
    state = state.unsqueeze(2)
    states = []
    for t in range(x.shape[1]):
        from_input = torch.bmm(w_ih.repeat(batch, 1, 1), x[:, t, :].unsqueeze(2))
        from_state = torch.bmm(w_hh.repeat(batch, 1, 1), state)
        state = torch.tanh(from_input + b_ih.unsqueeze(2) + from_state + b_hh.unsqueeze(2))
        states.append(state.squeeze(2))
    return torch.stack(states, dim=1)


def test_one_layer_by_addmm():
    theirs, ours = twins(I, H)
    x, h_0 = torch.randn(T, B, I), torch.randn(1, B, H)
    states = by_addmm(ours, x, h_0[0])
    assert_all_close((states, states[-1:]), theirs(x, h_0), ours(x, h_0))


def test_one_layer_by_bmm():
    theirs, ours = twins(I, H, batch_first=True)
    x, h_0 = torch.randn(B, T, I), torch.randn(1, B, H)
    states = by_bmm(ours, x, h_0[0])
    assert_all_close((states, states[:, -1].unsqueeze(0)), theirs(x, h_0), ours(x, h_0))


@pytest.mark.parametrize("num_layers", [1, 3], ids="L{}".format)
def test_stepping_one_token_at_a_time_with_the_state_carried(num_layers):
    theirs, ours = twins(I, H, num_layers)
    x = torch.randn(T, B, I)
    expected = ours(x)
    for rnn in (theirs, ours):
        state, outputs = None, []
        for x_t in x:
            output, state = rnn(x_t.unsqueeze(0), state)
            outputs.append(output)
        assert_all_close(expected, (torch.cat(outputs), state))


def test_chunks_with_the_state_detached_between():
    """Truncated back-propagation through time."""
    x = torch.randn(12, B, I)
    gradients = []
    for rnn in twins(I, H, 2):
        state = None
        for chunk in x.split(5):
            output, state = rnn(chunk, None if state is None else state.detach())
            output.square().sum().backward()
        gradients.append([parameter.grad for parameter in rnn.parameters()])
    assert_all_close(*gradients)


def test_stack_of_three():
    theirs, ours = twins(I, H, 3)
    x, h_0 = torch.randn(T, B, I), torch.randn(3, B, H)
    states, last = x, []
    for layer in range(3):
        states = by_addmm(ours, states, h_0[layer], layer)
        last.append(states[-1])
    assert_all_close((states, torch.stack(last)), theirs(x, h_0), ours(x, h_0))


def test_stack_of_three_is_three_modules():
    _, ours = twins(I, H, 3)
    x = torch.randn(T, B, I)
    states = x
    for layer in range(3):
        single = tritonrnn.RNN(I if layer == 0 else H, H)
        single.load_state_dict(
            {f"{n[:-1]}0": w for n, w in ours.state_dict().items() if n.endswith(f"l{layer}")}
        )
        states, _ = single(states)
    assert_all_close(states, ours(x)[0])


@pytest.mark.parametrize("num_layers", [1, 2], ids="L{}".format)
def test_bidirectional_split_by_layer_and_direction(num_layers):
    theirs, ours = twins(I, H, num_layers, bidirectional=True)
    x = torch.randn(T, B, I)
    h_0 = torch.randn(num_layers * 2, B, H)
    states, last = x, []
    for layer in range(num_layers):
        forward = by_addmm(ours, states, h_0[2 * layer], layer)
        backward = by_addmm(ours, states.flip(0), h_0[2 * layer + 1], layer, "_reverse").flip(0)
        last += [forward[-1], backward[0]]
        states = torch.cat([forward, backward], dim=2)
    for rnn in (theirs, ours):
        output, h_n = rnn(x, h_0)
        by_direction = output.view(T, B, 2, H)
        assert_all_close(forward, by_direction[:, :, 0])
        assert_all_close(backward, by_direction[:, :, 1])
        by_layer = h_n.view(num_layers, 2, B, H)
        assert_all_close(torch.stack(last).view(num_layers, 2, B, H), by_layer)
        assert_all_close(by_layer[-1, 0], output[-1, :, :H])
        assert_all_close(by_layer[-1, 1], output[0, :, H:])


def with_head(rnn, features: int, classes: int = 6) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(features, classes)


def trained(rnn, head, loss) -> list[Tensor]:
    """Return the parameters after three steps of Adam on ``loss()``, and the losses."""
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return [*losses, *(p.detach() for p in (*rnn.parameters(), *head.parameters()))]


def test_many_to_many_with_a_head_looped_and_at_once():
    x, target = torch.randn(B, T, I), torch.randint(6, (B, T))
    results = []
    for rnn in twins(I, H, 2, batch_first=True):
        for looped in (True, False):
            rnn, head = type(rnn)(I, H, 2, batch_first=True), with_head(rnn, H)
            rnn.load_state_dict(twins(I, H, 2, batch_first=True)[0].state_dict())

            def loss(rnn=rnn, head=head, looped=looped):
                output, _ = rnn(x)
                if looped:
                    scores = torch.stack([head(output[:, t]) for t in range(T)], dim=1)
                else:
                    scores = head(output)
                return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())

            results.append(trained(rnn, head, loss))
    assert_all_close(*results)


def test_many_to_one_from_the_two_final_states():
    x, target = torch.randn(T, B, I), torch.randint(6, (B,))
    results = []
    for rnn in twins(I, H, 2, bidirectional=True):
        head = with_head(rnn, 2 * H)

        def loss(rnn=rnn, head=head):
            _, h_n = rnn(x)
            return nn.functional.cross_entropy(head(torch.cat([h_n[-2], h_n[-1]], dim=1)), target)

        results.append(trained(rnn, head, loss))
    assert_all_close(*results)


def one_to_many(rnn, head, token: Tensor, state: Tensor, steps: int) -> Tensor:
    """Feed each step with what the head makes of the step before."""
    made = []
    for _ in range(steps):
        output, state = rnn(token, state)
        token = head(output)
        made.append(token)
    return torch.cat(made)


def test_one_to_many_feeds_its_own_output():
    first, h_0 = torch.randn(1, B, I), torch.randn(1, B, H)
    results = []
    for rnn in twins(I, H):
        head = with_head(rnn, H, I)
        made = one_to_many(rnn, head, first, h_0, 6)
        gradients = torch.autograd.grad(made.square().sum(), [*rnn.parameters()])
        results.append([made, *gradients])
    theirs, ours = results
    assert_all_close(theirs, ours)
    token, state = first[0], h_0[0]
    for made in ours[0]:
        state = by_addmm(rnn, token.unsqueeze(0), state)[0]
        token = head(state)
        assert_all_close(token, made)


def test_many_to_one_chained_to_one_to_many():
    """An encoder's final state is a decoder's first."""
    source = torch.randn(T, B, I)
    results = []
    for encoder, decoder in zip(twins(I, H), twins(I, H)):
        head = with_head(decoder, H, I)
        _, context = encoder(source)
        made = one_to_many(decoder, head, torch.zeros(1, B, I), context, 5)
        leaves = [*encoder.parameters(), *decoder.parameters(), *head.parameters()]
        results.append([made, *torch.autograd.grad(made.square().sum(), leaves)])
    assert_all_close(*results)
    state = by_addmm(encoder, source, torch.zeros(B, H))[-1]
    token = torch.zeros(B, I)
    for made in results[1][0]:
        state = by_addmm(decoder, token.unsqueeze(0), state)[0]
        token = head(state)
        assert_all_close(token, made)


LENGTHS = (5, 3, 4, 2)


def packed_by_hand(rnn, packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Take batch_sizes[t] rows in step t; a sequence that has ended keeps its state."""
    w_ih, w_hh, b_ih, b_hh = rnn.parameters()
    state = torch.zeros(int(packed.batch_sizes[0]), H)
    start, rows = 0, []
    for size in packed.batch_sizes.tolist():
        x_t = packed.data[start : start + size]
        alive = torch.tanh(x_t @ w_ih.T + b_ih + state[:size] @ w_hh.T + b_hh)
        state = torch.cat([alive, state[size:]])
        rows.append(alive)
        start += size
    return torch.cat(rows), state[packed.unsorted_indices].unsqueeze(0)


def test_packing_by_hand_over_batch_sizes():
    theirs, ours = twins(I, H)
    packed = pack_sequence([torch.randn(n, I) for n in LENGTHS], enforce_sorted=False)
    assert packed.batch_sizes.tolist() == [4, 4, 3, 2, 1]
    by_hand = packed_by_hand(ours, packed)
    for rnn in (theirs, ours):
        output, h_n = rnn(packed)
        assert_all_close(by_hand, (output.data, h_n))


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["D1", "D2"])
def test_packing_and_unpacking_a_padded_batch(batch_first, bidirectional):
    theirs, ours = twins(I, H, 2, batch_first=batch_first, bidirectional=bidirectional)
    sequences = [torch.randn(n, I) for n in LENGTHS]
    padded = pad_sequence(sequences, batch_first=batch_first)
    packed = pack_padded_sequence(
        padded, torch.tensor(LENGTHS), batch_first=batch_first, enforce_sorted=False
    )
    results = []
    for rnn in (theirs, ours):
        output, h_n = rnn(packed)
        unpacked, lengths = pad_packed_sequence(output, batch_first=batch_first)
        assert lengths.tolist() == list(LENGTHS)
        results.append((unpacked, h_n))
        for b, (sequence, own) in enumerate(zip(sequences, unpack_sequence(output))):
            alone, last = rnn(sequence)
            assert_all_close(alone, own)
            assert_all_close(last, h_n[:, b])
    assert_all_close(*results)


def test_packed_batch_through_an_embedding_to_a_classifier():
    words = [torch.randint(1, 9, (n,)) for n in LENGTHS]
    target = torch.randint(6, (len(words),))
    torch.manual_seed(4)
    embedding = nn.Embedding(9, I, padding_idx=0)
    results = []
    for rnn in twins(I, H, bidirectional=True):
        head = with_head(rnn, 2 * H)

        def loss(rnn=rnn, head=head):
            packed = pack_sequence(words, enforce_sorted=False)
            _, h_n = rnn(packed._replace(data=embedding(packed.data)))
            return nn.functional.cross_entropy(head(torch.cat([*h_n], dim=1)), target)

        results.append(trained(rnn, head, loss))
    assert_all_close(*results)
