"""What environment variables ask for, read when tritonrnn is imported.

Once, because every call asks, and to read a variable takes most of a microsecond.
"""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

Backend = Literal["auto", "triton", "torch"]
Mode = Literal["on", "verify", "off"]


def checked(name: str, source: str, literal: Any) -> Any:
    """Return a name that is to be one of a Literal's.

    Raises:
        ValueError: it is none of them. The message begins with the ``source``.
    """
    if name not in get_args(literal):
        raise ValueError(f"{source}: expected one of {get_args(literal)}, got {name!r}")
    return name


def _read(variable: str, default: str, literal: Any) -> Any:
    return checked(os.environ.get(variable) or default, variable, literal)


BACKEND: Backend = _read("TRITONRNN_BACKEND", "auto", Backend)
AUTOTUNE: Mode = _read("TRITONRNN_AUTOTUNE", "on", Mode)
