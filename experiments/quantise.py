"""An int8 artifact of a run, and the four corners: whole network or early exits, float32 or int8.

    python -m experiments.quantise --run runs/cifar10 --to artifact_int8

Convolutions are quantised with the ranges of `calibrate`. Temperatures are fitted again on the
quantised answers to `calibrate`, and thresholds chosen again on those to `choose`. All figures are
of `test`. Each contender is timed in a process of its own, by `experiments.engines`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import eejax
from eejax import bundle as bundles
from eejax import policies
from eejax.artifact.writing import models
from eejax.bundle import Bundle
from eejax.evaluation.routing import route, score
from eejax.onnx.quantising import chained
from eejax.policies import Policy
from eejax.runtime import HeldOut
from eejax.trace import Trace, recorded
from experiments import command_line
from experiments.checks import require, require_all
from experiments.cifar.config import Config
from experiments.command_line import execute, from_json, read_run
from experiments.data import splits
from experiments.data.splits import Dataset, Split
from experiments.engines.contenders import SINGLES, Contender, plain_model
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.latency.plot import milliseconds
from experiments.report.environment import describe

_PART = 250  # images a run, which bounds memory


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Export a run in int8, with temperatures and thresholds chosen on the quantised answers, and
    measure what that and early exits gain together."""

    run: Path
    """Directory that experiments.cifar made."""
    to: Path
    """Directory of the artifact."""
    budget: float = 0.6
    """Mean cost that the thresholds are chosen for, as a fraction of the whole network's
    multiply-accumulates."""
    batches: tuple[int, ...] = (1, 256)
    """Images a call."""
    rounds: int = 15
    """Times that each contender is timed; the median counts."""
    json: Path | None = None
    """File for the rows, as a list."""
    picture: Path | None = None
    """File for a picture of accuracy against time at the largest batch, .svg or .png."""


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line.

    Raises:
      ValueError, FileNotFoundError: if a value is out of range; one line.
    """
    default: Any = dataclasses.MISSING
    arguments = command_line.parse(Arguments, "python -m experiments.quantise", argv, default)
    require_all("", arguments, "batches rounds", lambda n: n >= 1, "at least 1")
    require(0 < arguments.budget <= 1, "budget", arguments.budget, "a fraction of the cost")
    check_parents(arguments, "json", "picture")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, and status 2."""
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, Bundle, Dataset]:
        arguments = parse(argv)
        config = from_json(Config, read_run(arguments.run)["config"])
        bundle = bundles.load(arguments.run)
        return arguments, bundle, splits.load(config.data, config.seed)

    return execute(begin, lambda begun: _work(*begun, argv, console), (OSError, RuntimeError))


def _work(
    arguments: Arguments, bundle: Bundle, data: Dataset, argv: Sequence[str], console: Console
) -> int:
    environment = describe("experiments.quantise", argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, console.status("") as spinner:
        contenders = []
        for precision in ("float32", "int8"):
            images = data.calibrate.images if precision == "int8" else None
            spinner.update(f"{precision}: answers of every exit")
            chosen, of_precision = decided(bundle, data, images, arguments.budget)
            rows += [{"precision": precision, **row} for row in of_precision]
            place = Path(scratch) / precision
            artifact = arguments.to if precision == "int8" else place / "artifact"
            write(chosen, data.test.images[:32], images, artifact, place)
            contenders.append((Contender("onnxruntime", place), chosen.thresholds))
        try:
            _time(arguments, contenders, rows, data.test.images, spinner.update)
        finally:
            for contender, _ in contenders:
                contender.end()
    console.print(table(rows, arguments.batches))
    console.print(f"int8 artifact: {arguments.to}")
    if arguments.json is not None:
        write_json(arguments.json, [{**row, **environment} for row in rows])
    if arguments.picture is not None:
        picture(rows, arguments.batches[-1]).savefig(arguments.picture, dpi=150)
    return 0


def decided(
    bundle: Bundle, data: Dataset, images: np.ndarray | None, budget: float
) -> tuple[Bundle, list[dict[str, Any]]]:
    """The bundle with temperatures and thresholds chosen on its models' answers, and what whole
    network and early exits come to on the test split.

    Args:
      bundle: of a run.
      data: its splits.
      images: to quantise with; None for float32.
      budget: mean cost, as a fraction.

    Raises:
      ValueError: if the policy needs a learned gate, which models do not give.
    """
    rule = bundle.policy.rule
    name = bundle.policy.params.policy.rule.name if rule.name == "temperature" else rule.name
    if policies.POLICIES[name].needs_gate:
        raise ValueError(f"the policy {name} needs a learned gate; choose another for this run.")
    bare = dataclasses.replace(bundle, policy=policies.max_prob)
    stages = models(bare, images)
    cost = bundle.costs.fractions

    def trace(split: Split) -> Trace:
        parts = [split.images[i : i + _PART] for i in range(0, len(split.images), _PART)]
        answers = [logits for logits, _ in chained(stages, parts, bare.thresholds)]
        return recorded(np.stack(answers, 1), split.labels)

    policy: Policy = policies.fit(name, trace(data.calibrate), cost)
    held_out = score(policy, trace(data.choose))
    correct = held_out.predictions == data.choose.labels[:, None]
    choice = eejax.for_budget(held_out.scores, correct, cost, budget)
    scored = score(policy, trace(data.test))
    routed = route(scored, choice.thresholds)
    whole = (scored.predictions[:, -1] == data.test.labels).mean()
    early = (routed.logits.argmax(-1) == data.test.labels).mean()
    kept = HeldOut(held_out.scores, correct)
    chosen = dataclasses.replace(bundle, policy=policy, thresholds=choice.thresholds, held_out=kept)
    return chosen, [
        {"network": "whole", "accuracy": float(whole), "cost": 1.0},
        {
            "network": "early exits",
            "accuracy": float(early),
            "cost": float(cost[routed.exits].mean()),
            "exits": [
                float((scored.predictions[:, e] == data.test.labels).mean())
                for e in range(len(cost))
            ],
        },
    ]


def write(
    bundle: Bundle, shown: np.ndarray, images: np.ndarray | None, artifact: Path, place: Path
) -> None:
    """Writes an artifact, and beside it what `experiments.engines` times.

    Args:
      bundle: of `decided`.
      shown: images whose answers are recorded.
      images: to quantise with; None for float32.
      artifact: its directory.
      place: of the process that times it; made here.
    """
    place.mkdir(parents=True)
    eejax.export(bundle, artifact, layers=["onnx"], images=shown, quantise=images)
    (place / "plain.onnx").write_bytes(plain_model(bundle, images))
    if artifact != place / "artifact":
        (place / "artifact").symlink_to(artifact.resolve())


def _time(
    arguments: Arguments,
    contenders: Sequence[tuple[Contender, np.ndarray]],
    rows: Sequence[dict[str, Any]],
    images: np.ndarray,
    say: Any,
) -> None:
    """Adds times to the rows, which are whole and early for each contender in turn."""
    kinds = [(c, kind, limits) for c, limits in contenders for kind in ("plain", "early")]
    for batch in arguments.batches:
        served = np.resize(images, (SINGLES if batch == 1 else batch, *images.shape[1:]))
        times: list[list[float]] = [[] for _ in kinds]
        for done in range(arguments.rounds):
            say(f"batch {batch}: round {done + 1} of {arguments.rounds}")
            for (contender, kind, limits), taken in zip(kinds, times, strict=True):
                taken.append(contender.ask("time", kind, served, batch, limits))
        for row, taken in zip(rows, times, strict=True):
            low, middle, high = np.percentile(taken, [25, 50, 75])
            row[f"ms_{batch}"] = 1000 * middle / (SINGLES if batch == 1 else 1)
            row[f"spread_{batch}"] = (high - low) / middle


def table(rows: Sequence[dict[str, Any]], batches: Sequence[int]) -> Table:
    """The four corners for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("network", "precision"):
        shown.add_column(name, no_wrap=True)
    columns = [f"ms, batch {batch}" for batch in batches]
    for name in ("accuracy %", "cost", *columns, "quicker"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = f"ms_{batches[-1]}"
    for row in rows:
        times = [
            f"{milliseconds(row[f'ms_{b}'])} ({100 * row[f'spread_{b}']:.0f}%)" for b in batches
        ]
        shown.add_row(
            row["network"],
            row["precision"],
            f"{100 * row['accuracy']:.1f}",
            f"{row['cost']:.2f}",
            *times,
            f"{rows[0][last] / row[last]:.2f}",
        )
    return shown


def picture(rows: Sequence[dict[str, Any]], batch: int) -> Figure:
    """Accuracy against time, a point for each corner."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for precision, colour in (("float32", "C0"), ("int8", "C1")):
        of_it = [row for row in rows if row["precision"] == precision]
        times, accuracies = ([row[k] for row in of_it] for k in (f"ms_{batch}", "accuracy"))
        percent = [100 * a for a in accuracies]
        axes.plot(times, percent, color=colour, linewidth=1, label=precision)
        for x, y, row in zip(times, percent, of_it, strict=True):
            marker = "s" if row["network"] == "whole" else "o"
            axes.plot(x, y, marker, color=colour)
            axes.annotate(row["network"], (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(f"milliseconds for {batch} image{'s' if batch > 1 else ''}")
    axes.set_ylabel("accuracy, %")
    axes.margins(x=0.3, y=0.3)
    axes.set_xlim(left=0)
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
