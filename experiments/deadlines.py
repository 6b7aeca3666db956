"""Whether inference under a deadline keeps it, and which exit predicts by then.

python -m experiments.deadlines
python -m experiments.deadlines --network fast --calls 2000 --json deadlines.json
python -m experiments.deadlines --run runs/digits --milliseconds 0.3 0.5
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import eejax
from experiments import command_line
from experiments.checks import require, require_all
from experiments.files import write_json
from experiments.latency.arguments import check_parents, spaced
from experiments.latency.workload import Workload, random_workload, run_workload
from experiments.report.environment import describe
from experiments.train.config import FamilyName, NetworkConfig

IMAGES = 64


@dataclass(frozen=True)
class Arguments:
    """Serve single images under deadlines and report how long calls took: the median, the 99th
    percentile and the longest, how many were late, and which exits predicted. All thresholds are
    off, so that the clock alone decides. Deadlines of different length take turns, call by call."""

    run: Path | None = None
    """Directory that experiments.cifar made. Default: a random network."""
    network: FamilyName = "resnet"
    """Random network: its family, as --network.name of experiments.cifar."""
    depth: int | None = None
    """Random network: number of layers, 6n + 2 (resnet, 56 by default), or of blocks."""
    milliseconds: tuple[float, ...] = ()
    """Deadlines. Default: for each exit 1.1 times the longest time that it was measured to need;
    and half of the first exit's, which cannot be kept."""
    calls: int = 1000
    """Timed calls of each deadline."""
    seed: int = 0
    """Seed of the random network and its images."""
    json: Path | None = None
    """File for the rows, as a list."""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr.

    Returns:
      The exit status: 0, 2 for a mistake, or 130 after Ctrl-C.
    """
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, Workload]:
        arguments = command_line.parse(
            Arguments, "python -m experiments.deadlines", argv, Arguments()
        )
        require(arguments.calls >= 1, "calls", arguments.calls, "at least 1")
        require_all("", arguments, "milliseconds", lambda ms: ms > 0, "positive numbers")
        check_parents(arguments, "json")
        with console.status("building the network"):
            if arguments.run is not None:
                return arguments, run_workload(arguments.run, IMAGES)
            config = spaced(NetworkConfig(name=arguments.network, depth=arguments.depth))
            return arguments, random_workload(config, "max_prob", arguments.seed, IMAGES)

    def work(begun: tuple[Arguments, Workload]) -> None:
        arguments, workload = begun
        environment = describe("experiments.deadlines", argv)
        with console.status(f"{arguments.calls} calls of each deadline"):
            rows = measure(workload, arguments.milliseconds, arguments.calls)
        console.print(f"{workload.name}\n{environment['device']}")
        console.print(_table(rows))
        if arguments.json is not None:
            rows = [{**row, "seed": arguments.seed, **environment} for row in rows]
            write_json(arguments.json, rows)

    return command_line.execute(begin, work, (OSError,))


def measure(workload: Workload, milliseconds: Sequence[float], calls: int) -> list[dict[str, Any]]:
    """Rows of single-image calls under deadlines, which take turns.

    Args:
      workload: network, policy and images.
      milliseconds: deadlines; none for the default of `Arguments.milliseconds`.
      calls: timed calls of each deadline.
    """
    network, images = workload.network, workload.images
    predict = eejax.anytime(network, workload.policy, workload.variables, images[:1])
    needed = 1e3 * exit_seconds(predict.times.seconds)
    deadlines = list(milliseconds) or [0.5 * needed[0], *(1.1 * needed)]
    never = np.full(network.num_exits - 1, np.inf, np.float32)
    times, exits = np.zeros((len(deadlines), calls)), np.zeros((len(deadlines), calls), int)
    for call in range(calls):
        image = images[call % len(images)][None]
        for i, deadline in enumerate(deadlines):
            start = time.perf_counter()
            prediction = predict(never, image, deadline)
            times[i, call] = 1e3 * (time.perf_counter() - start)
            exits[i, call] = prediction.exits[0]
    return [
        {
            "network": workload.name,
            "deadline_ms": float(deadline),
            "median_ms": float(np.median(ms)),
            "p99_ms": float(np.quantile(ms, 0.99)),
            "longest_ms": float(ms.max()),
            "late": float((ms > deadline).mean()),
            "exit_fractions": (np.bincount(e, minlength=network.num_exits) / calls).tolist(),
        }
        for deadline, ms, e in zip(deadlines, times, exits, strict=True)
    ]


def exit_seconds(seconds: np.ndarray) -> np.ndarray:
    """The longest time `[E]` from the start of a call to the prediction of each exit.

    All stages up to the exit, and once the time of a call outside of its stages.

    Args:
      seconds: `[E + 1, R]`, as `eejax.anytime` measures them.
    """
    longest = seconds.max(axis=1)
    return np.cumsum(longest[:-1]) + longest[-1]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("deadline ms", "median", "p99", "longest", "late", "exits take")
    for row in rows:
        taken = " ".join(f"{100 * share:.0f}" for share in row["exit_fractions"])
        times = (row[key] for key in ("deadline_ms", "median_ms", "p99_ms", "longest_ms"))
        table.add_row(*(f"{ms:.3g}" for ms in times), f"{100 * row['late']:.2f} %", f"{taken} %")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
