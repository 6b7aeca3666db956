"""The pictures show what they are given, for 1 to 10 exits and many policies, without warnings."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import plots
from experiments.report.plots import Series

NAMES = [f"policy {i}" for i in range(12)]
BINS = {"confidence": [0.5, 0.9], "accuracy": [0.4, 0.9], "count": [3, 9]}


def series(name: str, x: Any, y: Any, kind: Any = "policy", **more: Any) -> Series:
    return Series(name, np.asarray(x, float), np.asarray(y, float), kind, **more)


def draw(figure: Figure) -> None:
    """Lays out; pytest turns a layout warning into an error."""
    figure.draw_without_rendering()


def lines(axes: Axes, colour: str) -> list[np.ndarray]:
    some = [line for line in axes.lines if line.get_color() == colour]
    return [np.asarray(line.get_xydata(), float) for line in some]


def texts(figure: Figure) -> list[str]:
    parts = [axes.get_title(side) for axes in figure.axes for side in ("left", "right")]
    return [*parts, *(text.get_text() for axes in figure.axes for text in axes.texts)]


@pytest.mark.parametrize(("exits", "policies"), [(1, 1), (2, 0), (7, 2), (10, 12)])
def test_every_figure_draws_for_any_size(exits: int, policies: int) -> None:
    x, y = np.linspace(0, 1, exits + 1)[1:], np.linspace(0.5, 0.9, exits)
    curves = [series(name, x, y, low=y - 0.01, high=y + 0.01) for name in NAMES[:policies]]
    draw(plots.tradeoff({"joint": [*curves, series("exits", x, y, "exits")]}, "cost"))
    draw(plots.reliability([BINS] * exits, [0.1] * exits))
    draw(plots.training_curves([{"epoch": 1, "loss": 2.0, "held_out_accuracy": list(y)}]))
    if policies:
        draw(plots.exit_histogram({name: [1 / exits] * exits for name in NAMES[:policies]}))
        names = NAMES[:policies]
        draw(plots.intervals(names, [(-0.1, 0, 0.1)] * policies, [True] * policies))
        draw(plots.shares({"a": np.eye(policies), "b": np.eye(policies)}, names, names))


def test_curves_are_sorted_by_cost_and_leave_out_what_is_unknown() -> None:
    figure = plots.tradeoff({"": [series("p", [0.9, 0.3, 0.5], [0.8, 0.5, np.nan])]}, "cost")
    (line,) = lines(figure.axes[0], plots.COLOURS[0])
    np.testing.assert_allclose(line, [[0.3, 50], [0.9, 80]])


def test_exits_are_numbered_and_the_whole_network_is_named() -> None:
    exits = series("exits", [0.3, 0.6, 1.3], [0.86, 0.87, 0.876], "exits")
    figure = plots.tradeoff({"": [exits]}, "cost")
    assert {"1", "2", "3", "whole network 87.6 %"} <= set(texts(figure))
    assert figure.axes[0].get_xlim()[1] > 1.3


def test_axes_use_their_space_and_say_what_is_cut_off() -> None:
    x = np.linspace(0.05, 1, 20)
    tail = series("p", x, [0.2, 0.4, *np.linspace(0.9, 0.92, 18)])
    figure = plots.tradeoff({"": [tail]}, "cost")
    low, high = figure.axes[0].get_ylim()
    assert 85 < low < 90.5
    assert high < 93
    assert figure.axes[0].get_xscale() == "log"
    assert any(text.startswith("2 points below") for text in texts(figure))
    even = plots.tradeoff({"": [series("p", [0.5, 1], [0.9, 0.91])]}, "cost")
    assert even.axes[0].get_xscale() == "linear"
    assert not any("below" in text for text in texts(even))


def test_networks_that_no_cheaper_one_beats_are_connected() -> None:
    networks = series("plain", [0.2, 0.5, 1.0], [0.9, 0.88, 0.93], "networks")
    figure = plots.tradeoff({"": [networks]}, "cost")
    frontier = next(line for line in lines(figure.axes[0], plots.INK) if len(line) == 2)
    np.testing.assert_allclose(frontier, [[0.2, 90], [1.0, 93]])


def test_many_policies_look_different_and_a_legend_lies_outside_the_axes() -> None:
    curves = [series(name, [0.1, 1], [0.8, 0.9]) for name in NAMES]
    figure = plots.tradeoff({"a": curves, "b": curves[:1]}, "cost")
    figure.savefig(io.BytesIO(), format="png")
    (legend,) = figure.legends
    looks = {(h.get_color(), h.get_marker(), str(h.get_linestyle())) for h in legend.legend_handles}  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert len(looks) == len(NAMES)
    box = legend.get_window_extent()
    for axes in figure.axes:
        inside = axes.get_tightbbox()
        assert inside is not None
        assert not box.overlaps(inside)


def test_histogram_heights_and_words() -> None:
    figure = plots.exit_histogram({"a": [0.996, 0.004, 0.0], "b": [0.25, 0.25, 0.5]})
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(heights, [[99.6, 0.4, 0], [25, 25, 50]])
    words = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert words == [["100", "<1", "0"], ["25", "25", "50"]]


def test_reliability_skips_empty_bins() -> None:
    bins = {"confidence": [np.nan, 0.1], "accuracy": [np.nan, 0.0], "count": [0, 10]}
    figure = plots.reliability([bins], [0.123])
    assert texts(figure)[0] == "exit 1: ECE 0.123"
    (dots,) = figure.axes[0].collections[1:]
    np.testing.assert_allclose(np.asarray(dots.get_offsets(), float), [[0.1, 0]])
    draw(plots.reliability([bins | {"count": [0, 0]}], [0.0]))


def test_training_curves_show_gates_only_where_there_are_any() -> None:
    row = {"epoch": 1, "loss": 1.0, "train_accuracy": [0.5, 0.6], "held_out_accuracy": [0.4, 0.5]}
    plain = plots.training_curves([row, row | {"epoch": 2}])
    gated = plots.training_curves([row | {"gate_mean": np.array([0.3, 0.9]), "gate_entropy": 0.5}])
    assert [axes.get_ylabel() for axes in plain.axes] == ["training loss", "accuracy (%)"]
    assert len(plain.axes[1].lines) == 4
    # The entropy is normalised: it has no unit, and 1 is its largest value.
    assert gated.axes[3].get_ylabel().startswith("normalised entropy")
    assert gated.axes[3].get_ylim()[1] < 1.1
    draw(gated)


def test_training_curves_with_a_key_that_only_some_epochs_have() -> None:
    history = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": None, "held_out_accuracy": [0.5]}]
    (line,) = plots.training_curves(history).axes[1].lines
    drawn = np.asarray(line.get_xydata(), float)
    np.testing.assert_allclose(drawn, [[1, np.nan], [2, 50]])


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    for name in "ab":
        figure = plots.tradeoff({"": [series("p", [0.1, 1], [0.8, 0.9])]}, "cost")
        plots.save(tmp_path / name, {"curve": figure})
    for ending in ("svg", "pdf"):
        first, second = ((tmp_path / n / f"curve.{ending}").read_bytes() for n in "ab")
        assert first == second
        assert b"<text" not in first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.tradeoff({"": []}, "cost"), "no point"),
        (lambda: plots.tradeoff({"": [series("p", [np.nan], [1])]}, "cost"), "no point"),
        (lambda: plots.exit_histogram({}), "at least one row"),
        (lambda: plots.exit_histogram({"a": [1.0], "b": [0.5, 0.5]}), "same length"),
        (lambda: plots.reliability([], []), "0 calibration errors for 0 exits"),
        (lambda: plots.reliability([BINS], [0.1, 0.2]), "2 calibration errors for 1 exits"),
        (lambda: plots.training_curves([]), "history is empty"),
    ],
)
def test_mistakes_are_told(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_pyplot_is_not_imported() -> None:
    """Pyplot picks a backend and keeps every figure open."""
    code = (
        "import sys; import experiments.report.report; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
