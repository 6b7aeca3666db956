"""The pictures: pure functions from numbers to Matplotlib figures.

Every function builds a `matplotlib.figure.Figure` and returns it. Nothing goes through pyplot, so
no figure stays open and no display is needed. Accuracies, costs and fractions are numbers in
[0, 1]; the axes show percent. NaN means "not known", and such a point is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

# The palette of Okabe and Ito without its yellow, which is too pale for a line on white. Each
# colour has a marker, so that lines differ in grey print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
INK, FAINT, GREY = "#333333", "#b8b8b8", "#767676"

STYLE: dict[Any, Any] = {  # complete enough that a user's matplotlibrc does not change the layout
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with Matplotlib
    "text.usetex": False,
    "text.color": INK,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#777777",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.labelsize": 9,
    "figure.facecolor": "white",
}


class Series(NamedTuple):
    """Points of accuracy against cost.

    Attributes:
      name: in the legend.
      x: `[K]`, cost or time.
      y: `[K]`, accuracy.
      kind: `policy` is a coloured line; `exits` are numbered diamonds; `networks` are diamonds, of
        which those that no cheaper one beats are connected; `bound` is a grey dashed line.
      low: `[K]`, lower end of a band, or None.
      high: `[K]`, upper end.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    kind: Literal["policy", "exits", "networks", "bound"] = "policy"
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def tradeoff(panels: Mapping[str, Sequence[Series]], xlabel: str) -> Figure:
    """Accuracy against cost or time, a panel a title, on common axes that fit the data.

    Costs that span more than a factor of 5 get a logarithmic axis. The accuracy axis leaves out the
    lowest points where they would compress the rest; a note then says how many.

    Raises:
      ValueError: if there is no finite point.
    """
    every = [s for series in panels.values() for s in series]
    names = list(dict.fromkeys(s.name for s in every if s.kind == "policy"))
    x = np.concatenate([np.ravel(s.x) for s in every] or [np.empty(0)])
    y = np.concatenate([np.ravel(s.y) for s in every] or [np.empty(0)])
    seen = np.isfinite(x) & np.isfinite(y)
    if not seen.any():
        raise ValueError("no point to draw: give at least one finite cost and accuracy.")
    floor, top = _range(100 * y[seen])
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        keys = [*names, *dict.fromkeys(s.name for s in every if s.kind != "policy")]
        size = (8.4 if columns == 1 else 9.6, 4.2 * rows + 0.16 * math.ceil(len(keys) / 4))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        handles: dict[str, Line2D] = {}
        for axes, (title, series) in zip(grid, panels.items(), strict=False):
            for s in reversed(series):  # the first policies are drawn on top
                look = _look(names.index(s.name)) if s.kind == "policy" else None
                handles[s.name] = _draw(axes, s, look, floor)
            hidden = sum(int((100 * s.y < floor).sum()) for s in series if s.kind != "bound")
            if hidden:
                words = f"{hidden} point{'s' * (hidden > 1)} below {floor:.1f} % not shown"
                axes.set_title(words, loc="right", fontsize=8)
            axes.set(title=title, ylim=(floor, top))
            axes.tick_params(labelbottom=True, labelleft=True)
        for axes in list(grid)[len(panels) :]:
            axes.remove()
        _x_axis(figure.axes, x[seen])
        for axes in figure.axes[-columns:]:
            axes.set_xlabel(xlabel)
        for axes in figure.axes[::columns]:
            axes.set_ylabel("accuracy on the test images (%)")
        figure.legend(
            handles=[handles[name] for name in keys],
            loc="outside lower center",
            ncols=4,
            fontsize=8,
        )
    return figure


def _range(percent: np.ndarray) -> tuple[float, float]:
    """Limits of the accuracy axis; the lower end is the 15th percentile where a tail is long."""
    top, least = percent.max(), percent.min()
    common = float(np.quantile(np.unique(percent), 0.15))
    floor = least if common - least < max(0.5 * (top - common), 2.0) else common
    room = 0.06 * max(top - floor, 0.5)
    return float(floor - room), float(top + room)


def _x_axis(grid: Sequence[Axes], x: np.ndarray) -> None:
    low, high = float(x.min()), float(x.max())
    if low > 0 and high > 5 * low:
        for axes in grid:
            axes.set_xscale("log")
            axes.set_xlim(low / 1.12, high * 1.12)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    room = 0.04 * max(high - low, 1e-6)
    for axes in grid:
        axes.set_xlim(low - room, high + room)


def _draw(axes: Axes, s: Series, look: dict[str, Any] | None, floor: float) -> Line2D:
    order = np.argsort(s.x, kind="stable")
    order = order[np.isfinite(s.x[order]) & np.isfinite(s.y[order])]
    x, y = s.x[order], 100 * s.y[order]
    if look is not None:
        axes.plot(x, y, **look, markersize=4, markevery=max(1, len(x) // 12), zorder=3)
        if s.low is not None and s.high is not None:
            band = {"color": look["color"], "alpha": 0.06, "linewidth": 0}
            axes.fill_between(x, 100 * s.low[order], 100 * s.high[order], **band)
        return Line2D([], [], label=s.name, **look, markersize=4)
    if s.kind == "bound":
        axes.plot(x, y, "--", color=GREY, linewidth=1.2)
        return Line2D([], [], label=s.name, color=GREY, linewidth=1.2, linestyle="--")
    axes.plot(x, y, "D", color=INK, markersize=5, zorder=4)
    if s.kind == "networks":
        best = y >= np.maximum.accumulate(y)
        axes.plot(x[best], y[best], color=INK, linewidth=1)
    else:
        for e, (at, value) in enumerate(zip(x, y, strict=True)):
            if value >= floor:
                place = {"xytext": (5, -4), "textcoords": "offset points", "va": "top"}
                axes.annotate(str(e + 1), (at, value), fontweight="bold", **place)
        if len(y) and math.isfinite(y[-1]):
            axes.axhline(y[-1], color=INK, linewidth=0.8, linestyle="--", zorder=1)
            words, where = f"whole network {y[-1]:.1f} %", axes.get_yaxis_transform()
            axes.annotate(words, (0.01, y[-1]), (0, 3), where, "offset points", fontsize=8)
    dash = "-" if s.kind == "networks" else "none"
    return Line2D([], [], label=s.name, color=INK, marker="D", markersize=5, linestyle=dash)


def _look(i: int) -> dict[str, Any]:
    turn = i // len(COLOURS)
    marker = MARKERS[(i + turn) % len(MARKERS)]
    dash = DASHES[turn % len(DASHES)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": marker, "linestyle": dash}


def exit_histogram(fractions: Mapping[str, ArrayLike]) -> Figure:
    """The share of the images that leaves at each exit: a row of bars a policy, on common axes.

    Args:
      fractions: by title, `[E]` that adds up to 1; the same E for all.

    Raises:
      ValueError: if there is no row, or the rows differ in length.
    """
    if not fractions or len({np.shape(row) for row in fractions.values()}) != 1:
        raise ValueError("give at least one row of fractions, all of the same length.")
    number = np.arange(1, len(np.asarray(next(iter(fractions.values())))) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + len(fractions)), layout="constrained")
        grid = figure.subplots(len(fractions), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        largest = max(float(np.nanmax(row)) for row in fractions.values())
        for i, (axes, (title, row)) in enumerate(zip(grid, fractions.items(), strict=True)):
            percent = 100 * np.asarray(row, float)
            bars = axes.bar(number, percent, color=COLOURS[i % len(COLOURS)], width=0.72)
            axes.bar_label(bars, ["<1" if 0 < y < 0.5 else f"{y:.0f}" for y in percent], padding=1)
            axes.set(title=title, ylim=(0, 135 * max(largest, 0.01)))
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.grid(visible=False, axis="x")
        grid[-1].set(xticks=number, xlabel="exit", xlim=(0.4, len(number) + 0.6))
        figure.supylabel("images that leave here (%)")
    return figure


def reliability(bins: Sequence[Mapping[str, Any]], ece: ArrayLike) -> Figure:
    """Accuracy against confidence, a small diagram an exit, with its calibration error (ECE).

    A dot is a bin of confidence, and its area the number of images in it.

    Args:
      bins: for each exit `confidence`, `accuracy` and `count`, each `[bins]`; empty bins are left
        out.
      ece: `[E]`.

    Raises:
      ValueError: if there is no exit, or not one ECE for each.
    """
    errors = np.asarray(ece, float)
    if not bins or errors.shape != (len(bins),):
        raise ValueError(f"{errors.size} calibration errors for {len(bins)} exits; give one each.")
    rows = math.ceil(len(bins) / 5)
    columns = math.ceil(len(bins) / rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(2.6, 1.9 * columns), 0.5 + 2.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for e, axes in enumerate(grid):
            if e >= len(bins):
                axes.remove()
                continue
            keys = ("confidence", "accuracy", "count")
            confidence, accuracy, count = (np.asarray(bins[e][k], float) for k in keys)
            seen = count > 0
            confidence, accuracy, count = confidence[seen], accuracy[seen], count[seen]
            area = 8 + 160 * count / max(count.sum(), 1)
            axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=0.8)
            axes.vlines(confidence, confidence, accuracy, color=FAINT)
            axes.scatter(confidence, accuracy, area, COLOURS[0], alpha=0.75, zorder=3)
            axes.set(title=f"exit {e + 1}: ECE {errors[e]:.3f}", aspect="equal")
            axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        figure.supxlabel("mean confidence of a bin")
        figure.supylabel("accuracy of a bin")
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy per exit and, where a run learns gates, their mean and entropy, by epoch.

    Args:
      history: one row an epoch with `epoch` and any of `loss`, `train_accuracy` [E],
        `held_out_accuracy` [E], `gate_mean` [E] and `gate_entropy`. The entropy is normalised: 1
        where the mean gate spreads evenly over the exits, 0 where it stays at one.

    Raises:
      ValueError: if `history` is empty.
    """
    if not history:
        raise ValueError("no epoch to draw: the history is empty.")
    epochs = [row["epoch"] for row in history]
    loss, entropy = (_column(history, key, 1) for key in ("loss", "gate_entropy"))
    train, held_out, gate = (
        _column(history, key) for key in ("train_accuracy", "held_out_accuracy", "gate_mean")
    )
    exits = max(train.shape[1], held_out.shape[1], gate.shape[1])
    # Colours from the first exit to the last; viridis stops before its yellow, too pale on white.
    ramp = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, max(exits, 1)))
    dot = "." if len(epochs) < 13 else ""
    panels = [("training loss", [(loss, "-")])]
    panels += [("accuracy (%)", [(100 * train, "--"), (100 * held_out, "-")])]
    if gate.size:
        panels += [("mean gate (probability of stopping)", [(gate, "-")])]
    if np.isfinite(entropy).any():
        panels += [("normalised entropy of the exit distribution", [(entropy, "-")])]
    with matplotlib.rc_context(STYLE):
        rows = 2 if len(panels) == 4 else 1
        figure = Figure(figsize=(9.6, 3.0 * rows), layout="constrained")
        grid = figure.subplots(rows, len(panels) // rows, squeeze=False).flat
        for axes, (label, lines) in zip(grid, panels, strict=True):
            for values, style in lines:
                for e, line in enumerate(values.T):
                    colour = INK if values is loss or values is entropy else ramp[e]
                    axes.plot(epochs, line, style, color=colour, marker=dot, linewidth=1.3)
            axes.set(xlabel="epoch", ylabel=label)
            if lines[0][0] is gate or lines[0][0] is entropy:
                axes.set_ylim(-0.04, 1.04)
            axes.xaxis.set_major_locator(
                MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
            )
        keys = [Line2D([], [], label=f"exit {e + 1}", color=ramp[e]) for e in range(exits)]
        keys += [Line2D([], [], label="held out", color=INK)]
        keys += [Line2D([], [], label="training", color=INK, linestyle="--")]
        figure.legend(handles=keys, loc="outside right center")
    return figure


def _column(history: Sequence[Mapping[str, Any]], key: str, width: int | None = None) -> np.ndarray:
    """`[epochs, E]` of one key: NaN in epochs that lack it; E = 0 if all do and width is None."""
    values = [row.get(key) for row in history]
    width = max(np.size(v) if v is not None else 0 for v in values) if width is None else width
    rows = [np.full(width, np.nan) if v is None else np.ravel(np.asarray(v, float)) for v in values]
    return np.stack(rows)


def intervals(names: Sequence[str], ends: ArrayLike, significant: Sequence[bool]) -> Figure:
    """Differences in accuracy with their intervals, the largest on top; filled if significant.

    Args:
      names: K.
      ends: `[K, 3]`: low, mean, high, as fractions.
      significant: K.
    """
    low, mean, high = 100 * np.asarray(ends, float).T
    order = np.argsort(mean, kind="stable")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.19 * len(names)), layout="constrained")
        axes = figure.add_subplot(xlabel="difference in accuracy (points)")
        axes.axvline(0, color=INK, linewidth=0.9)
        for i, k in enumerate(order):
            colour = COLOURS[0] if significant[k] else GREY
            face = colour if significant[k] else "white"
            axes.plot([low[k], high[k]], [i, i], color=colour)
            axes.plot(mean[k], i, "o", color=colour, markerfacecolor=face, markersize=5)
        axes.set_yticks(range(len(names)), [str(names[k]) for k in order], fontsize=8)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.grid(visible=False, axis="y")
    return figure


def drift(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy, cost and risk against severity of corruption, a line a corruption.

    Args:
      rows: of one scheme and target, with `corruption`, `severity`, `accuracy`, `cost` and, under a
        guarantee, `risk` and `epsilon`.
    """
    kinds = list(dict.fromkeys(row["corruption"] for row in rows))
    parts = [("accuracy", "accuracy (%)", 100), ("cost", "mean cost", 1)]
    epsilon: float | None = rows[0].get("epsilon")
    if epsilon is not None:
        parts.append(("risk", "risk (%)", 100))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.9), layout="constrained")
        grid = figure.subplots(1, len(parts), squeeze=False)[0]
        for axes, (key, label, scale) in zip(grid, parts, strict=True):
            for i, kind in enumerate(kinds):
                here = [row for row in rows if row["corruption"] == kind]
                line = sorted((row["severity"], scale * row[key]) for row in here)
                axes.plot(*np.asarray(line, float).T, **_look(i), markersize=4, label=kind)
            if key == "risk" and epsilon is not None:
                style = {"color": INK, "linewidth": 0.9, "linestyle": "--"}
                axes.axhline(100 * epsilon, label="promised risk", **style)
            axes.set(xlabel="severity (0: clean)", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles, labels = grid[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def shares(
    matrices: Mapping[str, ArrayLike], rows: Sequence[str], columns: Sequence[str]
) -> Figure:
    """Matrices of shares, side by side, in percent; darker is more.

    Args:
      matrices: by title, each `[len(rows), len(columns)]`, in [0, 1]; NaN is left blank.
      rows, columns: names; 24 letters of each are shown.
    """
    rows, columns = ([name[:24] for name in names] for names in (rows, columns))
    with matplotlib.rc_context(STYLE):
        width, height = 1.4 + 0.34 * len(columns), 1.2 + 0.28 * len(rows)
        size = (max(width * len(matrices), 4.0), height)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axes, (title, matrix) in zip(grid, matrices.items(), strict=True):
            values = np.asarray(matrix, float)
            axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            for (i, j), value in np.ndenumerate(values):
                ink = "white" if value > 0.6 else INK
                word = f"{100 * value:.0f}" if math.isfinite(value) else ""
                axes.text(j, i, word, ha="center", va="center", color=ink, fontsize=7)
            axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
            names = rows if axes is grid[0] else []
            axes.set_yticks(range(len(rows)) if axes is grid[0] else [], names, fontsize=8)
            axes.set_title(title)
            axes.grid(visible=False)
    return figure


def save(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Writes each figure as .svg and .pdf, without dates: the same numbers give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        nothing = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}
        options: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": name, "pdf.fonttype": 42}
        for ending, keys in nothing.items():
            with matplotlib.rc_context(options):
                figure.savefig(folder / f"{name}.{ending}", metadata=dict.fromkeys(keys))
            figure.set_layout_engine("none")  # laid out once; the layout is most of the work
