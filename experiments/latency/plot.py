"""The picture of `experiments.latency`: time against the plain network's, a panel a batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.latency.strategies import is_stream
from experiments.report.plots import COLOURS, FAINT, INK, STYLE

# Upper end of a panel, in times of the plain network.
HIGHEST = 2.0
# The baseline is grey; a strategy's colour does not depend on which others were timed.
_LOOKS = {
    "full": FAINT,
    **dict(zip(("cond", "compact", "loop", "host", "stream", "auto"), COLOURS, strict=True)),
}


def _colours(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each strategy; those with tiles in their names take the first free colours."""
    names = {row["strategy"] for row in rows}
    looks = {name: colour for name, colour in _LOOKS.items() if name in names}
    tiled = sorted(names - set(looks))
    free = [c for c in COLOURS if c not in looks.values()] or list(COLOURS)
    return looks | {name: free[i % len(free)] for i, name in enumerate(tiled)}


def latency(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of `ms / plain_best_ms` by distribution and strategy, the ideal as a tick across a bar.

    Args:
      rows: of `rows.measured`.

    Raises:
      ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("no row to draw: give at least one.")
    groups, looks = _grouped(rows), _colours(rows)
    columns = min(len(groups), 2)
    lines = math.ceil(len(groups) / columns)
    with matplotlib.rc_context(STYLE):
        size = (5.6 * columns, 1.0 + 2.8 * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).flat
        for i, axes in enumerate(grid):
            if i >= len(groups):
                axes.remove()
                continue
            _panel(axes, groups[i], looks)
        figure.supylabel("time / the plain network's at its best")
        keys: list[Any] = [Patch(color=c, label=name) for name, c in looks.items()]
        keys += [
            Line2D([], [], color=INK, linewidth=2, label="ideal"),
            Line2D([], [], color=INK, linewidth=0.9, linestyle="--", label="plain network"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=min(8, len(keys)))
    return figure


def milliseconds(value: float) -> str:
    """A time in words: three digits, or whole milliseconds."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _grouped(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows by batch size, those of a stream apart."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["batch"], is_stream(row["strategy"])), []).append(row)
    return list(groups.values())


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, str]) -> None:
    """One batch size: a group of bars a distribution."""
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    strategies = [name for name in looks if any(row["strategy"] == name for row in rows)]
    width = 0.84 / max(len(strategies), 4)
    # One slow strategy must not flatten the others; what is cut off is written above its bar.
    top = 1.08 * min(HIGHEST, max(1.0, *(row["ms"] / row["plain_best_ms"] for row in rows)))
    for row in rows:
        place = strategies.index(row["strategy"]) - (len(strategies) - 1) / 2
        x = distributions.index(row["distribution"]) + place * width
        plain = row["plain_best_ms"]
        height = row["ms"] / plain
        axes.bar(x, height, 0.9 * width, color=looks[row["strategy"]])
        if height > top:
            axes.annotate(f"{height:.1f}", (x, top), ha="center", va="bottom", fontsize=7)
        ends = (x - 0.45 * width, x + 0.45 * width)
        axes.hlines(row["ideal_best_ms"] / plain, *ends, color=INK, linewidth=2)
    axes.axhline(1, color=INK, linewidth=0.9, linestyle="--", zorder=1)
    count = f"{rows[0]['batch']:,} images" if rows[0]["batch"] > 1 else "1 image"
    streamed = "a stream of " if all(map(is_stream, strategies)) else ""
    plain = milliseconds(rows[0]["plain_best_ms"])
    axes.set_title(f"{streamed}{count}; plain network {plain} ms", pad=14)
    axes.set_xticks(np.arange(len(distributions)), distributions)
    axes.set_xlim(-0.5, len(distributions) - 0.5)
    axes.set_ylim(0, top)
    axes.grid(visible=False, axis="x")
