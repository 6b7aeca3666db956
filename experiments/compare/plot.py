"""The pictures of a comparison: what is drawn, and figures for papers.

The page draws the first two itself, so that they answer to a pointer; `Panel` is what both draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.compare.terms import (
    Gap,
    Results,
    distinct,
    gaps,
    leading_target,
    number,
    real,
    scheme,
    scheme_words,
    spread_words,
    target_words,
)
from experiments.report.plots import COLOURS, INK, MARKERS, STYLE

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
"""Lengths of ink and gap, in points; none is a solid line."""
GREY = "#767676"


class Look(NamedTuple):
    """How a line is told from the others: by colour, dash and marker together."""

    colour: str
    dash: tuple[float, ...] = ()
    marker: str = ""


class Series(NamedTuple):
    """A line with its markers; y in percent."""

    name: str
    look: Look
    line: tuple[tuple[float, float], ...]
    points: tuple[tuple[float, float, str], ...] = ()
    """x, y, and what the page says of the point."""
    band: tuple[tuple[float, float, float], ...] = ()
    """x, low, high."""


class Panel(NamedTuple):
    """The lines of one regime."""

    title: str
    xlabel: str
    series: tuple[Series, ...]


def looks(results: Results) -> dict[str, Look]:
    """A look for each policy of the early-exit networks, the same in every figure."""
    parts = [*(results.get("curves") or ()), *(results.get("rows") or ())]
    parts += results.get("timing") or ()
    names = distinct(scheme(p)[1] for p in parts if scheme(p)[0] not in ("static", "cascade"))
    return {name: _look(i, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)}


def mac_panels(results: Results) -> list[Panel]:
    """Accuracy against mean cost, a panel a regime."""
    curves = results.get("curves") or ()
    regimes = {r["name"]: r for r in results.get("regimes") or ()}
    names = distinct([*regimes, *(scheme(c)[0] for c in curves if scheme(c)[0] != "cascade")])
    label = "mean cost (fraction of the plain network's MACs)"
    panels = []
    for name in names:
        series = _curves([c for c in curves if scheme(c)[0] == name], looks(results))
        series += _curves([c for c in curves if scheme(c)[0] == "cascade"], {})
        series += _static(results, "cost")
        oracle = (regimes.get(name) or {}).get("oracle") or ()
        line = _sorted((real(p["cost"]), 100 * real(p["accuracy"])) for p in oracle)
        series += [Series("oracle (upper bound)", Look(GREY, (4, 3)), line)] if line else []
        if any(s.line or s.points for s in series):
            panels.append(Panel(name, label, tuple(series)))
    return panels


def time_panels(results: Results) -> list[Panel]:
    """Accuracy against measured time, a panel a regime; all at one batch size each."""
    timing = [t for t in results.get("timing") or () if math.isfinite(real(t.get("ms")))]
    timing = [t for t in timing if math.isfinite(real(t.get("accuracy")))]
    names = distinct(scheme(t)[0] for t in timing if scheme(t)[0] not in ("static", "cascade"))
    batches = ", ".join(str(batch) for batch in distinct(t.get("batch") for t in timing))
    panels = []
    for name in names:
        series = _times([t for t in timing if scheme(t)[0] == name], looks(results))
        series += _times([t for t in timing if scheme(t)[0] == "cascade"], {})
        series += _static(results, "ms")
        panels.append(Panel(name, f"measured time (ms for a batch of {batches})", tuple(series)))
    return panels


def bounds(panels: Sequence[Panel]) -> tuple[tuple[float, float], tuple[float, float], int]:
    """The common ranges of x and y, and how many points lie below and are not shown.

    A few points at very low cost would press everything of interest into one smear; so the lower
    end is at the 15th percentile where the rest reaches far below it.
    """
    points = [(x, y) for panel in panels for s in panel.series for x, y, _ in s.points]
    points += [at for panel in panels for s in panel.series for at in s.line]
    bands = [end for panel in panels for s in panel.series for _, *ends in s.band for end in ends]
    xs, ys = np.asarray(points, float).T
    top, least, common = max([ys.max(), *bands]), ys.min(), float(np.quantile(ys, 0.15))
    bottom = least if common - least < 0.5 * (top - common) else common
    shown = [y for panel in panels for s in panel.series for _, y, _ in s.points]
    room = 0.04 * max(top - bottom, 0.5)
    low = bottom - room
    return (0.0, 1.03 * xs.max()), (low, top + room), sum(y < low for y in shown)


def marked(series: Series) -> tuple[tuple[float, float, str], ...]:
    """The points that get a marker: a dozen, because more run together into a thick line."""
    return series.points[:: max(1, round(len(series.points) / 12))]


# --- figures


def curves(panels: Sequence[Panel]) -> Figure:
    """The panels side by side, two in a row, on common axes.

    Raises:
      ValueError: no panel.
    """
    if not panels:
        raise ValueError("no panel to draw: give at least one.")
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    xs, ys, _ = bounds(panels)
    names = {s.name: s for panel in panels for s in panel.series}
    with matplotlib.rc_context(STYLE):
        height = 3.4 * lines + 0.3 + 0.16 * math.ceil(len(names) / (2 * columns))
        figure = Figure(figsize=(4.3 * columns, height), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
        for i, axes in enumerate(grid):
            if i >= len(panels):
                axes.remove()
                continue
            for series in panels[i].series:
                _draw(axes, series)
            axes.set(title=panels[i].title, xlim=xs, ylim=ys)
            if i + columns >= len(panels):
                axes.set_xlabel(panels[i].xlabel)
                axes.tick_params(labelbottom=True)
        figure.supylabel("accuracy (%)")
        keys = [Line2D([], [], label=s.name, **_style(s.look)) for s in names.values()]
        figure.legend(handles=keys, loc="outside lower center", ncols=2 * columns, fontsize=8)
    return figure


def forest(found: Sequence[Gap]) -> Figure:
    """Differences in accuracy with their intervals, a panel a target; the significant ones filled.

    Raises:
      ValueError: no difference.
    """
    if not found:
        raise ValueError("no difference to draw: give at least one.")
    groups = [[g for g in found if g.target == t] for t in distinct(g.target for g in found)]
    groups = [sorted(group, key=lambda gap: gap.mean) for group in groups]
    with matplotlib.rc_context(STYLE):
        heights = [len(group) + 2.2 for group in groups]
        size = (8.4, 0.5 + 0.19 * sum(heights))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, group in zip(grid.flat, groups, strict=True):
            axes.axvline(0, color=INK, linewidth=0.9)
            for i, gap in enumerate(group):
                colour = COLOURS[0] if gap.significant else GREY
                axes.plot([100 * gap.low, 100 * gap.high], [i, i], color=colour)
                face = colour if gap.significant else "white"
                axes.plot(100 * gap.mean, i, "o", color=colour, markerfacecolor=face, markersize=5)
            names = [f"{scheme_words(gap.a)} - {scheme_words(gap.b)}" for gap in group]
            axes.set_yticks(range(len(group)), names, fontsize=8)
            axes.set(ylim=(-0.7, len(group) - 0.3), title=target_words(group[0].target))
            axes.grid(visible=False, axis="y")
        grid[-1, 0].set_xlabel("difference in accuracy (points)")
    return figure


def main_gaps(results: Results) -> list[Gap]:
    """The differences at the leading target; without any, those of the first."""
    found = [g for g in gaps(results) if math.isfinite(g.mean)]
    main = [g for g in found if g.target == leading_target(results)]
    return main or [g for g in found if g.target == found[0].target]


def drift_groups(results: Results) -> list[list[Mapping[str, Any]]]:
    """The rows of each scheme and target."""
    rows = results.get("drift") or ()
    keys = distinct((scheme(row), row.get("target")) for row in rows)
    return [[r for r in rows if (scheme(r), r.get("target")) == key] for key in keys]


def drift(groups: Sequence[Sequence[Mapping[str, Any]]]) -> Figure:
    """Accuracy, cost and risk against severity, a line a corruption; a row a scheme and target.

    Raises:
      ValueError: no group.
    """
    if not groups:
        raise ValueError("no drift to draw: give at least one group.")
    kinds = distinct(row["corruption"] for group in groups for row in group)
    style = {k: _style(_look(i, COLOURS[i % len(COLOURS)])) for i, k in enumerate(kinds)}
    parts = (("accuracy", "accuracy (%)", 100), ("cost", "mean cost", 1), ("risk", "risk (%)", 100))
    with matplotlib.rc_context(STYLE):
        size = (8.4, 0.6 + 2.3 * len(groups))
        figure = Figure(figsize=size, layout="constrained")
        subfigures = figure.subfigures(len(groups), 1, squeeze=False).flat
        keys = [Line2D([], [], label=kind, **look) for kind, look in style.items()]
        for subfigure, rows in zip(subfigures, groups, strict=True):
            known = [p for p in parts if any(math.isfinite(real(r.get(p[0]))) for r in rows)]
            subfigure.suptitle(_group_words(rows[0]), fontsize=9, x=0.01, ha="left")
            grid = subfigure.subplots(1, max(len(known), 1), squeeze=False)[0]
            for axes, (key, label, scale) in zip(grid, known, strict=False):
                for kind in kinds:
                    line = _sorted((float(r["severity"]), scale * real(r.get(key))) for r in rows
                                   if r["corruption"] == kind)  # fmt: skip
                    axes.plot(*np.asarray(line, float).reshape(-1, 2).T, **style[kind])
                epsilon = real(rows[0].get("epsilon"))
                if key == "risk" and math.isfinite(epsilon):
                    axes.axhline(100 * epsilon, color=INK, linewidth=0.9, linestyle="--")
                axes.set(xlabel="severity (0: clean)", ylabel=label)
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if any(math.isfinite(real(rows[0].get("epsilon"))) for rows in groups):
            keys.append(Line2D([], [], label="promised risk", color=INK, lw=0.9, linestyle="--"))
        figure.legend(handles=keys, loc="outside lower center", ncols=5)
    return figure


def agreement(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of test images on which two policies take the same exit, and give the same answer.

    Raises:
      ValueError: no entry.
    """
    if not entries:
        raise ValueError("no agreement to draw: give at least one entry.")
    size = max(len(entry["policies"]) for entry in entries)
    side = 1.6 + 0.3 * size
    with matplotlib.rc_context(STYLE):
        figsize = (2 * side + 1.2, (side + 0.5) * len(entries))
        figure = Figure(figsize=figsize, layout="constrained")
        grid = figure.subplots(len(entries), 2, squeeze=False)
        for entry, pair in zip(entries, grid, strict=True):
            for axes, key in zip(pair, ("exits", "answers"), strict=True):
                values = np.asarray(entry[key], float)
                axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
                for (i, j), value in np.ndenumerate(values):
                    ink = "white" if value > 0.6 else INK
                    text = number(value, 0, scale=100)
                    axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=7)
                count = range(len(entry["policies"]))
                axes.set_xticks(count, entry["policies"], rotation=90, fontsize=8)
                axes.set_yticks(count, entry["policies"] if key == "exits" else [], fontsize=8)
                axes.set_title(f"{entry['regime']}: same {key[:-1]} (%)")
                axes.grid(visible=False)
    return figure


def save(folder: Path, results: Results) -> list[Path]:
    """Writes each figure that there is something for as .svg and .pdf: the same bytes for the same
    results, for they hold no date. Returns the files."""
    made: dict[str, Figure] = {}
    for name, panels in (("macs", mac_panels(results)), ("time", time_panels(results))):
        made |= {f"accuracy_{name}": curves(panels)} if panels else {}
    made |= {"differences": forest(main_gaps(results))} if gaps(results) else {}
    made |= {"drift": drift(drift_groups(results))} if results.get("drift") else {}
    made |= {"agreement": agreement(results["agreement"])} if results.get("agreement") else {}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in made.items():
        nothing = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}
        options: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": name, "pdf.fonttype": 42}
        for ending, keys in nothing.items():
            files.append(folder / f"{name}.{ending}")
            with matplotlib.rc_context(options):
                figure.savefig(files[-1], metadata=dict.fromkeys(keys))
            figure.set_layout_engine("none")  # the layout is most of the work, and is done now
    return files


# --- what is drawn


def _curves(found: Sequence[Mapping[str, Any]], known: Mapping[str, Look]) -> list[Series]:
    series = []
    for i, curve in enumerate(found):
        regime, policy = scheme(curve)
        # The cascade's lines are all of ink: its policies have the names of the others.
        look = known.get(policy) or _look(i, INK, first=2)
        name = policy if policy in known else scheme_words((regime, policy))
        points, band = [], []
        for p in curve.get("points") or ():
            x, y, low, high = (real(p.get(key)) for key in ("cost", "accuracy", "low", "high"))
            if math.isfinite(x + y):
                words = f"{scheme_words((regime, policy))}: {number(y, 1, scale=100)} %"
                ends = (
                    f" ({number(low, 1, scale=100)} to {number(high, 1, scale=100)} % over seeds)"
                )
                words += (ends if high > low else "") + f" at cost {number(x, 2)}"
                points.append((x, 100 * y, words))
                band += [(x, 100 * low, 100 * high)] if high >= low else []
        points.sort()
        line = tuple((x, y) for x, y, _ in points)
        band = sorted(band) if any(high > low for _, low, high in band) else []
        series.append(Series(name, look, line, tuple(points), tuple(band)))
    return series


def _times(found: Sequence[Mapping[str, Any]], known: Mapping[str, Look]) -> list[Series]:
    series = []
    for i, which in enumerate(distinct(scheme(t) for t in found)):
        points = []
        for t in found:
            if scheme(t) == which:
                words = f"{scheme_words(which)}, {target_words(t.get('target'))}: "
                words += f"{number(t['accuracy'], 1, scale=100)} % in {number(t['ms'], 2)} ms"
                points.append((real(t["ms"]), 100 * real(t["accuracy"]), words))
        points.sort()
        name = which[1] if which[1] in known else scheme_words(which)
        look = known.get(which[1]) or _look(i, INK, first=2)
        series.append(Series(name, look, tuple((x, y) for x, y, _ in points), tuple(points)))
    return series


def _static(results: Results, key: str) -> list[Series]:
    """The static networks as diamonds, those that no other one beats connected."""
    points = []
    for s in results.get("static") or ():
        x, y = real(s.get(key)), 100 * real(s.get("accuracy"))
        if math.isfinite(x + y):
            at = f"cost {number(x, 2)}" if key == "cost" else f"{number(x, 2)} ms"
            words = (
                f"{scheme_words(('static', s['name']))}: {spread_words(s['accuracy'])} % at {at}"
            )
            points.append((x, y, words))
    points.sort()
    line, best = [], -math.inf
    for x, y, _ in points:
        if y > best:
            line, best = [*line, (x, y)], y
    return [Series("static networks", Look(INK, (), "D"), tuple(line), tuple(points))] * bool(
        points
    )


def _look(i: int, colour: str, first: int = 0) -> Look:
    turn = i // len(COLOURS)
    return Look(colour, DASHES[(first + turn) % len(DASHES)], MARKERS[(i + turn) % len(MARKERS)])


def _style(look: Look) -> dict[str, Any]:
    dash = (0, look.dash) if look.dash else "-"
    return {"color": look.colour, "linestyle": dash, "marker": look.marker or "None", "ms": 4}


def _draw(axes: Any, series: Series) -> None:
    style = _style(series.look)
    axes.plot(*np.asarray(series.line, float).reshape(-1, 2).T, **{**style, "marker": "None"})
    at = np.asarray([(x, y) for x, y, _ in marked(series)], float).reshape(-1, 2)
    axes.plot(*at.T, **{**style, "linestyle": "None"})
    if series.band:
        x, low, high = np.asarray(series.band, float).T
        axes.fill_between(x, low, high, color=series.look.colour, alpha=0.1, linewidth=0)


def _group_words(row: Mapping[str, Any]) -> str:
    return f"{scheme_words(scheme(row))}, {target_words(row.get('target'))}"


def _sorted(points: Any) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((x, y) for x, y in points if math.isfinite(x + y)))
