"""Measure tritonrnn against its peers: run ``python -m perf`` from a checkout.

In a notebook, ``perf.load("perf/results/...")`` reads the rows of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perf.report.tables import load as load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    # Imported at first use, because a worker process does not need pandas.
    if name == "load":
        from perf.report import tables

        return tables.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
