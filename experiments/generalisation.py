"""Whether thresholds that were chosen on few samples keep their word on others.

python -m experiments.generalisation --run runs/cifar10
python -m experiments.generalisation --run runs/digits --samples 250 500 --splits 100
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import eejax
from eejax.evaluation.routing import score
from eejax.selection.frontier import SLACK, Choice, Frontier, shared
from eejax.selection.thresholds import Search, search
from eejax.trace import collect
from experiments import command_line
from experiments.checks import require, require_all
from experiments.cifar.config import Config
from experiments.data import splits
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.report.environment import describe

GRID = 64


@dataclass(frozen=True)
class Arguments:
    """Draw samples of a run's held-out and test images, choose thresholds on them in several ways,
    and judge them on all other samples, many times. Prints means over the draws: accuracy at each
    budget, and for each drop the loss, how often it was missed, and the cost."""

    run: tuple[Path, ...]
    """Directories that experiments.cifar made."""
    samples: tuple[int, ...] = (250, 1000, 3000)
    """Samples that thresholds are chosen on."""
    budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    """Mean cost, as fractions of the whole network's multiply-accumulates."""
    drops: tuple[float, ...] = (0.005, 0.01)
    """Accuracy that may be lost against the last exit, as fractions."""
    confidence: float = 0.9
    """With which the drops are to be kept, beside 0.5."""
    splits: int = 500
    """Draws of each number of samples."""
    seed: int = 0
    """Of the draws."""
    json: Path | None = None
    """File for the rows, as a list."""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr.

    Returns:
      The exit status: 0, 2 for a mistake, or 130 after Ctrl-C.
    """
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, list[tuple[str, Frontier]]]:
        arguments = command_line.parse(
            Arguments, "python -m experiments.generalisation", argv, Arguments(())
        )
        require(bool(arguments.run), "run", "none", "at least one directory")
        require(arguments.splits >= 2, "splits", arguments.splits, "at least 2")
        fraction = "fractions of the whole network, in (0, 1]"
        require_all("", arguments, "budgets", lambda b: 0 < b <= 1, fraction)
        require_all("", arguments, "drops", lambda drop: drop >= 0, "numbers of at least 0")
        expected = "at least 0.5 and below 1"
        require(0.5 <= arguments.confidence < 1, "confidence", arguments.confidence, expected)
        check_parents(arguments, "json")
        with console.status("recording traces"):
            outcomes = [recorded_outcomes(run) for run in arguments.run]
        fewest = min(len(of_run.scores) for _, of_run in outcomes)
        expected = f"from 2 to less than the {fewest} samples of a run"
        require_all("", arguments, "samples", lambda n: 2 <= n < fewest, expected)
        return arguments, outcomes

    def work(begun: tuple[Arguments, list[tuple[str, Frontier]]]) -> None:
        arguments, outcomes = begun
        environment = describe("experiments.generalisation", argv)
        rows = []
        for name, of_run in outcomes:
            for count in arguments.samples:
                drawn = track(
                    range(arguments.splits),
                    f"{name}, {count} samples",
                    console=console,
                    transient=True,
                )
                results = [judged(of_run, count, arguments, split) for split in drawn]
                rows += [{"network": name, "samples": count, **row} for row in summary(results)]
        console.print(f"{environment['device']}, {arguments.splits} draws, seed {arguments.seed}")
        console.print(_budget_table(rows), _drop_table(rows))
        if arguments.json is not None:
            write_json(arguments.json, [{**row, **environment} for row in rows])

    return command_line.execute(begin, work, (OSError,))


def recorded_outcomes(run: Path) -> tuple[str, Frontier]:
    """A run's name, and the outcomes of its images that nothing was fitted on.

    Those are the splits `choose`, before anything is chosen on it, and `test`.

    Raises:
      ValueError, OSError: if the run cannot be read; one line.
    """
    try:
        config = command_line.from_json(Config, command_line.read_run(run)["config"])
        bundle = eejax.load(run)
    except (ValueError, OSError) as error:
        words = f"--run {run}: {error} Give the directory of a finished run of experiments.cifar."
        raise ValueError(words) from None
    dataset = splits.load(config.data, config.seed)
    scores, correct = [], []
    for split in (dataset.choose, dataset.test):
        trace = collect(bundle.network, bundle.variables, *split)
        scored = score(bundle.policy, trace)
        scores.append(scored.scores)
        correct.append(scored.predictions == trace.labels[:, None])
    name = f"{config.network.name} ({run.name})"
    return name, Frontier(
        np.concatenate(scores),
        np.concatenate(correct).astype(np.float64),
        np.asarray(bundle.costs.fractions),
    )


def judged(outcomes: Frontier, count: int, arguments: Arguments, split: int) -> dict[Any, Any]:
    """What thresholds that were chosen on `count` samples of a draw come to on all others.

    Returns:
      `{(kind, value, method): (loss against the last exit, mean cost, accuracy)}`.
    """
    random = np.random.default_rng((arguments.seed, count, split))
    order, results = random.permutation(len(outcomes.scores)), {}
    chosen, rest = (
        Frontier(outcomes.scores[part], outcomes.accuracy[part], outcomes.cost)
        for part in (order[:count], order[count:])
    )
    last = rest.accuracy[:, -1].mean()
    for kind, method, choose in methods(chosen, arguments.confidence):
        for value in getattr(arguments, f"{kind}s"):
            if kind == "budget" and value < outcomes.cost[0]:
                continue
            on_rest = rest.at(choose(value).thresholds)
            result = (last - on_rest.accuracy, on_rest.mean_cost, on_rest.accuracy)
            results[kind, value, method] = result
    return results


def methods(
    chosen: Frontier, confidence: float
) -> list[tuple[str, str, Callable[[float], Choice]]]:
    """`(budget or drop, name, search)` of everything that is compared, the default last."""
    data = (chosen.scores, chosen.accuracy, chosen.cost)
    smoothed: Search = search(*data)
    as_they_are: Search = search(*data, chosen.accuracy)
    target = chosen.accuracy[:, -1].mean()
    one_shared = shared(*data, GRID)

    def cheapest_outcomes(drop: float) -> Choice:
        def better(accuracy: np.ndarray, mean_cost: np.ndarray) -> Any:
            return np.lexsort((-accuracy, mean_cost, accuracy < target - drop - 1e-9))[0]

        return as_they_are.frontier.best(better)

    def cheapest_shared(drop: float) -> Choice:
        never = chosen.at(np.full(len(chosen.cost) - 1, np.inf, np.float32))
        kept = [c for c in one_shared if c.accuracy >= target - drop]
        return min([never, *kept], key=lambda c: c.mean_cost)

    return [
        ("budget", "outcomes", as_they_are.for_budget),
        ("budget", "geometric", lambda budget: as_they_are.geometric(budget, tolerance=1)),
        ("budget", "shared", lambda budget: shared_within(chosen, budget)),
        ("budget", "default", smoothed.for_budget),
        ("drop", "outcomes", cheapest_outcomes),
        ("drop", "shared", cheapest_shared),
        ("drop", "confidence 0.5", lambda drop: smoothed.for_drop(drop, 0.5)),
        (
            "drop",
            f"confidence {confidence:g}",
            lambda drop: smoothed.for_drop(drop, confidence),
        ),
    ]


def shared_within(chosen: Frontier, budget: float) -> Choice:
    """The highest threshold, one for all exits, with a mean cost of at most the budget."""
    values = np.unique(chosen.scores[:, :-1])
    values = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        choice = chosen.at(np.full(len(chosen.cost) - 1, values[middle], np.float32))
        low, high = (middle, high) if choice.mean_cost <= budget * SLACK else (low, middle)
    return chosen.at(np.full(len(chosen.cost) - 1, values[low], np.float32))


def summary(results: Sequence[dict[Any, Any]]) -> list[dict[str, Any]]:
    """A row for each target and method, means over draws.

    `against_best` is the accuracy of the default less that of the method with the best mean among
    the others, and `standard_error` that of this difference over the draws.
    """
    rows = []
    for kind, value, method in results[0]:
        loss, cost, accuracy = np.array([r[kind, value, method] for r in results]).T
        row = {"kind": kind, "value": value, "method": method, "accuracy": accuracy.mean()}
        row |= {"loss": loss.mean(), "cost": cost.mean(), "missed": (loss > value).mean()}
        rows.append({name: v if isinstance(v, str) else float(v) for name, v in row.items()})
        if method == "default":
            others = [r for r in rows if (r["kind"], r["value"]) == (kind, value)][:-1]
            best = max(others, key=lambda r: r["accuracy"])["method"]
            change = accuracy - [r[kind, value, best][2] for r in results]
            error = change.std(ddof=1) / len(results) ** 0.5
            rows[-1] |= {"against_best": float(change.mean()), "standard_error": float(error)}
    return rows


def _budget_table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("outcomes", "geometric", "shared", "default")
    table = Table("network", "samples", "budget", *(f"{n} %" for n in names), "default - best")
    rows = [row for row in rows if row["kind"] == "budget"]
    for row in rows:
        if row["method"] == "default":
            key = ("network", "samples", "value")
            same = [r for r in rows if all(r[k] == row[k] for k in key)]
            accuracy = {r["method"]: f"{100 * r['accuracy']:.2f}" for r in same}
            change = f"{100 * row['against_best']:+.2f} +- {100 * row['standard_error']:.2f}"
            words = (row["network"], str(row["samples"]), f"{row['value']:.2f}")
            table.add_row(*words, *(accuracy[name] for name in names), change)
    return table


def _drop_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("network", "samples", "drop", "search", "mean loss", "missed", "cost")
    for row in rows:
        if row["kind"] == "drop":
            words = (row["network"], str(row["samples"]), f"{100 * row['value']:.1f} points")
            numbers = (f"{100 * row['loss']:.2f}", f"{100 * row['missed']:.1f} %")
            table.add_row(*words, row["method"], *numbers, f"{row['cost']:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
