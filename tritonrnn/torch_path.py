"""The recurrence in torch, in place and with nothing recorded: any device, any dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout

# Below this many multiply-adds a step, handing half of it to a second core costs more than it
# saves: B 8, H 64 (32 thousand) took 2.9 us on one thread and 6.5 us on two, B 32, H 128 (524
# thousand) 14.6 and 16.2 us, B 16, H 256 (a million) 31 and 25 us (torch 2.13, 2 cores of an AMD
# EPYC with AVX-512).
_ONE_THREAD_STEP = 1 << 19


def recurrence(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: Sequence[bool],
) -> None:
    """Walk every sequence of every group, overwriting ``a`` with the result.

        s_t = E(a_t + v_t, aux_t),    v_t = M s_{t-1},    v at a sequence's first step is v_0

    Args:
        a: ``[N, G * H]``; the drive in the forward pass, the gradient of the output in the
            backward pass. Overwritten with s.
        v_0: ``[G, B, H]``, or None for zero.
        M: ``[G, H, H]``; ``weight_hh`` in the forward pass, its transpose in the backward pass.
        aux: ``[N, G * H]``, the layer's output; read by the two gradients only.
        layout: where the N rows lie. Every sequence has a token.
        epilogue: E, one of "tanh", "relu", "tanh_grad" ``z (1 - aux²)``, "relu_grad"
            ``z [aux > 0]``.
        reverse: for each group whether it walks from a sequence's last token to its first.
    """
    H = M.shape[1]
    if v_0 is not None:
        _add_initial(a, v_0, layout, reverse)
    apply, factor = _epilogue(epilogue, aux)
    with _one_thread() if layout.B * H * H < _ONE_THREAD_STEP else nullcontext():
        for g, backwards in enumerate(reverse):
            columns = slice(g * H, (g + 1) * H)
            _walk(
                a[:, columns],
                M[g].t().contiguous(),
                None if factor is None else factor[:, columns],
                layout,
                apply,
                backwards,
            )


def _add_initial(a: Tensor, v_0: Tensor, layout: SequenceLayout, reverse: Sequence[bool]) -> None:
    G, _, H = v_0.shape
    for g in range(G):
        rows = layout.last_rows if reverse[g] else layout.first_rows
        columns = slice(g * H, (g + 1) * H)
        if isinstance(rows, slice):
            a[rows, columns].add_(v_0[g])
        else:
            a[rows, columns] += v_0[g]


def _epilogue(epilogue: str, aux: Tensor | None) -> tuple[Callable, Tensor | None]:
    """The in-place E of one step, and what it needs of all steps at once."""
    if epilogue == "tanh":
        return lambda z, _: z.tanh_(), None
    if epilogue == "relu":
        return lambda z, _: z.relu_(), None
    assert aux is not None
    if epilogue == "tanh_grad":
        return torch.Tensor.mul_, torch.addcmul(aux.new_ones(()), aux, aux, value=-1)
    assert epilogue == "relu_grad", epilogue
    # Filled, not multiplied: an infinite gradient at a dead unit is still none.
    return lambda z, dead: z.masked_fill_(dead, 0), aux <= 0


def _walk(
    a: Tensor,
    Mt: Tensor,
    factor: Tensor | None,
    layout: SequenceLayout,
    apply: Callable,
    backwards: bool,
) -> None:
    in_order = layout.steps(a)
    factors: Sequence[Tensor | None] = [None] * layout.T if factor is None else layout.steps(factor)
    steps = in_order
    if backwards:
        steps, factors = steps[::-1], factors[::-1]
    previous = a[:0]
    for z, f in zip(steps, factors):
        # Sequences leave where lengths end, and join there in the other direction: whatever
        # joins starts from the v_0 that it already holds.
        before, now = len(previous), len(z)
        if before == now:
            z.addmm_(previous, Mt)
        elif before > now:
            z.addmm_(previous[:now], Mt)
        elif before > 0:
            z[:before].addmm_(previous, Mt)
        apply(z, f)
        previous = z
    if layout.offsets is not None:
        a.copy_(layout.join(in_order))


_thread_lock = threading.Lock()
_thread_users = 0
_thread_count = 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch's kernels on the calling thread.

    The number of threads is the process's, so concurrent users of this count themselves: the
    first one in notes it and the last one out puts it back.
    """
    global _thread_users, _thread_count
    with _thread_lock:
        if _thread_users == 0:
            _thread_count = torch.get_num_threads()
            if _thread_count > 1:
                torch.set_num_threads(1)
        _thread_users += 1
    try:
        yield
    finally:
        with _thread_lock:
            _thread_users -= 1
            if _thread_users == 0 and _thread_count > 1:
                torch.set_num_threads(_thread_count)
