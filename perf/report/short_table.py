"""Show where a call over a short sequence on a CPU is slower than torch.nn.RNN's."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from perf.report import summary

# A cell whose speed-up is at least this is not slower.
LEAST_SPEEDUP = 0.95
_LINE = ["layout", "mode", "B", "H", "directions"]


def judge(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of the preset ``short`` on the CPU that are among rows.

    Returns:
        The rows, with ``noise``, the median speed-up of nn.RNN against itself, and ``slower``:
        whether ``speedup_vs_nn`` is below ``LEAST_SPEEDUP`` and below the noise.
    """
    cells, _ = summary.cells_of_preset(rows, "short")
    cells = summary.with_noise(cells, rows, noise="speedup_vs_nn")
    # Where nn.RNN against itself is not known, there is no noise to hide in.
    limit = cells["noise"].fillna(1.0).clip(upper=LEAST_SPEEDUP)
    return cells.assign(slower=cells["speedup_vs_nn"] < limit)


def paragraphs(rows: pd.DataFrame) -> Iterator[str]:
    """Yield a table of the cells, those in bold that are slower, and a sentence with their number.

    The rows of the table are what a call is of; its columns are the steps T.
    """
    cells = judge(rows).astype({"mode": "string"})
    timed = cells[cells["speedup_vs_nn"].notna()]
    if timed.empty:
        yield "No short sequence was timed beside nn.RNN."
        return
    yield (
        "nn.RNN's time (nn.RNNCell's of a cell) by tritonrnn's, median over the rounds, by T. In "
        f"bold where it is slower: below {LEAST_SPEEDUP}, and below nn.RNN's against itself."
    )
    shown = cells["speedup_vs_nn"].map("{:.2f}".format)
    shown = shown.mask(cells["slower"], "**" + shown + "**")
    shown = shown.where(cells["speedup_vs_nn"].notna(), cells["status"].astype("string"))
    table = cells.assign(shown=shown).pivot(index=_LINE, columns="T", values="shown")
    table = table.sort_index().fillna("").rename(columns="T {}".format)
    yield table.reset_index().to_markdown(index=False, disable_numparse=True)
    noise = timed["noise"]
    yield (
        f"{timed['slower'].sum()} of {len(timed)} cells are slower, the worst at "
        f"{timed['speedup_vs_nn'].min():.2f}. nn.RNN against itself is below {LEAST_SPEEDUP} in "
        f"{(noise < LEAST_SPEEDUP).sum()}, from {noise.min():.2f} to {noise.max():.2f}."
    )
