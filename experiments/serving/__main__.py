"""Serving under load: who answers how much, how soon, and how well.

    python -m experiments.serving --run runs/cifar10
    python -m experiments.serving --run runs/cifar10 --milliseconds 50 --loads 1 1.5 2

Single images arrive at random moments (Poisson), as many a second on average as the load says: 1 is
what the whole network does in full tiles, measured anew before every round. Each image has a
deadline. ONNX Runtime or XLA answers: the whole network, early exits with the run's thresholds, and
early exits that lower their thresholds under load, as far as at most a point is lost on held-out
images, all three through `eejax.serving`; and the whole network behind a dynamic batcher, which
knows no deadlines. Contenders take turns, in rounds, with the same images at the same moments.
Latency counts from the moment at which a request was to come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from eejax import bundle as bundles
from eejax.bundle import Bundle
from eejax.keeping import keep_exits
from eejax.selection.lowering import lowered
from experiments import command_line
from experiments.checks import require, require_all
from experiments.cifar.config import Config
from experiments.command_line import execute, from_json, read_run
from experiments.data import splits
from experiments.data.splits import Dataset
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.report.environment import describe
from experiments.serving.contenders import NAMES, Contenders
from experiments.serving.load import Offered, offered, summary


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve images that arrive at random moments, each with a deadline, and report latency,
    accuracy, and who was refused or late."""

    run: Path
    """Directory that experiments.cifar made."""
    loads: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    """Images a second, as multiples of what the whole network does in full tiles."""
    keep: tuple[int, ...] = ()
    """The exits that early exits have, from 1 on, the last among them; empty for all."""
    engine: Literal["onnxruntime", "xla"] = "onnxruntime"
    """What runs the network."""
    rounds: int = 9
    """How often each contender has its turn at each load."""
    seconds: float = 1.5
    """How long a turn lasts."""
    milliseconds: float = 100.0
    """The deadline of each image."""
    drop: float = 0.01
    """Accuracy that lower thresholds may lose on held-out images, of the whole network's."""
    seed: int = 0
    """Of the arrivals."""
    json: Path | None = None
    """File for the rows, as a list."""


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line.

    Raises:
      ValueError, FileNotFoundError: if a value is out of range; one line.
    """
    default: Any = dataclasses.MISSING
    arguments = command_line.parse(Arguments, "python -m experiments.serving", argv, default)
    require(bool(arguments.loads), "loads", "none", "at least one")
    require_all("", arguments, "loads", lambda x: x > 0, "positive numbers")
    require_all("", arguments, "seconds milliseconds", lambda x: x > 0, "a positive number")
    require(arguments.rounds >= 1, "rounds", arguments.rounds, "a whole number from 1")
    require(0 <= arguments.drop < 1, "drop", arguments.drop, "a share of the images")
    check_parents(arguments, "json")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, and status 2."""
    console = Console(soft_wrap=True)
    # The thread of an engine waits for the loop's thread that long after each stage.
    sys.setswitchinterval(1e-4)

    def begin() -> tuple[Arguments, Bundle, Dataset]:
        arguments = parse(argv)
        config = from_json(Config, read_run(arguments.run)["config"])
        bundle = bundles.load(arguments.run)
        if arguments.keep:
            bundle = keep_exits(bundle, [exit - 1 for exit in arguments.keep])
        return arguments, bundle, splits.load(config.data, config.seed)

    return execute(begin, lambda begun: _work(*begun, argv, console), (OSError, RuntimeError))


def _work(
    arguments: Arguments, bundle: Bundle, data: Dataset, argv: Sequence[str], console: Console
) -> int:
    environment = describe("experiments.serving", argv)
    if bundle.held_out is None:
        raise OSError(f"{arguments.run} keeps no held-out scores; evaluate it anew: --resume.")
    levels = lowered(bundle.held_out, bundle.costs.fractions, bundle.thresholds, arguments.drop)
    with tempfile.TemporaryDirectory() as scratch, console.status("measuring stages") as spinner:
        contenders = Contenders(bundle, arguments.engine, levels, Path(scratch))
        # As `eejax serve` does: a full collection of what is imported here takes a deadline.
        gc.collect()
        gc.freeze()
        console.print(
            f"{arguments.run} in {arguments.engine}: deadlines of {arguments.milliseconds:g} ms; "
            f"{len(levels)} levels of thresholds"
        )
        found = []
        for load in arguments.loads:
            parts: dict[str, list[Offered]] = {name: [] for name in NAMES}
            rates = []
            for turn in range(arguments.rounds):
                rates.append(load * contenders.capacity())
                for name in NAMES:
                    spinner.update(f"load {load:g}, round {turn + 1}: {name}")
                    offer = _offer(arguments, contenders, name, data, (rates[-1], turn))
                    parts[name].append(asyncio.run(offer))
            rows = [
                {"load": load, "contender": name, "rate": float(np.median(rates)), **summary(part)}
                for name, part in parts.items()
            ]
            console.print(table(load, rows))
            found += [{**row, "engine": arguments.engine, **environment} for row in rows]
        console.print(held(found, 1e-3 * arguments.milliseconds, arguments.drop))
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 0


async def _offer(
    arguments: Arguments,
    contenders: Contenders,
    name: str,
    data: Dataset,
    turn: tuple[float, int],
) -> Offered:
    """A turn of a contender, `(rate, number)`; the same arrivals and images for all."""
    rate, number = turn
    random = np.random.default_rng((arguments.seed, number))
    arrivals = np.cumsum(random.exponential(1 / rate, max(1, int(rate * arguments.seconds))))
    chosen = random.integers(0, len(data.test.images), len(arrivals))
    images, labels = data.test.images[chosen], data.test.labels[chosen]
    async with contenders.serving(name) as predict:
        return await offered(predict, images, labels, 1e-3 * arguments.milliseconds, arrivals)


def table(load: float, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of a load for the terminal."""
    title = f"load {load:g}: {rows[0]['rate']:,.0f} images a second"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    shown.add_column("", no_wrap=True)
    for name in ("told %", "late %", "p50", "p99 ms", "right %", "partial %"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = (1000 * p for p in row["spread"])
        shown.add_row(
            row["contender"],
            *(f"{100 * row[key]:.1f}" for key in ("answered", "late")),
            f"{1000 * row['p50']:.0f}",
            f"{1000 * row['p99']:.0f} ({low:.0f}-{high:.0f})",
            *(f"{100 * row[key]:.1f}" for key in ("accuracy", "partial")),
        )
    return shown


def held(rows: Sequence[dict[str, Any]], deadline: float, drop: float) -> str:
    """The largest load of each contender up to which, at all loads, 99 % of the requests are
    answered, 99 % of the answers are in time, and no more than `drop` of the accuracy is lost."""
    whole = {row["load"]: row["accuracy"] for row in rows if row["contender"] == NAMES[0]}
    lines = ["", f"held: 99 % answered, p99 within {1000 * deadline:g} ms, {drop:.1%} lost at most"]
    for name in NAMES:
        most = 0.0
        for row in (row for row in rows if row["contender"] == name):
            least = whole[row["load"]] - drop
            if row["answered"] < 0.99 or row["p99"] > deadline or row["accuracy"] < least:
                break
            most = row["load"]
        lines.append(f"  {name}: " + (f"a load of {most:g}" if most else "none of these loads"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
