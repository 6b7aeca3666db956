"""Serving under load: who answers how much, how soon, and how well.

    python -m experiments.serving --run runs/cifar10
    python -m experiments.serving --run runs/cifar10 --milliseconds 50 --loads 1 1.5 2

Single images arrive at random moments (Poisson), as many a second on average as the load says: 1 is
what the whole network does in full tiles, by the 0.9 quantile of their times. Each image has a
deadline. ONNX Runtime answers: the whole network, early exits with the run's thresholds, and early
exits that lower their thresholds under load, as far as at most a point is lost on held-out images,
all three through `eejax.serving`; and the whole network behind a dynamic batcher, which knows no
deadlines. Latency counts from the moment at which a request was to come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from eejax import bundle as bundles
from eejax.bundle import Bundle
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
from experiments.serving.load import offered


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve images that arrive at random moments, each with a deadline, and report latency,
    accuracy, and who was refused or late."""

    run: Path
    """Directory that experiments.cifar made."""
    loads: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    """Images a second, as multiples of what the whole network does in full tiles."""
    seconds: float = 5.0
    """How long each load lasts."""
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
        return arguments, bundles.load(arguments.run), splits.load(config.data, config.seed)

    return execute(begin, lambda begun: _work(*begun, argv, console), (OSError, RuntimeError))


def _work(
    arguments: Arguments, bundle: Bundle, data: Dataset, argv: Sequence[str], console: Console
) -> int:
    environment = describe("experiments.serving", argv)
    if bundle.held_out is None:
        raise OSError(f"{arguments.run} keeps no held-out scores; evaluate it anew: --resume.")
    levels = lowered(bundle.held_out, bundle.costs.fractions, bundle.thresholds, arguments.drop)
    with tempfile.TemporaryDirectory() as scratch, console.status("measuring stages") as spinner:
        contenders = Contenders(bundle, levels, Path(scratch))
        console.print(
            f"{arguments.run}: {contenders.capacity:,.0f} images a second are a load of 1; "
            f"deadlines of {arguments.milliseconds:g} ms; {len(levels)} levels of thresholds"
        )
        found = []
        for load in arguments.loads:
            rows = []
            for name in NAMES:
                spinner.update(f"load {load:g}: {name}")
                row = asyncio.run(_offer(arguments, contenders, name, data, load))
                rows.append({"load": load, "contender": name, **row})
            console.print(table(load, rows))
            found += [{**row, **environment} for row in rows]
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 0


async def _offer(
    arguments: Arguments, contenders: Contenders, name: str, data: Dataset, load: float
) -> dict[str, Any]:
    """One load for one contender; the same arrivals and images for all."""
    random = np.random.default_rng((arguments.seed, int(1000 * load)))
    rate = load * contenders.capacity
    arrivals = np.cumsum(random.exponential(1 / rate, max(1, int(rate * arguments.seconds))))
    chosen = random.integers(0, len(data.test.images), len(arrivals))
    images, labels = data.test.images[chosen], data.test.labels[chosen]
    async with contenders.serving(name) as predict:
        return await offered(predict, images, labels, 1e-3 * arguments.milliseconds, arrivals)


def table(load: float, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of a load for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"load {load:g}", title_justify="left", pad_edge=False)
    shown.add_column("", no_wrap=True)
    for name in ("answered %", "late %", "p50 ms", "p99 ms", "accuracy %", "partial %", "level"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["contender"],
            *(f"{100 * row[key]:.1f}" for key in ("answered", "late")),
            *(f"{1000 * row[key]:.1f}" for key in ("p50", "p99")),
            *(f"{100 * row[key]:.1f}" for key in ("accuracy", "partial")),
            f"{row['level']:.1f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
