"""Whether inference under a deadline keeps it, and what it answers by then.

python -m experiments.deadlines
python -m experiments.deadlines --network fast --calls 2000 --json deadlines.json
python -m experiments.deadlines --run runs/digits --milliseconds 0.3 0.5
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Arguments:
    """Serve single images under deadlines and report how long calls took: the median, the 99th
    percentile and the longest, how many were late, and which exits answered. Images are told apart
    by no threshold (all are off), so that the clock alone decides. Deadlines of different length
    take turns, call by call."""

    run: Path | None = None
    """Directory that experiments.cifar made. Default: a random network."""
    network: Literal["resnet", "fast"] = "resnet"
    """Random network: its backbone."""
    depth: int | None = None
    """Random network: number of layers, 6n + 2 (resnet, 56 by default), or of blocks."""
    milliseconds: tuple[float, ...] = ()
    """Deadlines. Default: what each exit was seen to need at most, and a tenth more; and half of
    what the first needs, which cannot be kept."""
    calls: int = 1000
    """Timed calls of each deadline."""
    seed: int = 0
    """Of the random network and its images."""
    json: Path | None = None
    """File for the rows, as a list."""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr.

    Returns:
      The exit status: 0, or 2 for a mistake.
    """
    from experiments import command_line
    from experiments.latency import flags as latency_flags

    try:
        asked = command_line.parse(Arguments, "python -m experiments.deadlines", argv, Arguments())
        if asked.calls < 1 or not all(ms > 0 for ms in asked.milliseconds):
            raise ValueError("--calls and --milliseconds: give positive numbers.")
        of_random = [] if asked.run is not None else ["--network", asked.network]
        if asked.run is None and asked.depth is not None:
            of_random += ["--depth", str(asked.depth)]
        of_run = [] if asked.run is None else ["--run", str(asked.run)]
        flags = [*of_random, *of_run, "--seed", str(asked.seed), "--batches", "1", "--images", "0"]
        parsed = latency_flags.parse(flags)
        if asked.json is not None and not asked.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json {asked.json}: there is no such directory.")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from rich.console import Console
    from rich.table import Table

    from experiments.latency.subject import subject
    from experiments.report import report
    from experiments.report.environment import circumstances

    now = datetime.datetime.now().astimezone()
    around = circumstances("experiments.deadlines", argv, now)
    console = Console(soft_wrap=True)
    try:
        with console.status("making the network and measuring its stages"):
            made = subject(parsed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with console.status(f"{asked.calls} calls of each deadline"):
        rows = measure(made, asked.milliseconds, asked.calls)
    table = Table("deadline ms", "median", "p99", "longest", "late", "exits take")
    for row in rows:
        taken = " ".join(f"{100 * share:.0f}" for share in row["exit_fractions"])
        times = (row[key] for key in ("deadline_ms", "median_ms", "p99_ms", "longest_ms"))
        table.add_row(*(f"{ms:.3g}" for ms in times), f"{100 * row['late']:.2f} %", f"{taken} %")
    console.print(f"{made.name}\n{around['device']}")
    console.print(table)
    if asked.json is not None:
        report.write_json(asked.json, [{**row, "seed": asked.seed, **around} for row in rows])
    return 0


def measure(subject: Any, milliseconds: Sequence[float], calls: int) -> list[dict[str, Any]]:
    """Rows of single-image calls under deadlines, which take turns.

    Args:
      subject: a `latency_subject.Subject`.
      milliseconds: deadlines; none for those that `Arguments.milliseconds` describes.
      calls: timed calls of each.
    """
    import numpy as np

    import eejax

    network, images = subject.network, subject.images
    predict = eejax.anytime(network, subject.policy, subject.variables, images[:1])
    needed = 1e3 * np.cumsum(predict.needed)
    deadlines = list(milliseconds) or [0.5 * needed[0], *(1.1 * needed)]
    never = np.full(network.num_exits - 1, np.inf, np.float32)
    times, exits = np.zeros((len(deadlines), calls)), np.zeros((len(deadlines), calls), int)
    for call in range(calls):
        image = images[call % len(images)][None]
        for i, deadline in enumerate(deadlines):
            start = time.perf_counter()
            found = predict(never, image, deadline)
            times[i, call] = 1e3 * (time.perf_counter() - start)
            exits[i, call] = found.exits[0]
    return [
        {
            "network": subject.name,
            "deadline_ms": float(deadline),
            "median_ms": float(np.median(each)),
            "p99_ms": float(np.quantile(each, 0.99)),
            "longest_ms": float(each.max()),
            "late": float((each > deadline).mean()),
            "exit_fractions": (np.bincount(e, minlength=network.num_exits) / calls).tolist(),
        }
        for deadline, each, e in zip(deadlines, times, exits, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
