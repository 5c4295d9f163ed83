"""Define the columns of a table of results: the meaning, type and unit of each.

What can be computed from other columns is computed here, when rows are read, and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from pandas.api.types import pandas_dtype

from perf.bench.cases import DTYPES, LAYOUTS, LENGTHS, MODES
from perf.peers import PEERS

STATUSES = ("ok", "wrong", "oom", "unsupported", "error", "timeout", "skipped")


class Column(NamedTuple):
    """Describe one column.

    Attributes:
        kind: "text", "int", "float", or the ordered values of a category.
        unit: "" for a name or a count.
        meaning: "" for that of the column above.
    """

    name: str
    kind: str | tuple[str, ...]
    unit: str
    meaning: str


def _quantiles(name: str, unit: str, meaning: str) -> list[Column]:
    meanings = {"p10": meaning, "p50": "", "p90": ""}
    return [Column(f"{name}_{key}", "float", unit, text) for key, text in meanings.items()]


COLUMNS = (
    Column("case_id", "text", "", "everything that names the case but its device"),
    Column("run_id", "text", "", "when the run began, in UTC; env.json has its facts"),
    Column("peer", tuple(PEERS), "", "which implementation ran it"),
    Column("mode", MODES, "", "infer, fwd (keeping what backward needs), bwd, fwdbwd (training)"),
    Column("T", "int", "steps", "of the longest sequence"),
    Column("B", "int", "sequences", ""),
    Column("I", "int", "features", "of the input"),
    Column("H", "int", "units", "hidden, each direction"),
    Column("layers", "int", "", ""),
    Column("directions", "int", "", "1 or 2"),
    Column("nonlinearity", ("tanh", "relu"), "", ""),
    Column("layout", LAYOUTS, "", "(T, B, I), PackedSequence, nested, with lengths=, RNNCell loop"),
    Column("lengths", LENGTHS, "", "how the lengths of a ragged batch spread"),
    Column("dtype", tuple(DTYPES), "", "of input, weights and results"),
    Column("fp32_mode", ("tf32", "ieee", "none"), "", "products of fp32; none for other dtypes"),
    Column("device", "text", "", "as torch names it"),
    Column("status", STATUSES, "", "ok rows alone have times"),
    Column("error", "text", "", "why the status is not ok"),
    Column("note", "text", "", "a remark on an ok row"),
    Column("max_rel_err", "float", "", "against float64: largest of all results and gradients"),
    Column("tolerance", "float", "", "largest max_rel_err that is right: twice that of nn.RNN"),
    *_quantiles("event_us", "us", "GPU: time between events, L2 flushed; over rounds"),
    *_quantiles("graph_us", "us", "GPU: the same of a CUDA graph that replays the call"),
    *_quantiles("wall_us", "us", "wall time of a call, calls back to back"),
    *_quantiles("us", "us", "the time that counts: event_us on a GPU, wall_us on a CPU"),
    Column("us_per_step", "float", "us", "us_p50 by T"),
    Column("n_samples", "int", "", "rounds"),
    Column("compile_s", "float", "s", "first run, with building, compiling and tuning"),
    Column("event_floor_us", "float", "us", "event_us of a kernel that does nothing"),
    Column("peak_MiB", "float", "MiB", "most memory that the call added"),
    Column("saved_MiB", "float", "MiB", "alive between forward and backward, results left out"),
    Column("flop", "float", "FLOP", "model: of the call"),
    Column("min_bytes", "float", "B", "model: to move at least"),
    Column("compute_us", "float", "us", "model: flop at the device's rate"),
    Column("hbm_us", "float", "us", "model: min_bytes at the device's bandwidth"),
    Column("serial_us", "float", "us", "model: the chain of steps"),
    Column("limit_us", "float", "us", "model: the largest of the three"),
    Column("limit_kind", ("compute", "memory", "serial"), "", "model: which it is"),
    Column("limit_strategy", "text", "", "model: what sets the chain"),
    Column("limit_constants", ("published", "measured"), "", "model: where its constants are from"),
    Column("plan", "text", "", "the plan by which the peer ran it"),
    Column("tflops", "float", "TFLOP/s", "flop by us_p50"),
    Column("gbps", "float", "GB/s", "min_bytes by us_p50"),
    Column("pct_of_limit", "float", "%", "limit_us by us_p50"),
    Column("speedup_vs_nn", "float", "", "nn.RNN's time by this one's, within a round; median"),
    Column("speedup_vs_nn_p10", "float", "", ""),
    Column("speedup_vs_nn_p90", "float", "", ""),
    Column("sm_MHz", "float", "MHz", "clock of the multiprocessors, median while timing"),
    Column("power_W", "float", "W", "median while timing"),
    Column("temp_C", "float", "°C", "median while timing"),
)
NAMES = tuple(column.name for column in COLUMNS)

# The columns that identify a cell.
KEYS = ["case_id", "device", "peer", "mode"]
# Those that the cells of all peers share which are timed in the same rounds.
SHARED_KEYS = ["case_id", "device", "mode"]

_DTYPES = {"text": "string", "int": "Int64", "float": "float64"}


def typed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with every column of the schema, in its order and type, the derived ones too.

    In the category of peers, peers of a user's own come after those of the project.
    """
    rows = rows.reindex(columns=[*NAMES, *(name for name in rows if name not in NAMES)])
    for name, kind, *_ in COLUMNS:
        if isinstance(kind, str):
            rows[name] = rows[name].astype(pandas_dtype(_DTYPES[kind]))
        else:
            categories = [*kind, *sorted(set(rows[name].dropna()) - set(kind))]
            rows[name] = pd.Categorical(rows[name], categories, ordered=True)
    for quantile in ("p10", "p50", "p90"):
        rows[f"us_{quantile}"] = rows[f"event_us_{quantile}"].fillna(rows[f"wall_us_{quantile}"])
    us = rows["us_p50"]
    return rows.assign(
        us_per_step=us / rows["T"].astype("float64"),
        tflops=rows["flop"] / us / 1e6,
        gbps=rows["min_bytes"] / us / 1e3,
        pct_of_limit=100 * rows["limit_us"] / us,
    )


def document() -> str:
    """Return the schema as a markdown table; a column without a meaning has the one above."""
    table = pd.DataFrame(COLUMNS, columns=["column", "type", "unit", "meaning"])
    table["column"] = "`" + table["column"] + "`"
    table["type"] = [kind if isinstance(kind, str) else "category" for kind in table["type"]]
    return table.to_markdown(index=False)
