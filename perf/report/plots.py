"""Draw a table of results. Each peer has one colour in all pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from perf.peers import BASELINE, OURS, PEERS

# Sharp enough to read, small enough to keep under version control.
DPI, COLOURS = 90, 256
# More facets on a side would be too small to read; the outermost and some between are shown.
MOST_FACETS = 3
# The first ten are filled; the others are strokes, which stay legible in the paler colours.
MARKERS = "osD^vPX*<>x+1234"

# The columns that all points of a figure share.
FAMILY = [
    *("device", "mode", "nonlinearity", "layout", "lengths", "dtype", "fp32_mode"),
    *("layers", "directions"),
]

CAPTIONS = {
    "speedup": "Speed-up over nn.RNN, case by case",
    "time": "Time of a call against T",
    "step": "Time of a step against H",
    "map": f"Speed-up of {OURS} over B and H; blank: not ok",
    "limit": f"Per cent of the limit that {OURS} reaches, over B and H; blank: not ok",
    "memory": "Memory against T",
}


def draw(rows: pd.DataFrame, folder: Path) -> dict[str, str]:
    """Draw every picture that the rows allow.

    Args:
        rows: Rows of the schema; those that are not ok are left out.
        folder: Folder for the files.

    Returns:
        The caption of each picture by the name of its file.
    """
    captions = {}
    for title, stem, family in families(rows):
        for kind, figure in _figures(family).items():
            if figure is not None:
                figure.suptitle(title, fontsize=10)
                name = f"{kind}-{stem}.png"
                save(figure, folder / name)
                captions[name] = f"{CAPTIONS[kind]}: {title}"
    return captions


def families(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield what some ok rows share, in words and as a name for files, and these rows."""
    timed = rows[rows["status"] == "ok"]
    for key, family in timed.groupby(FAMILY, observed=True, sort=True):
        assert isinstance(key, tuple)
        stem = "-".join(str(part) for part in key if part != "none").replace(":", "")
        yield _title(key), stem, family


def _figures(family: pd.DataFrame) -> dict[str, Figure | None]:
    """Return a figure of each kind, or None where too few sizes were measured for it."""
    family = family.assign(limit_step_us=family["limit_us"] / family["T"].astype(float))
    time, step = "time of a call, us", "time of a step, us"
    saved, peak = ("saved_MiB", "saved for backward, MiB"), ("peak_MiB", "most memory in use, MiB")
    memory = peak if (family["mode"] == "infer").all() else saved
    widest = max(1.05, float(np.exp(np.abs(np.log(family["speedup_vs_nn"])).max())))
    speedup, limit = f"{OURS}: times as fast as nn.RNN", f"{OURS}: % of the limit (model)"
    ratios, percents = LogNorm(1 / widest, widest), Normalize(0, 100)
    return {
        "speedup": _by_case(family),
        "time": _lines(family, "T", "us_p50", time, limit="limit_us"),
        "step": _lines(family, "H", "us_per_step", step, limit="limit_step_us"),
        "map": _maps(family, "speedup_vs_nn", speedup, "RdBu", ratios, "{:.2f}"),
        "limit": _maps(family, "pct_of_limit", limit, "viridis", percents, "{:.0f}"),
        "memory": _lines(family, "T", *memory),
    }


def save(figure: Figure, path: Path) -> None:
    """Write a picture with a palette, which takes a fraction of the bytes.

    An octree keeps colours that few pixels have, such as those of a colour bar; a median cut does
    not.
    """
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def _title(key: Sequence[object]) -> str:
    device, mode, nonlinearity, layout, lengths, dtype, fp32_mode, layers, directions = key
    ragged = "" if layout == "padded" else f" ({lengths})"
    precision = dtype if fp32_mode == "none" else f"{dtype} {fp32_mode}"
    return (
        f"{mode}, {layout}{ragged}, {precision}, {nonlinearity}, "
        f"{layers} layer{'s' if layers != 1 else ''}, "
        f"{'both directions' if directions == 2 else 'one direction'}, {device}"
    )


def peers_of(rows: pd.DataFrame) -> list[str]:
    """Return the peers of some rows: the project's in their order, then the others."""
    return list(rows["peer"].cat.remove_unused_categories().cat.categories)


def _by_case(family: pd.DataFrame) -> Figure:
    """Draw the speed-up of every case over nn.RNN, with its spread; one line a case."""
    family = family.sort_values(["T", "B", "H", "I"])
    cases = family.drop_duplicates("case_id")
    places = pd.Series(range(len(cases)), index=cases["case_id"])
    figure = Figure((8, 1.5 + 0.36 * len(cases)), layout="constrained")
    ax = figure.subplots()
    # The baseline is the line at 1.
    names = [name for name in peers_of(family) if name not in BASELINE.values()]
    for place, peer in enumerate(names):
        points = family[family["peer"] == peer].dropna(subset=["speedup_vs_nn"])
        median, low, high = (
            points[f"speedup_vs_nn{quantile}"].to_numpy(float) for quantile in ("", "_p10", "_p90")
        )
        ax.errorbar(
            median,
            places[points["case_id"]] + 0.6 * ((place + 0.5) / len(names) - 0.5),
            xerr=np.abs(np.stack([low - median, high - median])),
            linestyle="none",
            label=peer,
            **_style(peer),
        )
    ax.axvline(1, color="black", linewidth=0.8, label="nn.RNN")
    ax.set_xscale("log")
    _plain_ticks(ax.xaxis)
    sizes = [f"T {T}, B {B}, I {I}, H {H}" for T, B, I, H in cases[["T", "B", "I", "H"]].values]  # noqa: E741
    ax.set_yticks(range(len(cases)), sizes)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlabel("times as fast as nn.RNN (median and p10 to p90 over rounds; log scale)")
    ax.grid(axis="x", which="both", alpha=0.3)
    return _with_legend(figure, [ax])


def _lines(
    family: pd.DataFrame, x: str, y: str, y_name: str, limit: str | None = None
) -> Figure | None:
    """Draw a line a peer in facets, B down, H or T across; return None if no facet has a line.

    Only with a limit is y logarithmic: some peers save no memory, and that axis can't show 0.
    """
    across = "H" if x == "T" else "T"
    family = family[family[y].notna()]
    lines = family.groupby(["B", across], observed=True)[x].nunique()
    if lines.empty or lines.max() < 2:
        return None
    rows, columns = _some(family["B"]), _some(family[across])
    size = (3.4 * len(columns) + 1.8, 2.5 * len(rows) + 1)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    # Markers of different sizes, so that peers with equal values all stay visible.
    names = [name for name in peers_of(family) if name != "nn_again"]
    for (i, j), ax in np.ndenumerate(grid):
        here = family[(family["B"] == rows[i]) & (family[across] == columns[j])]
        if here.empty:
            # No case has this B with that H or T.
            ax.set_axis_off()
            continue
        for place, peer in enumerate(names):
            points = here[here["peer"] == peer].groupby(x)[y].median().astype(float)
            thickness = {"ms": 10 - 6 * place / len(names), "lw": 3 - 2 * place / len(names)}
            ax.plot(points, label=peer, **_style(peer), **thickness)
        if limit is not None:
            ax.set_yscale("log")
            _plain_ticks(ax.yaxis)
            if here[limit].notna().any():
                bound = here.groupby(x)[limit].median().astype(float)
                ax.plot(bound, "k--", lw=1, label="limit (model)")
        else:
            ax.set_ylim(bottom=0)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_title(f"B {rows[i]}, {across} {columns[j]}", fontsize=9)
        ax.grid(alpha=0.3)
    for ax in grid[-1]:
        ax.set_xlabel(x)
    for ax in grid[:, 0]:
        ax.set_ylabel(y_name, fontsize=8)
    return _with_legend(figure, list(grid.flat))


def _maps(
    family: pd.DataFrame, column: str, name: str, colours: str, norm: Normalize, text: str
) -> Figure | None:
    """Draw a heat map of a column for each T; return None if it would have one row or column."""
    ours = family[(family["peer"] == OURS) & family[column].notna()]
    if not (ours.groupby("T")[["B", "H"]].nunique() >= 2).all(axis=1).any():
        return None
    steps, sequences, hidden = _some(ours["T"]), _usual(ours["B"]), _usual(ours["H"])
    figure = Figure((3.2 * len(steps) + 1.6, 3.6), layout="constrained")
    [axes] = figure.subplots(1, len(steps), squeeze=False)
    for ax, T in zip(axes, steps):
        table = ours[ours["T"] == T].pivot_table(
            index="B", columns="H", values=column, aggfunc="median"
        )
        table = table.reindex(index=sequences, columns=hidden).astype(float)
        image = ax.imshow(table, cmap=colours, norm=norm, aspect="auto")
        outline = [patheffects.withStroke(linewidth=2, foreground="white")]
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                words = text.format(value)
                ax.text(j, i, words, ha="center", va="center", size=9, path_effects=outline)
        ax.set_xticks(range(len(hidden)), hidden)
        ax.set_yticks(range(len(sequences)), sequences)
        ax.set_title(f"T {T}", fontsize=9)
        ax.set(xlabel="H, hidden units", ylabel="B, sequences")
    bar = figure.colorbar(image, ax=axes, label=name)
    if isinstance(norm, LogNorm):
        _plain_ticks(bar.ax.yaxis)
    return figure


def _style(peer: str) -> dict[str, Any]:
    """Return the colour and the marker of a peer."""
    names = list(PEERS)
    place = names.index(peer) if peer in names else len(names) + sum(map(ord, peer)) % 7
    colour = mpl.colormaps["tab20"](place % 10 * 2 + place // 10)
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)]}


def _usual(values: pd.Series) -> list[int]:
    """Return the values of an axis that many rows have; leave out the rare ones."""
    counts = values.astype(int).value_counts()
    return sorted(counts.index[counts >= counts.max() / 2])


def _some(values: pd.Series) -> list[int]:
    """Return the usual values of an axis, or the outermost and some between if they are many."""
    every = _usual(values)
    places = np.linspace(0, len(every) - 1, min(MOST_FACETS, len(every))).round().astype(int)
    return [every[place] for place in places]


class PlainLogFormatter(LogFormatter):
    """Label a logarithmic axis with plain numbers, within a decade too."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick; "" for those that would be too many."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain_ticks(axis: Axis) -> None:
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(PlainLogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))


def _with_legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """Add one legend for all facets."""
    entries = [zip(*reversed(ax.get_legend_handles_labels())) for ax in axes]
    handles = {name: handle for of_one in entries for name, handle in of_one}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure
