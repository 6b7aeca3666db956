"""How soon `eejax.serving.drift` notices that images have changed, and how often it is wrong.

    python -m experiments.drift --run runs/cifar10
    python -m experiments.drift --run runs/cifar10 --kinds blur --severities 3 5

Three monitors, each with the whole delta: the shares of images that go on past the exits; the rate
of errors, with the label of every 10th image; and the rate of disagreement with the last exit,
which is computed for every 10th image. The last two take as the promised risk the upper bound of
the rate that the held-out images give with confidence 0.9.

False alarms: test images are the population. Each stream has held-out images of its own, as many as
the run has, and the risk is the population's, the hardest case. Delays: the held-out images are the
run's, and test images are corrupted from some moment on. All draws are with replacement.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import eejax
from eejax.evaluation.routing import route, score
from eejax.serving.drift import Drift, clopper_pearson
from experiments import command_line
from experiments.checks import require, require_all
from experiments.cifar.config import Config
from experiments.data import splits
from experiments.data.corruptions import SEVERITIES, corrupt
from experiments.data.splits import Dataset, Split
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.report.environment import describe

MONITORS = ("exits", "errors", "disagreement")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure how often a drift monitor raises an alarm without a change, and how many corrupted
    test images it takes to raise one, beside what accuracy they cost."""

    run: Path
    """Directory that experiments.cifar made."""
    kinds: tuple[Literal["noise", "blur", "contrast"], ...] = ("noise", "blur", "contrast")
    """Corruptions."""
    severities: tuple[int, ...] = SEVERITIES
    """How strong, from 1 to 5."""
    images: int = 10_000
    """Test images; at most as many as there are."""
    samples: int = 10_000
    """Of a stream without a change, and after a change."""
    before: int = 5_000
    """Samples before a change, beside a change at the start."""
    every: int = 10
    """One in so many samples has a label, or runs to the last exit."""
    delta: float = 0.01
    """Probability of a false alarm that each monitor is to keep."""
    streams: int = 1000
    """Streams without a change."""
    orders: int = 20
    """Streams with each change."""
    seed: int = 0
    """Of all draws."""
    json: Path | None = None
    """File for the rows, as a list."""


class Outcomes(NamedTuple):
    """What becomes of N samples by the run's thresholds.

    Attributes:
      exits: `[N]`, 0-based.
      errors: `[N]` bool, the answer is not the label.
      disagreement: `[N]` bool, the answer is not that of the last exit.
    """

    exits: np.ndarray
    errors: np.ndarray
    disagreement: np.ndarray

    def at(self, chosen: np.ndarray) -> Outcomes:
        """Those of some of the samples."""
        return Outcomes(*(values[chosen] for values in self))


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, and status 2."""
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, eejax.Bundle, Dataset]:
        arguments = parse(argv)
        config = command_line.from_json(Config, command_line.read_run(arguments.run)["config"])
        return arguments, eejax.load(arguments.run), splits.load(config.data, config.seed)

    def work(begun: tuple[Arguments, eejax.Bundle, Dataset]) -> None:
        arguments, bundle, data = begun
        environment = describe("experiments.drift", argv)
        exits = bundle.network.num_exits
        with console.status("running the network"):
            held_out = outcomes(bundle, data.choose)
            tests = corrupted(arguments, bundle, data.test)
        clean = tests["clean", 0]
        numbers = track(range(arguments.streams), "no change", console=console, transient=True)
        rows = false_alarms(arguments, clean, len(held_out.exits), exits, numbers)
        console.print(f"{arguments.run}: {environment['device']}, seed {arguments.seed}")
        console.print(_false_alarm_table(arguments, rows))
        cases = track(tests.items(), "changes", console=console, transient=True)
        for (kind, severity), changed in cases:
            row = {"corruption": kind, "severity": severity, **harm(changed, exits)}
            rows.append({**row, **delays(arguments, held_out, clean, changed, exits)})
        console.print(_harm_table(rows[len(MONITORS) :]))
        for before in (0, arguments.before):
            console.print(_delay_table(arguments, rows[len(MONITORS) :], before))
        if arguments.json is not None:
            write_json(arguments.json, [{**row, **environment} for row in rows])

    return command_line.execute(begin, work, (OSError,))


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line.

    Raises:
      ValueError, FileNotFoundError: if a value is out of range; one line.
    """
    default: Any = dataclasses.MISSING
    arguments = command_line.parse(Arguments, "python -m experiments.drift", argv, default)
    require_all("", arguments, "severities", lambda s: s in SEVERITIES, "numbers from 1 to 5")
    counts = "images samples before every streams orders"
    require_all("", arguments, counts, lambda n: n >= 1, "at least 1")
    require(0 < arguments.delta < 1, "delta", arguments.delta, "a number between 0 and 1")
    check_parents(arguments, "json")
    return arguments


def outcomes(bundle: eejax.Bundle, split: Split) -> Outcomes:
    """What becomes of images by a bundle's thresholds."""
    trace = eejax.collect(bundle.network, bundle.variables, *split)
    scored = score(bundle.policy, trace)
    routed = route(scored, bundle.thresholds)
    answers = routed.logits.argmax(-1)
    last = scored.predictions[:, -1]
    return Outcomes(routed.exits, answers != trace.labels, answers != last)


def corrupted(
    arguments: Arguments, bundle: eejax.Bundle, test: Split
) -> dict[tuple[str, int], Outcomes]:
    """Outcomes of test images by `(corruption, severity)`, first as they are: `("clean", 0)`."""
    images, labels = (array[: arguments.images] for array in test)
    found = {("clean", 0): outcomes(bundle, Split(images, labels))}
    for kind, severity in itertools.product(arguments.kinds, arguments.severities):
        changed = corrupt(images, kind, severity, arguments.seed)
        found[kind, severity] = outcomes(bundle, Split(changed, labels))
    return found


def false_alarms(
    arguments: Arguments, population: Outcomes, held_out: int, exits: int, streams: Any
) -> list[dict[str, Any]]:
    """A row for each monitor: how many streams without a change it raises an alarm in."""
    size = len(population.exits)
    found = dict.fromkeys(MONITORS, 0)
    for stream in streams:
        random = np.random.default_rng((arguments.seed, 0, stream))
        reference = population.at(random.integers(size, size=held_out))
        samples = population.at(random.integers(size, size=arguments.samples))
        for monitor in MONITORS:
            # A bound must be above 0, which is the rate of a population without such losses.
            risk = None if monitor == "exits" else max(getattr(population, monitor).mean(), 1e-9)
            drift = made(monitor, reference, exits, arguments.delta, risk)
            alarm = first_alarm(drift, monitor, samples, exits, arguments.every)
            found[monitor] += alarm is not None
    words = {"streams": arguments.streams, "samples": arguments.samples, "delta": arguments.delta}
    return [{"monitor": name, "false_alarms": n, **words} for name, n in found.items()]


def delays(
    arguments: Arguments, held_out: Outcomes, clean: Outcomes, changed: Outcomes, exits: int
) -> dict[str, Any]:
    """How many samples each monitor sees from a change to its alarm.

    Returns:
      `{"monitor at change": [orders]}`; None for no alarm, not above 0 for one before the change.
    """
    found: dict[str, Any] = {}
    for before, monitor in itertools.product((0, arguments.before), MONITORS):
        found[f"{monitor} at {before}"] = row = []
        risk = None
        if monitor != "exits":
            losses = getattr(held_out, monitor)
            # At 0.2 both ends together fail, the upper one at 0.1.
            risk = clopper_pearson(int(losses.sum()), len(losses), 0.2)[1]
        for order in range(arguments.orders):
            random = np.random.default_rng((arguments.seed, 1, order))
            first = clean.at(random.integers(len(clean.exits), size=before))
            then = changed.at(random.integers(len(changed.exits), size=arguments.samples))
            stream = Outcomes(*map(np.concatenate, zip(first, then, strict=True)))
            drift = made(monitor, held_out, exits, arguments.delta, risk)
            alarm = first_alarm(drift, monitor, stream, exits, arguments.every)
            row.append(None if alarm is None else alarm - before)
    return found


def made(monitor: str, held_out: Outcomes, exits: int, delta: float, risk: float | None) -> Drift:
    """A monitor of all exits, or of a rate with a bound."""
    if monitor != "exits":
        return Drift([], [], risk=risk, delta=delta)
    early = np.arange(exits - 1)[:, None]
    reached, goes_on = (held_out.exits >= early).sum(1), (held_out.exits > early).sum(1)
    return Drift(reached, goes_on, delta=delta)


def first_alarm(drift: Drift, monitor: str, stream: Outcomes, exits: int, every: int) -> int | None:
    """After how many samples of a stream the alarm comes, or None."""
    if monitor != "exits":
        for i, loss in enumerate(getattr(stream, monitor)[every - 1 :: every].tolist()):
            drift.note_loss(loss)
            if drift.alarm:
                return every * (i + 1)
        return None
    for i, exit in enumerate(stream.exits.tolist()):
        for e in range(min(exit + 1, exits - 1)):
            drift.note(e, exit > e)
        if drift.alarm:
            return i + 1
    return None


def harm(changed: Outcomes, exits: int) -> dict[str, Any]:
    """Accuracy, disagreement with the last exit, and the share of the images that take each."""
    return {
        "accuracy": float(1 - changed.errors.mean()),
        "disagreement": float(changed.disagreement.mean()),
        "exits": (np.bincount(changed.exits, minlength=exits) / len(changed.exits)).tolist(),
    }


def _false_alarm_table(arguments: Arguments, rows: Sequence[dict[str, Any]]) -> Table:
    samples, delta = f"{arguments.samples:,}", f"{arguments.delta:g}"
    title = f"no change for {samples} samples: how many streams have an alarm, delta {delta}"
    table = _table(title, "monitor", "alarms", "streams")
    for row in rows:
        table.add_row(row["monitor"], str(row["false_alarms"]), f"{row['streams']:,}")
    return table


def _harm_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("the images", "", "accuracy %", "disagreement %", "leave at exits 1, 2, ... %")
    for row in rows:
        rates = (f"{100 * row[name]:.1f}" for name in ("accuracy", "disagreement"))
        table.add_row(_images(row), *rates, "  ".join(f"{100 * e:4.1f}" for e in row["exits"]))
    return table


def _delay_table(arguments: Arguments, rows: Sequence[dict[str, Any]], before: int) -> Table:
    title = (
        f"samples from a change after {before:,} to the alarm, median (quartiles) of "
        f"{arguments.orders}; none: not within {arguments.samples:,}"
    )
    table = _table(title, "", *MONITORS)
    for row in rows:
        words = (quartiles(row[f"{monitor} at {before}"]) for monitor in MONITORS)
        table.add_row(_images(row), *words)
    return table


def _images(row: dict[str, Any]) -> str:
    return f"{row['corruption']} {row['severity'] or ''}"


def quartiles(values: Sequence[int | None]) -> str:
    """Median and quartiles of delays, in words; alarms before the change are counted apart."""
    early = sum(value is not None and value <= 0 for value in values)
    late = [np.inf if value is None else value for value in values if value is None or value > 0]
    low, middle, high = (
        f"{q:,.0f}" if np.isfinite(q) else "none"
        for q in np.quantile(late or [np.inf], (0.25, 0.5, 0.75), method="inverted_cdf")
    )
    words = f"{middle} ({low}-{high})" if low != "none" else "none"
    missed = sum(value is None for value in values)
    if missed < len(late) and low == "none":
        words += f" in {missed} of {len(late)}"
    return f"{words}, {early} before it" if early else words


def _table(title: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
