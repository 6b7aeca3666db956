"""The picture of a plan: accuracy against the objective."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eejax.planning.options import Objective, value

if TYPE_CHECKING:
    from eejax.planning.search import Plans

# Axis and factor of what is judged.
UNITS: dict[Objective, tuple[str, float]] = {
    "mean": ("mean latency (ms)", 1e3),
    "p99": ("0.99 quantile of the latency (ms)", 1e3),
    "energy": ("energy of the device (mJ per request)", 1e3),
    "price": ("price of a million requests", 1.0),
}


def draw(plans: Plans, objective: Objective, path: str | Path) -> None:
    """Draws the plans that nothing beats, the best one and the two extremes.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
      ValueError: if Matplotlib does not know the ending of the file.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need matplotlib: pip install matplotlib") from None
    label, factor = UNITS[objective]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    # The palette of Okabe and Ito; markers differ, for grey print.
    groups = [
        ("no plan beats", plans.front, "#767676", "."),
        ("all on the device", [plans.device], "#009E73", "s"),
        ("all in the cloud", [plans.cloud], "#D55E00", "^"),
        ("best", [plans.best], "#0072B2", "o"),
    ]
    for name, rows, colour, marker in groups:
        x = [factor * value(row.forecast, objective) for row in rows]
        y = [100 * row.forecast.accuracy for row in rows]
        line = "-" if rows is plans.front else "none"
        axes.plot(x, y, linestyle=line, color=colour, marker=marker, label=name)
    axes.set(xlabel=label, ylabel="accuracy on held-out samples (%)")
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
