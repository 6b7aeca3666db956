"""The pictures: pure functions from arrays (or from a run's report) to matplotlib figures.

Every function builds a `matplotlib.figure.Figure` and returns it. Nothing goes through pyplot, so
nothing is kept open behind the caller's back, no display is needed, and the caller saves:

    cost_curve(curves, exits).savefig("cost.png", dpi=150)

Accuracies, costs and fractions come in as numbers in [0, 1]; the axes show accuracy in percent.
Cost is the mean number of multiply-accumulates (MACs) per image as a fraction of the whole
network's. None and NaN mean "not known": such a point is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from experiments.report import reading as reports

# Okabe and Ito's palette without its yellow, which is too pale for a line on white. Each colour
# goes with a marker of its own, so that the lines differ in a grey print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "v", "P", "X")
INK, FAINT = "#333333", "#b8b8b8"

STYLE: dict[Any, Any] = {  # a reader's own matplotlibrc (LaTeX text, ...) stays out
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same layout everywhere
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


def cost_curve(
    curves: Mapping[str, ArrayLike],
    exits: ArrayLike,
    *,
    points: Mapping[str, ArrayLike] | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Accuracy against mean cost: a line a policy, a numbered marker an exit, the whole network.

    Args:
        curves: per policy `[P, 2]`, (mean cost, accuracy) along a sweep of thresholds, in any
            order. Up to 6 policies have a colour of their own.
        exits: `[E, 2]`, (cost, accuracy) if every image left at exit e; the last is the whole
            network.
        points: per policy `[K, 2]`, (mean cost, accuracy) with the thresholds that were chosen for
            a target; drawn as rings.
        colours: per policy, by default the palette in order.

    Raises:
        ValueError: an array has another shape, or there is no exit.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.0), layout="constrained")
        _draw_cost_curve(figure, curves, exits, points or {}, colours)
    return figure


def exit_histogram(
    fractions: ArrayLike, labels: Sequence[str], *, colours: Sequence[str] | None = None
) -> Figure:
    """Which share of the images leaves at which exit: a row of bars a policy, on common axes.

    Args:
        fractions: `[K, E]`, per policy the share of images that each exit answers; a row sums to 1.
        labels: K titles, one for each row.
        colours: K colours, by default the palette in order.

    Raises:
        ValueError: `fractions` is not `[K, E]` with K, E >= 1, or the number of labels is not K.
    """
    rows = np.asarray(fractions, float)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"expected fractions [policies, exits], got shape {rows.shape}")
    if len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} policies; give one each")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 1.0 * len(rows)), layout="constrained")
        _draw_histogram(figure, rows, labels, colours or _cycle(COLOURS, len(rows)))
    return figure


def accuracy_per_exit(accuracy: ArrayLike, fractions: ArrayLike | None = None) -> Figure:
    """Accuracy of each exit on all images, as if all had to leave there.

    Args:
        accuracy: `[E]`, in [0, 1].
        fractions: `[E]`, what leaving there costs as a fraction of the whole network; written under
            the number of the exit.

    Raises:
        ValueError: `accuracy` is not `[E]` with E >= 1, or `fractions` has another length.
    """
    percent = 100 * np.asarray(accuracy, float)
    if percent.ndim != 1 or not percent.size:
        raise ValueError(f"expected one accuracy for each exit, got shape {percent.shape}")
    number = np.arange(1, percent.size + 1)
    names, label = [str(n) for n in number], "exit"
    if fractions is not None:
        cost = np.asarray(fractions, float)
        if cost.shape != percent.shape:
            raise ValueError(f"{cost.size} costs for {percent.size} exits; give one each")
        names = [f"{n}\n{c:.2f}" for n, c in zip(names, cost, strict=True)]
        label = "exit, and below it its cost (fraction of the whole network's MACs)"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.0), layout="constrained")
        axes = figure.add_subplot(xlabel=label, ylabel="accuracy (%)")
        axes.plot(number, percent, "o-", color=COLOURS[0])
        _write_above(axes, number, percent, [f"{y:.1f}" for y in percent], gap=7)
        axes.set_xticks(number, names)
        axes.set_xlim(0.5, percent.size + 0.5)
        axes.margins(y=0.25)
    return figure


def reliability(bins: Sequence[Mapping[str, Any]], ece: ArrayLike | None = None) -> Figure:
    """Accuracy against confidence, a small diagram an exit, with its calibration error (ECE).

    A dot stands for the images of one bin of confidence, and its area for their number. On the
    diagonal confidence equals accuracy; a line shows how far from it a bin is.

    Args:
        bins: per exit the arrays `confidence`, `accuracy` and `count`, each `[bins]`. Empty bins
            are left out.
        ece: `[E]`; where absent or NaN it is computed from the bins.

    Raises:
        ValueError: no exit, arrays of unequal lengths, or a number of ECEs other than E.
    """
    if not bins:
        raise ValueError("no exit to draw: give one set of bins for each exit")
    errors = np.full(len(bins), np.nan) if ece is None else np.asarray(ece, float)
    if errors.shape != (len(bins),):
        raise ValueError(f"{errors.size} calibration errors for {len(bins)} exits; give one each")
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
            if not confidence.shape == accuracy.shape == count.shape:
                raise ValueError(f"exit {e + 1}: confidence, accuracy and count differ in length")
            seen = (count > 0) & np.isfinite(confidence) & np.isfinite(accuracy)
            confidence, accuracy, count = confidence[seen], accuracy[seen], count[seen]
            share = count / max(count.sum(), 1)
            if math.isnan(errors[e]):
                errors[e] = share @ np.abs(confidence - accuracy)
            axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=0.8)
            axes.vlines(confidence, confidence, accuracy, color=FAINT)
            axes.scatter(confidence, accuracy, 8 + 160 * share, COLOURS[0], alpha=0.75, zorder=3)
            axes.set(title=f"exit {e + 1}: ECE {errors[e]:.3f}", aspect="equal")
            axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        figure.supxlabel("mean confidence of a bin")
        figure.supylabel("accuracy of a bin")
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy per exit and, where a run has learned gates, their mean and entropy, by epoch.

    Args:
        history: one row an epoch with `epoch` and any of `loss`, `train_accuracy` [E],
            `held_out_accuracy` [E], `gate_mean` [E] and `gate_entropy`; what a row lacks is left
            out.

    Raises:
        ValueError: `history` is empty.
    """
    if not history:
        raise ValueError("no epoch to draw: the history is empty")
    epochs = [row["epoch"] for row in history]
    loss, entropy = (_column(history, key, 1) for key in ("loss", "gate_entropy"))
    train, held_out, gate = (
        _column(history, key) for key in ("train_accuracy", "held_out_accuracy", "gate_mean")
    )
    exits = max(train.shape[1], held_out.shape[1], gate.shape[1])
    # A ramp from the first exit to the last; viridis stops short of its yellow, too pale on white.
    ramp = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, max(exits, 1)))
    dot = "." if len(epochs) < 13 else ""  # a single epoch is a dot; many dots only hide the lines
    panels = [("training loss", [(loss, "-")])]
    panels += [("accuracy (%)", [(100 * train, "--"), (100 * held_out, "-")])]
    if gate.size:
        panels += [("mean gate (probability of stopping)", [(gate, "-")])]
    if np.isfinite(entropy).any():
        panels += [("entropy of the mean exit (nats)", [(entropy, "-")])]
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
            if lines[0][0] is gate:
                axes.set_ylim(-0.04, 1.04)
            axes.xaxis.set_major_locator(
                MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
            )
        keys = [_key(f"exit {e + 1}", color=ramp[e]) for e in range(exits)]
        keys += [_key("held out"), _key("training", linestyle="--")]
        figure.legend(handles=keys, loc="outside right center")
    return figure


def summary(report: Mapping[str, Any]) -> Figure:
    """A run in one picture: the cost curve, and beside it the exit histogram.

    Args:
        report: the content of report.json. The histogram shows the report's leading target.

    Raises:
        ValueError: the report has no exit.
    """
    policies = reports.leading_policies(report)[: len(COLOURS)]
    colours = policy_colours(report)
    points = reports.chosen_points(report)
    with matplotlib.rc_context(STYLE):
        height = max(4.6, 1.1 + 0.8 * len(policies))
        figure = Figure(figsize=(11.5 if policies else 8.4, height), layout="constrained")
        left = figure
        if policies:
            ratios = (1.6, 1)
            left, correct = figure.subfigures(1, 2, squeeze=False, width_ratios=ratios)[0]
            rows = np.asarray([p["exit_fractions"] for p in policies], float)
            labels = [reports.policy_label(p) for p in policies]
            _draw_histogram(correct, rows, labels, [colours[p["name"]] for p in policies])
        _draw_cost_curve(
            left, reports.curve_points(report), reports.exit_points(report), points, colours
        )
    return figure


def policy_colours(report: Mapping[str, Any]) -> dict[str, str]:
    """One colour for each policy name, the same in every figure of a report."""
    names = dict.fromkeys([*(report.get("curve") or {}), *(p["name"] for p in report["policies"])])
    return dict(zip(names, _cycle(COLOURS, len(names)), strict=True))


# --- drawing


def _column(history: Sequence[Mapping[str, Any]], key: str, width: int | None = None) -> np.ndarray:
    """`[epochs, E]` of one key: NaN in epochs that lack it; E = 0 if all do and width is None."""
    found = [row.get(key) for row in history]
    width = max(np.size(v) if v is not None else 0 for v in found) if width is None else width
    rows = [np.full(width, np.nan) if v is None else np.ravel(np.asarray(v, float)) for v in found]
    return np.stack(rows)


def _draw_cost_curve(
    figure: Figure | SubFigure,
    curves: Mapping[str, ArrayLike],
    exits: ArrayLike,
    points: Mapping[str, ArrayLike],
    colours: Mapping[str, str] | None,
) -> None:
    network = _pairs("exits", exits)
    if not len(network):
        raise ValueError("no exit to draw: give one row of (cost, accuracy) for each exit")
    axes = figure.add_subplot(ylabel="accuracy (%)")
    axes.set_xlabel("mean cost per image (fraction of the whole network's MACs)")
    names = list(dict.fromkeys([*curves, *points]))
    colours = colours or dict(zip(names, _cycle(COLOURS, len(names)), strict=True))
    keys = []
    for name, marker in zip(names, _cycle(MARKERS, len(names)), strict=True):
        look = {"color": colours[name], "marker": marker, "markersize": 4}
        line = _pairs(f"curve {name}", curves.get(name, np.empty((0, 2))))
        line = line[np.isfinite(line).all(axis=1)]
        line = line[np.argsort(line[:, 0], kind="stable")]
        axes.plot(line[:, 0], 100 * line[:, 1], **look)
        keys.append(_key(name, **look))
        rings = _pairs(f"points {name}", points.get(name, np.empty((0, 2))))
        axes.plot(rings[:, 0], 100 * rings[:, 1], "o", color=look["color"], **_RING)
    cost, accuracy = network[:, 0], 100 * network[:, 1]
    axes.plot(cost, accuracy, "D", color=INK, markersize=5, zorder=4)
    for e in np.flatnonzero(np.isfinite(network).all(axis=1)):
        at, place = (cost[e], accuracy[e]), {"xytext": (5, -3), "textcoords": "offset points"}
        axes.annotate(str(e + 1), at, fontweight="bold", va="top", **place)
    if math.isfinite(accuracy[-1]):
        axes.axhline(accuracy[-1], color=INK, linewidth=0.9, linestyle="--", zorder=1)
        words, where = f"whole network {accuracy[-1]:.1f} %", axes.get_yaxis_transform()
        axes.annotate(words, (0.01, accuracy[-1]), (0, 3), where, "offset points", va="bottom")
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.06 * np.nanmax([1.0, *cost]))
    keys.append(_key("all images at one exit", color=INK, marker="D", linestyle="none"))
    if any(len(np.asarray(rings)) for rings in points.values()):
        keys.append(_key("thresholds chosen for a target", marker="o", linestyle="none", **_RING))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(4, len(keys)))


def _draw_histogram(
    figure: Figure | SubFigure, rows: np.ndarray, labels: Sequence[str], colours: Sequence[str]
) -> None:
    grid = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    number = np.arange(1, rows.shape[1] + 1)
    for axes, row, label, colour in zip(grid, 100 * rows, labels, colours, strict=True):
        axes.bar(number, row, color=colour, width=0.72)
        words = ["0" if y == 0 else "<1" if y < 0.5 else f"{y:.0f}" for y in row]
        _write_above(axes, number, row, words, gap=1)
        axes.set(title=label, ylim=(0, 135 * max(float(np.nanmax(rows)), 0.01)))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.grid(visible=False, axis="x")
    grid[-1].set(xticks=number, xlabel="exit", xlim=(0.4, len(number) + 0.6))
    figure.supylabel("images that leave here (%)")


_RING = {"markersize": 11, "markeredgewidth": 1.8, "fillstyle": "none"}


def _key(label: str, color: Any = INK, **look: Any) -> Line2D:
    return Line2D([], [], label=label, color=color, **look)


def _write_above(axes: Any, xs: np.ndarray, ys: np.ndarray, words: Sequence[str], gap: int) -> None:
    for x, y, text in zip(xs, ys, words, strict=True):
        if math.isfinite(y):
            axes.annotate(text, (x, y), (0, gap), textcoords="offset points", ha="center")


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


def _pairs(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, float)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"expected {name} as rows of (cost, accuracy), got shape {array.shape}")
    return array
