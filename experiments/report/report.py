"""What a run leaves behind for people: a table on the terminal, report.json and report.html.

    console.print(table(report))
    write_json(run / "report.json", report)
    write_html(run / "report.html", report, history=..., reliability=..., gallery=..., classes=...)

`report` is one dict of plain data. These keys are always there:

    dataset, device, versions, seed
    exits      [{index, macs, accuracy, ece}]
    policies   [{name, target, thresholds, accuracy, mean_macs, exit_fractions}]
    curve      {policy: [{mean_macs, accuracy}]}
    inference  [{strategy, batch, ms, plain_ms, ideal_ms, speedup, efficiency}]
    train      {seconds, images_per_second, epochs}

Whatever else it holds (`notice`, `command`, `whole_macs`, ...) is shown where it is known here. A
number that is None or not finite is shown as "-".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from experiments.report import page, plots, words
from experiments.report import reading as reports
from experiments.report.page import Gallery

__all__ = ["Gallery", "table", "write_html", "write_json"]


def table(report: Mapping[str, Any]) -> Group:
    """The report for the terminal; 80 columns are enough, and without colour nothing is lost.

    Words are plain ASCII, so that a pipe with an old encoding can take them.
    """
    parts: list[Any] = [Text(f"{report['dataset']}, seed {report['seed']}", style="bold")]
    parts += [Text(f"NOTICE: {t}", style="bold yellow") for t in words.listed(report.get("notice"))]
    parts += [Text(words.headline(report)), Text("")]
    parts += [
        _rich("Exits", words.exit_cells(report)),
        Text(""),
        _rich("Policies", words.policy_cells(report)),
    ]
    parts += [Text(t, style="yellow") for t in words.failures(report)]
    if report["inference"]:
        parts += [Text(""), _rich("Time", words.inference_cells(report))]
    parts += [Text(""), Text(words.training(report))]
    parts += [Text(f"{name}: {value}", style="dim") for name, value in words.facts(report)]
    parts += [
        Text(f"WARNING: {t}", style="bold yellow") for t in words.listed(report.get("warnings"))
    ]
    return Group(*parts)


def write_json(
    path: str | os.PathLike[str], report: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Writes strict JSON: what is not a finite number becomes null. Replaces the file in one step.

    Raises:
        TypeError: a value is neither plain data nor a NumPy array, and so has no JSON form.
    """
    text = json.dumps(_plain(report), indent=1, allow_nan=False, ensure_ascii=False)
    _replace(Path(path), text + "\n")


def write_html(
    path: str | os.PathLike[str],
    report: Mapping[str, Any],
    *,
    history: Sequence[Mapping[str, Any]],
    reliability: Sequence[Mapping[str, Any]],
    gallery: Sequence[Gallery],
    classes: Sequence[str],
) -> None:
    """Writes the page: one file that fetches nothing. Replaces the file in one step.

    Args:
        path: where to; its folder is made if need be.
        report: see the module.
        history: one row an epoch, see `eejax.plots.training_curves`; empty if nothing was trained.
        reliability: one set of bins an exit, see `eejax.plots.reliability`; or empty.
        gallery: the images that took an exit; an exit without any is shown as empty.
        classes: the name of each label.

    Raises:
        ValueError: the parts speak of different numbers of exits, or a gallery is not well formed.
    """
    exits = len(report["exits"])
    if reliability and len(reliability) != exits:
        raise ValueError(f"{len(reliability)} sets of reliability bins for {exits} exits")
    by_exit = {pictures.exit: pictures for pictures in gallery}
    if len(by_exit) < len(gallery) or not set(by_exit) <= set(range(exits)):
        numbers = [pictures.exit for pictures in gallery]
        raise ValueError(f"galleries of exits {numbers} (0-based) for {exits} exits; one each")
    pictures = _gallery_blocks(by_exit, exits, classes)  # first, because it may refuse its input
    sections = [
        ("cost", "Accuracy against cost", _cost_blocks(report)),
        ("histogram", "Where images leave", _histogram_blocks(report)),
        ("exits", "The exits one by one", _exit_blocks(report, reliability)),
        ("time", "Time", _time_blocks(report)),
        ("training", "Training", _training_blocks(report, history)),
        ("gallery", "Images by exit", pictures),
    ]
    body = [page.paragraph(f"Notice: {t}", "note") for t in words.listed(report.get("notice"))]
    body += [page.paragraph(words.headline(report), "lead")]
    body += [page.paragraph(f"Warning: {t}", "note") for t in words.listed(report.get("warnings"))]
    body += [page.navigation([(identity, heading) for identity, heading, _ in sections])]
    body += [page.section("made", "How it was made", [page.facts(words.facts(report))])]
    body += [page.section(*parts) for parts in sections]
    _replace(Path(path), page.document(f"eejax report: {report['dataset']}", body))


# --- the sections of the page


def _cost_blocks(report: Mapping[str, Any]) -> list[str]:
    figure = plots.cost_curve(
        reports.curve_points(report),
        reports.exit_points(report),
        points=reports.chosen_points(report),
        colours=plots.policy_colours(report),
    )
    return [
        page.paragraph(
            "Each image leaves at the first exit whose score reaches that exit's threshold; moving "
            "the thresholds trades accuracy for computation along a line. Higher and further left "
            "is better; a diamond is the network cut off at that exit for all images."
        ),
        page.plot(figure, "fig-cost", "Accuracy against mean cost per policy."),
        page.paragraph(
            "Accuracy on the test images and mean cost (a fraction of the whole network's "
            "multiply-accumulates). Change is in points against the whole network; met says "
            "whether the target, for which the thresholds were chosen on other images, holds here."
        ),
        page.table(words.policy_cells(report)),
        *(page.paragraph(text, "note") for text in words.failures(report)),
        page.paragraph(
            "The thresholds, and the accuracy and cost they had on the held-out images that they "
            "were chosen on. An exit whose threshold is off is never taken."
        ),
        page.table(words.threshold_cells(report)),
    ]


def _histogram_blocks(report: Mapping[str, Any]) -> list[str]:
    policies = reports.leading_policies(report)
    if not policies:
        return [page.paragraph("No policy has a result.", "soft")]
    colours = plots.policy_colours(report)
    figure = plots.exit_histogram(
        [policy["exit_fractions"] for policy in policies],
        [reports.policy_label(policy) for policy in policies],
        colours=[colours[policy["name"]] for policy in policies],
    )
    text = (
        "The share of test images that each exit answers: the further left, the more is saved; a "
        "single tall bar means that the policy treats all images alike."
    )
    alt = "Share of test images by exit and policy; the numbers are in the table above."
    return [page.paragraph(text), page.plot(figure, "fig-histogram", alt)]


def _exit_blocks(report: Mapping[str, Any], bins: Sequence[Mapping[str, Any]]) -> list[str]:
    points = reports.exit_points(report)
    blocks = [
        page.paragraph(
            "How good each exit is when it has to answer every test image, whatever its confidence."
        ),
        page.plot(
            plots.accuracy_per_exit(points[:, 1], points[:, 0]),
            "fig-accuracy",
            "Accuracy of each exit; the numbers are in the table below.",
        ),
        page.table(words.exit_cells(report)),
        *(page.paragraph(text) for text in words.overthinking(report)),
    ]
    if not bins:
        return blocks
    figure = plots.reliability(bins, [row["ece"] for row in report["exits"]])
    text = (
        "An exit that says 0.8 should be right on 80 % of such images: dots on the diagonal. Below "
        "it the exit is too sure of itself, and a threshold on its confidence lets errors out. A "
        "dot's area is the number of images; ECE, the expected calibration error, is the mean "
        "distance from the diagonal."
    )
    alt = (
        "Accuracy against confidence for each exit; the calibration errors are in the table above."
    )
    return [
        *blocks,
        "<h3>Reliability</h3>",
        page.paragraph(text),
        page.plot(figure, "fig-reliability", alt),
    ]


def _time_blocks(report: Mapping[str, Any]) -> list[str]:
    if not report["inference"]:
        return [page.paragraph("Inference was not timed in this run.", "soft")]
    text = (
        "Measured time of a batch with early exit (ms) beside the network without early exits "
        "(plain ms). Speedup is plain over measured, below 1 a loss; efficiency is the ideal time, "
        "that of the stages which the images need, over the measured one. Spread is the "
        "interquartile range over the median."
    )
    return [page.paragraph(text), page.table(words.inference_cells(report, full=True))]


def _training_blocks(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    blocks = [page.paragraph(words.training(report))]
    if not history:
        return [*blocks, page.paragraph("No history of the training was kept.", "soft")]
    text = (
        "Each exit has a line of its own, dark for the first and light for the last; a growing gap "
        "between training and held-out accuracy is overfitting."
    )
    figure, alt = plots.training_curves(history), "Loss and accuracy per exit by epoch."
    return [*blocks, page.paragraph(text), page.plot(figure, "fig-training", alt)]


def _gallery_blocks(
    by_exit: Mapping[int, Gallery], exits: int, classes: Sequence[str]
) -> list[str]:
    text = (
        "Test images by the exit that answered them, easy ones first: exit by exit, and the most "
        "confident answers of an exit first. Below each are the answer and its confidence; a "
        "wrong answer has a frame and the true class."
    )
    pictures = [page.gallery(by_exit.get(e), e + 1, classes) for e in range(exits)]
    return [page.paragraph(text), *pictures]


# --- the terminal and the files


def _rich(title: str, cells: words.Cells) -> Table:
    # Columns of numbers never wrap; columns of words give way, so that 80 columns hold every digit.
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in cells.columns:
        wraps = name in cells.text
        header = Text(name if wraps else name.replace(" ", "\n"))
        justify = "left" if wraps else "right"
        made.add_column(header, justify=justify, no_wrap=not wraps, overflow="fold")
    for row in cells.rows:
        made.add_row(*map(Text, row))
    return made


def _plain(value: Any) -> Any:
    """The value as JSON holds it: NumPy to lists and numbers, what is not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
