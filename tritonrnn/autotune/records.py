"""Records of trials: what each is of, what it says, and how it is written and read again."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_type_hints

from tritonrnn.kernels.plan import PLANS

# No time, and no error, is larger.
MOST = 1e12
# What identifies a device: name, limits, driver, versions, source.
Device = Mapping[str, str | int]
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Kernel:
    """What is compiled, as far as it can change the numbers: key of a record *right*.

    Args:
        plan: name of the plan.
        epilogue: "tanh", "relu", "tanh_grad" or "relu_grad", which names the pass too.
        dtype: "bf16", "fp16" or "fp32".
        tf32: whether fp32 products may round their operands to TF32.
        G, H: groups, and hidden units of a group.
        mapped: whether rows come from a row map, not from two strides.
        v_0: whether v_0 is given.
    """

    plan: str
    epilogue: str
    dtype: str
    tf32: bool
    G: int
    H: int
    mapped: bool
    v_0: bool

    def __str__(self) -> str:
        rows = ", mapped rows" if self.mapped else ""
        return (
            f"{self.epilogue}, {_arithmetic(self)}, G={self.G} H={self.H}{rows}"
            f"{', v_0' if self.v_0 else ''}"
        )


@dataclass(frozen=True)
class Shapes:
    """A class of calls that take about the same time by a plan: key of a record *fast*.

    Args:
        plan: name of the plan.
        nonlinearity: "tanh" or "relu".
        dtype, tf32, G, H, mapped: as of :class:`Kernel`.
        hx: whether initial states are given.
        ragged: whether torch's own kernels don't take the layout.
        training: whether the backward pass counts.
        T, B, I: steps, sequences and input size, rounded up to a power of two; T is 1024 at most,
            of many sequences fewer (``calls.py``).
        L: layers, 2 at most.
    """

    plan: str
    nonlinearity: str
    dtype: str
    tf32: bool
    G: int
    H: int
    mapped: bool
    hx: bool
    ragged: bool
    training: bool
    T: int
    B: int
    I: int  # noqa: E741 (the dimension key's)
    L: int

    def __str__(self) -> str:
        rows = ", ragged" if self.ragged else ", packed" if self.mapped else ""
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in "TBIHGL")
        return (
            f"{self.nonlinearity}, {_arithmetic(self)}, {sizes}{rows}{', hx' if self.hx else ''}, "
            f"{'training' if self.training else 'inference'}"
        )


def _arithmetic(key: Kernel | Shapes) -> str:
    return "tf32" if key.tf32 else key.dtype


Key = Kernel | Shapes
UNTIMED: Quartiles = (0.0, 0.0, 0.0)
# Of a trial that has no other yet.
STARTED = "started"
KINDS: dict[str, type[Any]] = {"right": Kernel, "fast": Shapes}
# Of files. Ties, and failures that pass, are not written.
VERDICTS = {"right": ("right", "wrong", "failed"), "fast": ("faster", "slower", "failed")}


@dataclass(frozen=True)
class Record:
    """What a trial found.

    Args:
        key: of what.
        verdict: of a kernel "right", "wrong" or "failed"; of shapes "faster", "slower", "tie" or
            "failed".
        reason: why, in one line.
        seconds: that the trial took.
        error: of a kernel, the largest error in any result, as a share of what is allowed.
        plan_us, other_us: of shapes, the quartiles of the time of a call by the plan, and by what
            it was timed against; all 0 where that failed.
        against: the path or plan that it was timed against, or "".
        host, pid, when: where and when, in seconds since 1970.
    """

    key: Key
    verdict: str
    reason: str
    seconds: float
    error: float = 0.0
    plan_us: Quartiles = UNTIMED
    other_us: Quartiles = UNTIMED
    against: str = ""
    host: str = ""
    pid: int = 0
    when: float = 0.0

    @property
    def kind(self) -> str:
        """Return "right" or "fast"."""
        return "right" if isinstance(self.key, Kernel) else "fast"

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        return f"{self.cause} for {self.key}; {when} on {self.host}"

    @property
    def cause(self) -> str:
        """Return what was found."""
        plan = f"the plan {self.key.plan}"
        if self.verdict == "wrong":
            return f"{plan} computes wrong numbers ({self.reason})"
        if self.verdict == "failed":
            return f"{plan} failed in its trial ({self.reason})"
        if self.verdict == "right":
            return f"{plan} is right ({self.reason})"
        return f"{plan} is {self.verdict} ({self.reason})"

    def signed(self) -> Record:
        """Return the record as of this process and now."""
        return replace(self, host=socket.gethostname(), pid=os.getpid(), when=time.time())

    def to_json(self, device: Device) -> str:
        """Return all of it, and the device that it is of, as a line of JSON."""
        return json.dumps({"device": dict(device), "kind": self.kind, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> tuple[Device, Record]:
        """Return the device and the record of :meth:`to_json`.

        Raises:
            ValueError: any of it is not what is written there.
        """
        try:
            content = json.loads(text)
            device, kind = content.pop("device"), content.pop("kind")
            key = _checked(KINDS[kind], content.pop("key"))
            record: Record = _checked(cls, {"key": key, **content})
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError("not a record") from error
        if key.plan not in PLANS or record.verdict not in (*VERDICTS[kind], STARTED):
            raise ValueError(f"Unknown plan or verdict: {key.plan}, {record.verdict}")
        if not isinstance(device, dict) or not all(map(_is_plain, device.values())):
            raise ValueError(f"Unknown device: {device}")
        return device, record

    def row(self, device: Device) -> dict[str, Any]:
        """Return it as a row of a table."""
        row = {"kind": self.kind, "verdict": self.verdict, **asdict(self.key)}
        for name in ("reason", "against", "seconds", "host", "pid", "when"):
            row[name] = getattr(self, name)
        row["error"] = self.error if isinstance(self.key, Kernel) else math.nan
        for name in ("plan_us", "other_us"):
            for percentile, us in zip(("p25", "p50", "p75"), getattr(self, name)):
                row[f"{name}_{percentile}"] = us or math.nan
        return row | {f"device_{name}": value for name, value in device.items()}


def _checked(cls: type[Any], content: dict[str, Any]) -> Any:
    """Return a dataclass made of JSON.

    Raises:
        ValueError: a field is missing, unknown or of another type, or no number in range.
    """
    hints = get_type_hints(cls)
    if set(content) != set(hints):
        raise ValueError(f"Expected the fields {set(hints)}, got {set(content)}")
    made = {}
    for name, value in content.items():
        hint = hints[name]
        if hint == Quartiles:
            value = tuple(value)
            is_valid = (
                len(value) == 3 and all(map(_is_time, value)) and list(value) == sorted(value)
            )
        elif hint is float:
            is_valid = _is_time(value)
        else:
            is_valid = isinstance(value, hint) and (type(value) is not bool or hint is bool)
        if not is_valid:
            raise ValueError(f"{name}: unexpected {value!r}")
        made[name] = value
    return cls(**made)


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer of JSON may be too large for a float. No NaN is in the range.
    return is_number and 0 <= value <= MOST


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int))
