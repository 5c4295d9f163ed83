"""Draw a table of results. Each peer has one colour in all pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from perf.peers import BASELINE, PEERS

# Sharp enough to read, small enough to keep under version control.
DPI, COLOURS = 90, 256
# More facets on a side would be too small to read; the outermost and some between are shown.
MOST_FACETS = 3
# The first ten are filled; the others are strokes, which stay legible in the paler colours.
MARKERS = "osD^vPX*<>x+1234"
OURS = "tritonrnn"

# The columns that all points of a figure share.
FAMILY = [
    *("device", "mode", "nonlinearity", "layout", "lengths", "dtype", "fp32_mode"),
    *("layers", "directions"),
]


@dataclass(frozen=True)
class Picture:
    """Hold the path of a picture and its caption."""

    path: Path
    caption: str


def peer_style(peer: str) -> dict[str, object]:
    """Return the colour and the marker of a peer."""
    names = list(PEERS)
    place = names.index(peer) if peer in names else len(names) + sum(map(ord, peer)) % 7
    colour = mpl.colormaps["tab20"](place % 10 * 2 + place // 10)
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)]}


def draw(rows: pd.DataFrame, folder: Path) -> list[Picture]:
    """Draw every picture that the rows allow.

    Args:
        rows: Rows of the schema; those that are not ok are left out.
        folder: Folder for the files.

    Returns:
        The pictures that were drawn.
    """
    rows = rows[rows["status"] == "ok"].assign(
        us=rows["event_us_p50"].fillna(rows["wall_us_p50"]).astype(float)
    )
    rows["peer"] = rows["peer"].astype("string")
    pictures = []
    for key, family in rows.groupby(FAMILY, observed=True, sort=True):
        assert isinstance(key, tuple)
        title, stem = family_title(key), "-".join(str(part) for part in key if part != "none")
        for kind, make in _KINDS.items():
            figure = make(family, title)
            if figure is None:
                continue
            path = folder / f"{kind}-{stem.replace(':', '')}.png"
            save(figure, path)
            pictures.append(Picture(path, f"{_CAPTIONS[kind]}: {title}"))
    return pictures


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


def family_title(key: Sequence[object]) -> str:
    """Return in words what all rows of a family share."""
    device, mode, nonlinearity, layout, lengths, dtype, fp32_mode, layers, directions = key
    ragged = "" if layout == "padded" else f" ({lengths})"
    precision = dtype if fp32_mode == "none" else f"{dtype} {fp32_mode}"
    return (
        f"{mode}, {layout}{ragged}, {precision}, {nonlinearity}, "
        f"{layers} layer{'s' if layers != 1 else ''}, "
        f"{'both directions' if directions == 2 else 'one direction'}, {device}"
    )


def _time_name(rows: pd.DataFrame) -> str:
    return "GPU time" if rows["event_us_p50"].notna().any() else "wall time"


def by_case(family: pd.DataFrame, title: str) -> Figure:
    """Draw the speed-up of every case over nn.RNN, with its spread; one line a case."""
    cases = list(family.drop_duplicates("case_id").sort_values(["T", "B", "H", "I"])["case_id"])
    figure, axes = _figure(1, 1, width=8, height=1.5 + 0.36 * len(cases))
    ax = axes[0, 0]
    # The baseline is the line at 1.
    names = [name for name in peers_of(family) if name not in BASELINE.values()]
    for place, peer in enumerate(names):
        points = family[family["peer"] == peer].dropna(subset=["speedup_vs_nn"])
        offset = 0.6 * ((place + 0.5) / len(names) - 0.5)
        y = np.array([cases.index(case) for case in points["case_id"]]) + offset
        x = points["speedup_vs_nn"].to_numpy(float)
        low, high = (points[f"speedup_vs_nn_{q}"].to_numpy(float) for q in ("p10", "p90"))
        ax.errorbar(
            x,
            y,
            xerr=np.abs(np.stack([low - x, high - x])),
            fmt="none",
            ecolor=peer_style(peer)["color"],
            alpha=0.6,
        )
        ax.plot(x, y, linestyle="none", label=peer, **peer_style(peer))  # type: ignore[arg-type]
    ax.axvline(1, color="black", linewidth=0.8, label="nn.RNN")
    ax.set_xscale("log")
    _plain_log_ticks(ax, "x")
    ax.set_yticks(range(len(cases)), [_sizes(family, case) for case in cases])
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlabel("times as fast as nn.RNN (median and p10 to p90 over rounds; log scale)")
    ax.grid(axis="x", which="both", alpha=0.3)
    return _finish(figure, axes, title)


def _sizes(family: pd.DataFrame, case_id: str) -> str:
    row = family[family["case_id"] == case_id].iloc[0]
    return f"T {row['T']}, B {row['B']}, I {row['I']}, H {row['H']}"


def time_by_steps(family: pd.DataFrame, title: str) -> Figure | None:
    """Draw the time of a call against T, with the limit."""
    return _facets(
        family, title, x="T", y="us", x_name="T, steps",
        y_name=f"{_time_name(family)} of a call, us", limit="limit_us",
    )  # fmt: skip


def step_by_hidden(family: pd.DataFrame, title: str) -> Figure | None:
    """Draw the time of a step against H, with the limit."""
    steps = family.assign(limit_step_us=family["limit_us"] / family["T"].astype(float))
    return _facets(
        steps, title, x="H", y="us_per_step", x_name="H, hidden units",
        y_name=f"{_time_name(family)} of a step, us", limit="limit_step_us", columns="T",
    )  # fmt: skip


def memory_by_steps(family: pd.DataFrame, title: str) -> Figure | None:
    """Draw the memory saved for backward, or in inference the peak, against T."""
    kind = "peak_MiB" if (family["mode"] == "infer").all() else "saved_MiB"
    name = "most memory in use, MiB" if kind == "peak_MiB" else "saved for backward, MiB"
    # Some peers save nothing, and a logarithmic axis can't show 0.
    return _facets(family, title, x="T", y=kind, x_name="T, steps", y_name=name, from_zero=True)


def _facets(
    family: pd.DataFrame,
    title: str,
    *,
    x: str,
    y: str,
    x_name: str,
    y_name: str,
    limit: str | None = None,
    columns: str = "H",
    from_zero: bool = False,
) -> Figure | None:
    """Draw lines in facets, B down and ``columns`` across; return None if no facet has a line."""
    positive = family[family[y].notna()]
    lines = positive.groupby(["B", columns], observed=True)[x].nunique()
    if lines.empty or lines.max() < 2:
        return None
    across = _some(positive[columns])
    down = _some(positive["B"])
    figure, axes = _figure(
        len(down), len(across), width=3.4 * len(across) + 1.8, height=2.5 * len(down) + 1
    )
    for row, B in enumerate(down):
        for column, value in enumerate(across):
            ax = axes[row, column]
            here = positive[(positive["B"] == B) & (positive[columns] == value)]
            if here.empty:
                # No case has this B with that H or T.
                ax.set_axis_off()
                continue
            # Markers of different sizes, so that peers with equal values all stay visible.
            names = [name for name in peers_of(positive) if name != "nn_again"]
            for place, peer in enumerate(names):
                points = here[here["peer"] == peer].groupby(x, observed=True)[y].median()
                ax.plot(
                    points.index.astype(float),
                    points,
                    label=peer,
                    markersize=10 - 6 * place / len(names),
                    linewidth=3 - 2 * place / len(names),
                    **peer_style(peer),  # type: ignore[arg-type]
                )
            if limit is not None and here[limit].notna().any():
                bound = here.groupby(x, observed=True)[limit].median()
                ax.plot(bound.index.astype(float), bound, "k--", linewidth=1, label="limit (model)")
            ax.set_xscale("log", base=2)
            if from_zero:
                ax.set_ylim(bottom=0)
            else:
                ax.set_yscale("log")
                _plain_log_ticks(ax, "y")
            ticks = _usual(positive[x])
            ax.set_xlim(positive[x].min() / 1.2, positive[x].max() * 1.2)
            ax.xaxis.set_major_locator(FixedLocator(ticks))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.0f}"))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_title(f"B {B}, {columns} {value}", fontsize=9)
            ax.grid(which="both", alpha=0.3)
            if row == len(down) - 1:
                ax.set_xlabel(x_name)
            if column == 0:
                ax.set_ylabel(y_name, fontsize=8)
    return _finish(figure, axes, title)


def speedup_map(family: pd.DataFrame, title: str) -> Figure | None:
    """Draw tritonrnn's speed-up over nn.RNN over B and H, a map for each T."""
    values = family["speedup_vs_nn"]
    if values.notna().sum() == 0:
        return None
    widest = max(1.05, float(np.exp(np.abs(np.log(values.dropna())).max())))
    return _maps(
        family, title, "speedup_vs_nn", "times as fast as nn.RNN (log scale)", "RdBu",
        LogNorm(1 / widest, widest), lambda value: f"{value:.2f}",
    )  # fmt: skip


def limit_map(family: pd.DataFrame, title: str) -> Figure | None:
    """Draw the percentage of the limit that tritonrnn reaches, over B and H, a map for each T."""
    return _maps(
        family, title, "pct_of_limit", "% of the limit (model)", "viridis", Normalize(0, 100),
        lambda value: f"{value:.0f}",
    )  # fmt: skip


def _maps(
    family: pd.DataFrame,
    title: str,
    column: str,
    name: str,
    colours: str,
    norm: Normalize,
    text: Callable[[float], str],
) -> Figure | None:
    """Draw a heat map of a column for each T; return None if it would have one row or column."""
    ours = family[(family["peer"] == OURS) & family[column].notna()]
    if ours.empty:
        return None
    ours = ours[ours["T"].isin(_some(ours["T"]))]
    for axis in ("B", "H"):
        ours = ours[ours[axis].isin(_usual(ours[axis]))]
    if not (ours.groupby("T")[["B", "H"]].nunique() >= 2).all(axis=1).any():
        return None
    steps = sorted(ours["T"].unique())
    sequences, hidden = (sorted(ours[axis].unique()) for axis in ("B", "H"))
    figure, axes = _figure(1, len(steps), width=3.2 * len(steps) + 1.6, height=3.6)
    image = None
    for ax, T in zip(axes[0], steps):
        table = (
            ours[ours["T"] == T]
            .pivot_table(index="B", columns="H", values=column, aggfunc="median", observed=True)
            .reindex(index=sequences, columns=hidden)
        )
        image = ax.imshow(table.to_numpy(float), cmap=colours, norm=norm, aspect="auto")
        for i, j in np.ndindex(table.shape):
            value = float(table.iat[i, j])
            if np.isfinite(value):
                ax.text(
                    j, i, text(value), ha="center", va="center", fontsize=9,
                    color=_legible(image.cmap(image.norm(value))),
                )  # fmt: skip
        ax.set_xticks(range(len(hidden)), [str(H) for H in hidden])
        ax.set_yticks(range(len(sequences)), [str(B) for B in sequences])
        ax.set_title(f"T {T}", fontsize=9)
        ax.set_xlabel("H, hidden units")
    axes[0, 0].set_ylabel("B, sequences")
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes[0]), label=name)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    if isinstance(norm, LogNorm):
        _plain_log_ticks(bar.ax, "y")
    figure.suptitle(f"{OURS}: {title}", fontsize=10)
    return figure


def _legible(colour: tuple[float, ...]) -> str:
    """Return black or white, whichever is legible on a colour."""
    red, green, blue, *_ = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _usual(values: pd.Series) -> list[int]:
    """Return the values of an axis that many rows have; leave out the rare ones."""
    counts = values.astype(int).value_counts()
    return sorted(counts.index[counts >= counts.max() / 2])


def _some(values: pd.Series) -> list[int]:
    """Return the usual values of an axis, or the outermost and some between if they are many."""
    every = _usual(values)
    places = np.linspace(0, len(every) - 1, min(MOST_FACETS, len(every))).round().astype(int)
    return [every[place] for place in places]


def peers_of(rows: pd.DataFrame) -> list[str]:
    """Return the peers of some rows: the project's in their order, then the others."""
    found = set(rows["peer"])
    return [*(name for name in PEERS if name in found), *sorted(found - set(PEERS))]


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=False)


def _plain_log_ticks(ax: Axes, which: str) -> None:
    """Label a logarithmic axis with plain decimal numbers, also within a decade."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = sorted(ax.get_xlim() if which == "x" else ax.get_ylim())
    decades = np.log10(high / low)
    for most, subs in _TICKS:
        if decades <= most:
            axis.set_major_locator(LogLocator(subs=subs))
            break
    axis.set_major_formatter(
        FuncFormatter(lambda number, _: f"{number:,.0f}" if number >= 10 else f"{number:.3g}")
    )
    axis.set_minor_formatter(NullFormatter())


# The ticks of each decade, for axes of at most so many decades.
_TICKS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0.8, (1, 1.5, 2, 3, 4, 6, 8)),
    (1.7, (1, 2, 5)),
    (3.0, (1, 3)),
    (np.inf, (1,)),
)


def _finish(figure: Figure, axes: np.ndarray, title: str) -> Figure:
    """Add a title and one legend for all facets."""
    handles: dict[str, Artist] = {}
    for ax in axes.flat:
        found, names = ax.get_legend_handles_labels()
        handles |= dict(zip(names, found))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    return figure


_KINDS: dict[str, Callable[[pd.DataFrame, str], Figure | None]] = {
    "speedup": by_case,
    "time": time_by_steps,
    "step": step_by_hidden,
    "map": speedup_map,
    "limit": limit_map,
    "memory": memory_by_steps,
}
_CAPTIONS = {
    "speedup": "Speed-up over nn.RNN, case by case",
    "time": "Time of a call against T",
    "step": "Time of a step against H",
    "map": "Speed-up of tritonrnn over B and H; blank: not ok",
    "limit": "Per cent of the limit that tritonrnn reaches, over B and H; blank: not ok",
    "memory": "Memory against T",
}
