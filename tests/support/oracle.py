"""The recurrence, token by token: slow, plain, and independent of the row map.

    s_t = E(a_t + M s_{t-1}, aux_t)      v_0 in place of M s_{t-1} at a sequence's first step

In float64 it is what every other implementation is held against. In a narrower dtype it rounds
wherever a loop of torch operators would, and its distance from float64 is the yardstick for theirs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

EPILOGUES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "tanh": lambda z, y: torch.tanh(z),
    "relu": lambda z, y: torch.relu(z),
    "tanh_grad": lambda z, y: z * (1 - y * y),
    "relu_grad": lambda z, y: torch.where(y > 0, z, 0),
}


def sequences(layout: SequenceLayout) -> list[list[int]]:
    """The rows of each sequence, from its first token to its last."""
    if isinstance(layout, RaggedLayout):
        bounds = zip(layout.batch_base.tolist(), layout.lengths.tolist())
        return [
            list(range(first, first + count * layout.stride, layout.stride))
            for first, count in bounds
        ]
    rows: list[list[int]] = [[] for _ in range(layout.B)]
    if layout.batch_sizes is not None:
        order = [b for size in layout.batch_sizes for b in range(size)]
    elif layout.batch_first:
        order = [b for b in range(layout.B) for _ in range(layout.T)]
    else:
        order = [b for _ in range(layout.T) for b in range(layout.B)]
    for row, b in enumerate(order):
        rows[b].append(row)
    return rows


def recurrence(
    a: Tensor,
    v_0: Tensor | None,
    M: Tensor,
    aux: Tensor | None,
    layout: SequenceLayout,
    *,
    epilogue: str,
    reverse: tuple[bool, ...],
    dtype: torch.dtype = torch.float64,
    operand: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """What ``tritonrnn.kernels.launch.recurrence`` writes over ``a``, in ``dtype``.

    ``operand`` is applied to both operands of every product: a rounding, for instance.
    """
    H = M.shape[-1]
    s = torch.full(a.shape, torch.nan, dtype=dtype, device=a.device)
    for b, rows in enumerate(sequences(layout)):
        for g, backwards in enumerate(reverse):
            columns = slice(g * H, (g + 1) * H)
            weight = operand(M[g].to(dtype))
            state = None
            for row in reversed(rows) if backwards else rows:
                z = a[row, columns].to(dtype)
                if state is not None:
                    z = z + weight @ operand(state)
                elif v_0 is not None:
                    z = (
                        (z.to(v_0.dtype) + v_0[g, b]).to(dtype)
                        if dtype != torch.float64
                        else z + v_0[g, b]
                    )
                y = None if aux is None else aux[row, columns].to(dtype)
                state = EPILOGUES[epilogue](z, y)
                s[row, columns] = state
    return s


def round_to_tf32(x: Tensor) -> Tensor:
    """Round to 10 fraction bits, ties away from zero."""
    fraction, exponent = torch.frexp(x.double())
    magnitude = torch.floor(fraction.abs() * 2**11 + 0.5) / 2**11
    return torch.copysign(torch.ldexp(magnitude, exponent), x.double()).to(x.dtype)
