"""The oracle of the kernels: ``perf.bench.oracle.scan`` over the rows of a layout's sequences."""

from collections.abc import Callable

import torch
from torch import Tensor

from perf.bench.oracle import EPILOGUES as EPILOGUES
from perf.bench.oracle import scan
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout


def sequences(layout: SequenceLayout) -> list[list[int]]:
    """Return the rows of each sequence, from its first token to its last."""
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
    """Return what ``tritonrnn.kernels.launch.recurrence`` writes over ``a``, in ``dtype``.

    v_0 takes the place of M s_{t-1} at the first step of a sequence. In a narrow dtype it rounds
    wherever a loop of torch operators would; its distance from float64 is then the yardstick for
    the kernels. Rows of no sequence are 0.
    """
    H = M.shape[-1]
    s = torch.zeros(a.shape, dtype=dtype, device=a.device)
    for b, rows in enumerate(sequences(layout)):
        for g, backwards in enumerate(reverse if rows else ()):
            columns = slice(g * H, (g + 1) * H)
            order = rows[::-1] if backwards else rows
            steps = list(a[order, columns].to(dtype))
            if v_0 is not None:
                # Added in the dtype of v_0, which only float64 exceeds.
                wide = torch.promote_types(dtype, v_0.dtype)
                steps[0] = (steps[0].to(wide) + v_0[g, b]).to(dtype)
            y = None if aux is None else aux[order, columns].to(dtype)
            states, _ = scan(steps, M[g].to(dtype), None, epilogue, y, operand=operand)
            s[order, columns] = torch.stack(states)
    return s


def round_to_tf32(x: Tensor) -> Tensor:
    """Round to 10 fraction bits, ties away from zero."""
    fraction, exponent = torch.frexp(x.double())
    magnitude = torch.floor(fraction.abs() * 2**11 + 0.5) / 2**11
    return torch.copysign(torch.ldexp(magnitude, exponent), x.double()).to(x.dtype)
