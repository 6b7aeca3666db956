"""Engines on the CPU: XLA, ONNX Runtime and PyTorch, with early exits and without.

    python -m experiments.engines                      # ResNet-56, random variables
    python -m experiments.engines --run runs/cifar10   # a run of the main job, its test images
    python -m experiments.engines --run runs/cifar10 --agree 10000
    python -m experiments.engines --engines xla onnxruntime pytorch earlyon

`xla` is the live network; `onnxruntime`, `stablehlo` and `export` are the layers of its artifact.
The last line needs `pip install torch earlyon`, and knows the networks `resnet` and `fast`:
`pytorch` is eager mode with early exits by hand, `earlyon` that toolkit around the same network.

Every engine runs in a process of its own, with as many threads as this process may use cores, and
all are timed in turn: the threads of one would slow the others. A call takes images on the host and
gives labels on the host. Timed are the plain network, all images leaving at each exit in turn, and
a mixture.

The ideal of an engine is its own plain network's time, times the share of the exits' time that the
mixture needs: with `t_e` for the time if all images leave at exit e of E, and `s_e` for the share
of the mixture that does, `ideal = plain * sum_e s_e t_e / t_E`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.checks import require, require_all
from experiments.command_line import execute
from experiments.engines.contenders import SINGLES, Contender, write_engines
from experiments.engines.rows import AGREEMENT, agreement, rows
from experiments.files import write_json
from experiments.latency.arguments import check_parents, spaced
from experiments.latency.distributions import exit_rates
from experiments.latency.plot import milliseconds
from experiments.latency.workload import Workload, random_workload, run_workload, thresholds_of
from experiments.report.environment import describe
from experiments.train.config import FamilyName, NetworkConfig, network_arguments

NEEDS = {"pytorch": ("torch",), "earlyon": ("torch", "earlyon")}
EngineName = Literal["xla", "onnxruntime", "stablehlo", "export", "pytorch", "earlyon"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time engines on the CPU, with early exits and without, each in a process of its own."""

    run: Path | None = None
    """Directory that experiments.cifar made; without it a random network is timed."""
    network: FamilyName = "resnet"
    """Random network: its family."""
    depth: int | None = None
    """Random network: number of layers, 56 by default for resnet, or of blocks."""
    exits: tuple[float, ...] | None = None
    """Random network: blocks after which an exit sits; three by default, evenly spread."""
    engines: tuple[EngineName, ...] = ("xla", "onnxruntime")
    """Engines to time."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Images a call; 1 is a series of single images."""
    mixture: str = "0.4,0.25,0.15,0.2"
    """The share of the images that leaves at each exit; `trained` are those of the run."""
    rounds: int = 15
    """Times that each contender is timed; the median counts."""
    seed: int = 0
    """Of the random network and its images."""
    agree: int = 0
    """Compare the answers of all engines on so many images, with the run's own thresholds, all at
    once and one by one."""
    json: Path | None = None
    """File for the rows, as a list."""


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line.

    Raises:
      ValueError: if a value is out of range; one line.
    """
    arguments = command_line.parse(Arguments, "python -m experiments.engines", argv, Arguments())
    for name in ("engines", "batches"):
        require(bool(getattr(arguments, name)), name, "none", "at least one")
    require_all("", arguments, "batches rounds", lambda n: n >= 1, "at least 1")
    require_all("", arguments, "agree", lambda n: n >= 0, "a number of images, or 0")
    check_parents(arguments, "json")
    for name in arguments.engines:
        for needed in NEEDS.get(name, ()):
            if importlib.util.find_spec(needed) is None:
                raise ValueError(f"--engines {name}: no module {needed}; pip install {needed}")
    return arguments


def table(batch: int, found: Sequence[dict[str, Any]]) -> Table:
    """The rows of a batch size for the terminal."""
    title = f"batch {batch}, milliseconds " + ("an image" if batch == 1 else "a batch")
    shown = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False
    )
    shown.add_column("engine", no_wrap=True)
    for name in ("plain", "at exit 1, 2, ...", "mixture", "eff.", "speedup", "on best", "spread"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found:
        exits = " ".join(map(milliseconds, row["exits_ms"]))
        plain, mixture = (milliseconds(row[f"{k}_ms"]) for k in ("plain", "mixture"))
        shares = [f"{row[key]:.2f}" for key in ("efficiency", "speedup", "on_best")]
        spread = f"{100 * row['spread']:.0f}%"
        shown.add_row(row["engine"], plain, exits, mixture, *shares, spread)
    return shown


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, and status 2."""
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, Workload, Any]:
        arguments = parse(argv)
        count = max(SINGLES, *arguments.batches, arguments.agree)
        with console.status("building the network and scoring the images"):
            workload, bundle = _served(arguments, count)
        exit_rates(arguments.mixture, workload.network.num_exits, workload.rates)
        return arguments, workload, bundle

    return execute(begin, lambda begun: _measure(*begun, argv, console), (OSError, RuntimeError))


def _served(arguments: Arguments, count: int) -> tuple[Workload, Any]:
    import eejax

    if arguments.run is not None:
        return run_workload(arguments.run, count), eejax.load(arguments.run)
    given = {"depth": arguments.depth, "exits": arguments.exits}
    config = spaced(NetworkConfig(name=arguments.network, gate=False, **given))
    workload = random_workload(config, "max_prob", arguments.seed, count)
    image = workload.images.shape[1:]
    bundle = eejax.Bundle(
        config.name,
        network_arguments(config),
        tuple("0123456789"),
        (image[0], image[1], image[2]),
        (127.5,) * 3,
        (73.9,) * 3,
        workload.variables,
        workload.policy,
        thresholds_of(workload, "trained", count),
        eejax.xla_macs(workload.network, workload.variables, workload.images[:1]),
        {},
    )
    return workload, bundle


def _measure(
    arguments: Arguments, workload: Workload, bundle: Any, argv: Sequence[str], console: Console
) -> int:
    environment = describe("experiments.engines", argv)
    console.print(f"{workload.name}\n{environment['device']}")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, console.status("exporting") as spinner:
        write_engines(workload, bundle, arguments.engines, Path(scratch))
        contenders = [Contender(name, Path(scratch)) for name in arguments.engines]
        try:
            if arguments.agree:
                spinner.update("comparing answers")
                for row in agreement(workload, contenders, arguments.agree):
                    console.print(AGREEMENT.format(**row))
                    found.append({**row, **environment})
            for batch in arguments.batches:
                timed = rows(workload, contenders, arguments, batch, spinner.update)
                found += [{**row, "seed": arguments.seed, **environment} for row in timed]
                console.print(table(batch, timed))
        finally:
            for contender in contenders:
                contender.end()
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
