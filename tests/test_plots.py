"""The pictures show what they are given, for 1 to 10 exits and 6 policies, without warnings."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from experiments.report import plots
from experiments.report import reading as reports

NAMES = ("max_prob", "entropy", "margin", "gate", "patience", "ensemble")


def make_report(exits: int, policies: int) -> dict[str, Any]:
    """Only the keys that a report always has."""
    macs = np.linspace(1e6, 4e6, exits + 1)[1:]
    accuracy = np.linspace(0.5, 0.9, exits + 1)[1:]
    rows = zip(macs, accuracy, strict=True)
    points = [{"mean_macs": float(m), "accuracy": float(a)} for m, a in rows]
    return {
        "exits": [{"index": e, "macs": p["mean_macs"], "accuracy": p["accuracy"], "ece": 0.01}
                  for e, p in enumerate(points)],
        "policies": [{"name": n, "target": {"kind": "budget", "value": 0.6}, "accuracy": 0.8,
                      "mean_macs": 2e6, "thresholds": [0.5] * (exits - 1),
                      "exit_fractions": [1 / exits] * exits} for n in NAMES[:policies]],
        "curve": dict.fromkeys(NAMES[:policies], points),
    }  # fmt: skip


def draw(figure: Figure) -> None:
    """Lays out; pytest turns a layout warning into an error."""
    figure.draw_without_rendering()


def lines(axes: Axes, colour: str) -> list[np.ndarray]:
    found = [line for line in axes.lines if line.get_color() == colour]
    return [np.asarray(line.get_xydata(), float) for line in found]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes if axes.get_title("left")]


@pytest.mark.parametrize(("exits", "policies"), [(1, 1), (2, 0), (7, 2), (10, 6)])
def test_every_figure_draws_for_any_size(exits: int, policies: int) -> None:
    report = make_report(exits, policies)
    bins = [{"confidence": [0.5, 0.9], "accuracy": [0.4, 0.9], "count": [3, 9]}] * exits
    accuracies = [row["accuracy"] for row in report["exits"]]
    history = [{"epoch": 1, "loss": 2.0, "held_out_accuracy": accuracies}]
    draw(plots.summary(report))
    draw(plots.cost_curve(reports.curve_points(report), reports.exit_points(report)))
    draw(plots.accuracy_per_exit(accuracies))
    draw(plots.reliability(bins))
    draw(plots.training_curves(history))
    if policies:
        rows = [policy["exit_fractions"] for policy in report["policies"]]
        draw(plots.exit_histogram(rows, NAMES[:policies]))


def test_cost_curve_is_sorted_by_cost_and_leaves_out_what_is_unknown() -> None:
    curves = {"p": [[0.9, 0.8], [0.3, 0.5], [0.5, np.nan]]}
    figure = plots.cost_curve(curves, [[0.3, 0.5], [1.0, 0.8]], colours={"p": "#123456"})
    drawn = [line for line in lines(figure.axes[0], "#123456") if len(line)]
    np.testing.assert_allclose(drawn, [[[0.3, 50], [0.9, 80]]])


def test_cost_curve_numbers_the_exits_and_names_the_whole_network() -> None:
    figure = plots.cost_curve({}, [[0.3, 0.5], [0.6, np.nan], [1.0, 0.876]])
    words = {text.get_text() for text in figure.axes[0].texts}
    assert words == {"1", "3", "whole network 87.6 %"}


def test_cost_curve_reaches_exits_that_cost_more_than_the_whole_network() -> None:
    figure = plots.cost_curve({}, [[0.5, 0.5], [1.3, 0.8]])
    assert figure.axes[0].get_xlim()[1] > 1.3


def test_legend_lies_outside_the_axes() -> None:
    report = make_report(5, 6)
    figure = plots.summary(report)
    figure.savefig(io.BytesIO(), format="png")
    parts = [figure, *figure.subfigs]
    (legend,) = [legend for part in parts for legend in part.legends]
    box = legend.get_window_extent()
    assert {text.get_text() for text in legend.get_texts()} >= set(NAMES)
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_a_policy_keeps_its_colour_between_figures() -> None:
    report = make_report(3, 6)
    report["policies"][0]["accuracy"] = None  # it has no result, so the histogram lacks it
    report["curve"] = {}
    colours = plots.policy_colours(report)
    assert len(set(colours.values())) == 6
    figure = plots.summary(report)
    bars = {axes.get_title("left").split(",")[0]: axes.patches[0].get_facecolor()
            for axes in figure.axes if axes.patches}  # fmt: skip
    assert "max_prob" not in bars
    curve = next(axes for axes in figure.axes if axes.get_ylabel() == "accuracy (%)")
    for name, colour in bars.items():
        assert to_rgba(colours[name]) == colour
        assert any(len(line) for line in lines(curve, colours[name]))


def test_histogram_heights_and_words() -> None:
    figure = plots.exit_histogram([[0.996, 0.004, 0.0], [0.25, 0.25, 0.5]], ["a", "b"])
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(heights, [[99.6, 0.4, 0], [25, 25, 50]])
    words = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert words == [["100", "<1", "0"], ["25", "25", "50"]]


def test_summary_keeps_to_one_row_a_policy_name_when_there_are_many() -> None:
    report = make_report(3, 4)
    drops = [policy | {"target": {"kind": "drop", "value": 0.01}} for policy in report["policies"]]
    report["policies"] += drops
    assert titles(plots.summary(report)) == [f"{name}, cost <= 0.60" for name in NAMES[:4]]


def test_reliability_computes_the_error_that_is_not_given_and_skips_empty_bins() -> None:
    bins = [
        {
            "confidence": [None, 0.1, 0.6, 0.9],
            "accuracy": [None, 0.0, 0.5, 0.9],
            "count": [0, 0, 10, 30],
        }
    ]
    assert titles(plots.reliability(bins)) == ["exit 1: ECE 0.025"]
    assert titles(plots.reliability(bins, [0.123])) == ["exit 1: ECE 0.123"]
    (dots,) = plots.reliability(bins).axes[0].collections[1:]
    offsets = np.asarray(dots.get_offsets(), float)
    np.testing.assert_allclose(offsets, [[0.6, 0.5], [0.9, 0.9]])


def test_reliability_of_an_exit_without_any_image() -> None:
    draw(plots.reliability([{"confidence": [None], "accuracy": [None], "count": [0]}]))


def test_training_curves_show_gates_only_where_there_are_any() -> None:
    row = {"epoch": 1, "loss": 1.0, "train_accuracy": [0.5, 0.6], "held_out_accuracy": [0.4, 0.5]}
    plain = plots.training_curves([row, row | {"epoch": 2}])
    gated = plots.training_curves([row | {"gate_mean": np.array([0.3, 0.9]), "gate_entropy": 0.5}])
    assert [axes.get_ylabel() for axes in plain.axes] == ["training loss", "accuracy (%)"]
    assert len(gated.axes) == 4
    assert len(plain.axes[1].lines) == 4
    draw(gated)


def test_training_curves_with_a_key_that_only_some_epochs_have() -> None:
    history = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": None, "held_out_accuracy": [0.5]}]
    (line,) = plots.training_curves(history).axes[1].lines
    drawn = np.asarray(line.get_xydata(), float)
    np.testing.assert_allclose(drawn, [[1, np.nan], [2, 50]])


def test_the_same_numbers_give_the_same_file() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    for buffer in (first, second):
        plots.summary(make_report(4, 2)).savefig(buffer, format="png")
    assert first.getvalue() == second.getvalue()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.cost_curve({}, np.empty((0, 2))), "no exit"),
        (lambda: plots.cost_curve({"p": [0.1, 0.2]}, [[1, 1]]), r"curve p .* got shape \(2,\)"),
        (lambda: plots.exit_histogram([0.5, 0.5], ["p"]), r"got shape \(2,\)"),
        (lambda: plots.exit_histogram([[0.5, 0.5]], []), "0 labels for 1 policies"),
        (lambda: plots.accuracy_per_exit([]), r"got shape \(0,\)"),
        (lambda: plots.accuracy_per_exit([0.5, 0.6], [1.0]), "1 costs for 2 exits"),
        (lambda: plots.reliability([]), "no exit"),
        (lambda: plots.reliability([{"confidence": [1], "accuracy": [], "count": [1]}]), "exit 1"),
        (lambda: plots.training_curves([]), "history is empty"),
        (lambda: plots.summary({"exits": [], "policies": []}), "no exit"),
    ],
)
def test_mistakes_are_told(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_pyplot_is_not_imported() -> None:
    """Pyplot picks a backend and keeps every figure open."""
    code = (
        "import sys; from experiments.report import plots; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
