"""Judge whether two trainings agree, by how far one drifts from itself after a rounding error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two runs that differ by rounding alone drift apart at the same rate; only their first differences
# are random. On the CPU, three other perturbations of nn.RNN and a recurrence written by hand
# stayed within 7 times the twin's drift, at learning rates of 2e-3 (no growth), 5e-3 and 1e-2 (up
# to 2e-1). With a wrong gradient, the drift is thousands of times the twin's within a few steps.
ALLOWED_DRIFTS = 10.0

# The difference of two losses before any training, in units of the last place.
ALLOWED_ULPS = 8.0


@dataclass(frozen=True)
class Comparison:
    """Hold how a candidate's losses compare with a reference's, step by step.

    Attributes:
        agrees: Whether the candidate drifts no further than rounding explains.
        drift: Largest difference of the candidate's loss from the reference's.
        twin_drift: The same for the reference's twin.
        first_departure: First step at which the candidate is further off than rounding explains.
    """

    agrees: bool
    drift: float
    twin_drift: float
    first_departure: int | None

    def __str__(self) -> str:
        drifts = (
            f"tritonrnn.RNN is at most {self.drift:.1e} from torch.nn.RNN, which is at most "
            f"{self.twin_drift:.1e} from its twin that starts one unit in the last place away"
        )
        if self.agrees:
            return f"The loss curves agree: {drifts}."
        return f"The loss curves DISAGREE from step {self.first_departure} on: {drifts}."


def compare(
    reference: Sequence[float], twin: Sequence[float], candidate: Sequence[float]
) -> Comparison:
    """Judge a candidate's loss curve by the drift of a reference from its own twin.

    At every step the candidate may be off by ``ALLOWED_DRIFTS`` times the furthest that the twin
    has been so far, plus ``ALLOWED_ULPS`` units in the last place of the loss.

    Args:
        reference: Loss at each step.
        twin: Losses of the same training, started one unit in the last place away.
        candidate: Losses of the training to judge.

    Raises:
        ValueError: The curves differ in length.
    """
    base, *others = np.array([reference, twin, candidate], dtype=np.float64)
    twin_drift, drift = np.abs(np.array(others) - base)
    twin_drift = np.maximum.accumulate(twin_drift)
    ulp = np.spacing(np.abs(base).astype(np.float32)).astype(np.float64)
    # Negated, so that a NaN on either side is a departure.
    departs = ~(drift <= ALLOWED_DRIFTS * twin_drift + ALLOWED_ULPS * ulp)
    first = int(np.argmax(departs)) if departs.any() else None
    return Comparison(first is None, float(drift.max()), float(twin_drift.max()), first)
