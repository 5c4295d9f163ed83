"""The Elman recurrence written out, and how far from it a result may be."""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor


def elman(
    sequence: Tensor,
    hx: Tensor,
    weights: list[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """One sequence ``[T, I]``, one token at a time: ``([T, D * H], [num_layers * D, H])``.

    h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    ``hx`` is ``[num_layers * D, H]`` and ``weights`` are in torch.nn.RNN's parameter order.
    """
    activation = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (num_layers * directions)
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, *biases = weights[index * per_direction : (index + 1) * per_direction]
            state = hx[index]
            steps = range(len(sequence))
            walked = {}
            for t in reversed(steps) if direction else steps:
                state = activation(w_ih @ sequence[t] + w_hh @ state + sum(biases))
                walked[t] = state
            outputs.append(torch.stack([walked[t] for t in steps]))
            last.append(state)
        sequence = torch.cat(outputs, dim=1)
    return sequence, torch.stack(last)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Distance in the 2-norm, relative to ``exact``."""
    exact = exact.double()
    return ((got.double() - exact).norm() / exact.norm()).item() if exact.norm() else 0.0


def assert_as_accurate(
    got: list[Tensor], theirs: list[Tensor], exact: list[Tensor], name: str = "result"
) -> None:
    """Each of ``got`` is about as close to ``exact`` (float64) as ``theirs``, torch.nn.RNN's, is.

    The median of its errors may be twice that of theirs, and one unit in the last place (32 in
    float64, where the written-out recurrence is no more exact than either). Several draws of a
    problem are for relu in low precision: a unit that rounding moves across 0 changes a gradient
    by far more than rounding does, on either side.
    """
    for one, other in zip(got, theirs):
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        assert one.isfinite().all(), name
    eps = torch.finfo(got[0].dtype).eps
    floor = 32 * eps if got[0].dtype == torch.float64 else eps
    error, reference = (
        median(relative_error(one, truth) for one, truth in zip(results, exact))
        for results in (got, theirs)
    )
    allowed = 2 * reference + floor
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
