"""Device, edge and cloud on one machine: what tiers take, and whether the planner knew.

    python -m experiments.tiers --run runs/cifar10
    python -m experiments.tiers --run runs/cifar10 --cut 1 3 --codecs int8+zstd --first 5g poor

Each tier is a process of `eejax tier`; proxies between them delay and pace bytes as the links say.
A client beside the first tier asks for one test image after the other. The same images go to tiers
that are cut, to a device that does everything, and, over the same links, to a cloud that does. The
planner's forecast stands beside each. What servers add to stages and codecs is measured once,
without delays, and given to it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import eejax
from eejax import bundle as bundles
from eejax import planning, runtime
from eejax.bundle import Bundle
from eejax.evaluation.routing import score
from eejax.planning import Device, Link, Plan
from eejax.planning.model import leaving
from eejax.planning.reading import read_links
from eejax.runtime import HeldOut
from experiments import command_line
from experiments.checks import require, require_all
from experiments.cifar.config import Config
from experiments.command_line import execute, from_json, read_run
from experiments.data import splits
from experiments.data.splits import Dataset
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.report.environment import describe

try:
    from experiments.tiers.running import Asked, Running, asked, cpu_seconds, tiers
except ModuleNotFoundError as error:
    message = f'tiers need more packages: pip install "eejax[serving,planning]" ({error})'
    raise ModuleNotFoundError(message) from error

NOTHING = Link(1e12, 1e12, 0.0, overhead_seconds=0.0)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run a network as device, edge and cloud over emulated links, and compare with all on the
    device, all in the cloud, and the planner's forecast."""

    run: Path
    """Directory that experiments.cifar made."""
    cut: tuple[int, ...] = (2, 3)
    """The edge's and the cloud's first stage."""
    codecs: tuple[str, ...] = ("bfloat16", "int8+zstd")
    """For features, each in its turn."""
    links: Path = Path("configs/links.yaml")
    """Links by name."""
    first: tuple[str, ...] = ("5g", "poor")
    """Between device and edge, each in its turn."""
    second: str = "wired"
    """Between edge and cloud."""
    requests: int = 300
    """Images, one after the other."""
    pause: float = 0.02
    """Seconds between an answer and the next request."""
    threads: int = 1
    """Of each tier: they share this machine."""
    watts: float = 3.0
    """Of the device while it computes, for the energy model."""
    json: Path | None = None
    """File for the rows, as a list."""


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line.

    Raises:
      ValueError, FileNotFoundError: if a value is out of range; one line.
    """
    default: Any = dataclasses.MISSING
    arguments = command_line.parse(Arguments, "python -m experiments.tiers", argv, default)
    require(len(arguments.cut) == 2, "cut", list(arguments.cut), "two stages")
    require_all("", arguments, "requests threads", lambda x: x >= 1, "a whole number from 1")
    require(arguments.pause >= 0, "pause", arguments.pause, "seconds")
    check_parents(arguments, "json")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, and status 2."""
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, Bundle, Dataset, dict[str, Link]]:
        arguments = parse(argv)
        links = read_links(arguments.links)
        for name in (*arguments.first, arguments.second):
            require(name in links, "links", name, f"one of {', '.join(links)} in {arguments.links}")
        config = from_json(Config, read_run(arguments.run)["config"])
        bundle = bundles.load(arguments.run)
        first, second = arguments.cut
        exits = bundle.network.num_exits
        require(0 < first < second < exits, "cut", [first, second], f"stages from 1 to {exits - 1}")
        return arguments, bundle, splits.load(config.data, config.seed), links

    return execute(begin, lambda begun: _work(*begun, argv, console), (OSError, RuntimeError))


def _work(
    arguments: Arguments,
    bundle: Bundle,
    data: Dataset,
    links: dict[str, Link],
    argv: Sequence[str],
    console: Console,
) -> int:
    environment = describe("experiments.tiers", argv)
    images, labels = (part[: arguments.requests] for part in data.test)
    scored = score(bundle.policy, eejax.collect(bundle.network, bundle.variables, images, labels))
    trace = HeldOut(scored.scores, scored.predictions == labels[:, None])
    with tempfile.TemporaryDirectory() as scratch, console.status("measuring") as spinner:
        artifact = Path(scratch) / "artifact"
        eejax.export(bundle, artifact, layers=["onnx"])
        loaded = runtime.load(artifact, arguments.threads)
        times = planning.measure(loaded, arguments.codecs, images, pause=arguments.pause)
        exits = bundle.network.num_exits
        setting = _Setting(arguments, artifact, bundle.thresholds, times, trace, images, labels)
        spinner.update("overheads, without links")
        alone, next_ = setting.overheads(exits)
        console.print(
            f"a server adds {1e3 * alone:.1f} ms to stages and codecs, each further tier "
            f"{1e3 * next_:.1f} ms"
        )
        rows = []
        for first in arguments.first:
            chain = [links[first], links[arguments.second]]
            for name, cuts, codec in setting.placements(exits):
                spinner.update(f"{first}: {name}")
                row = setting.row(cuts, codec, chain, (alone, next_))
                rows.append({"link": first, "placement": name, **row, **environment})
            console.print(table(first, [row for row in rows if row["link"] == first]))
    if arguments.json is not None:
        write_json(arguments.json, rows)
    return 0


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What all placements have in common."""

    arguments: Arguments
    artifact: Path
    thresholds: np.ndarray
    times: planning.Times
    trace: HeldOut
    images: np.ndarray
    labels: np.ndarray

    def placements(self, exits: int) -> list[tuple[str, tuple[int, int], str]]:
        first, second = self.arguments.cut
        codecs = self.arguments.codecs
        return [
            ("all on the device", (exits, exits), codecs[0]),
            *((f"tiers, {codec}", (first, second), codec) for codec in codecs),
            ("all in the cloud", (0, 0), codecs[0]),
        ]

    def overheads(self, exits: int) -> tuple[float, float]:
        """Seconds that the server adds which the client asks, and each further one."""
        alone = self._excess((exits, exits), (0.0, 0.0))
        cuts = self.arguments.cut
        both = self._excess((cuts[0], cuts[1]), (alone, 0.0))
        routed = leaving(self.trace.scores, self.thresholds)
        crossings = sum((routed >= cut).mean() for cut in cuts)
        return alone, max(both / crossings, 0.0)

    def _excess(self, cuts: tuple[int, int], overheads: tuple[float, float]) -> float:
        codec = self.arguments.codecs[0]
        found, _ = self._ask(cuts, codec, [NOTHING, NOTHING])
        forecast = self._forecast(cuts, codec, [NOTHING, NOTHING], overheads)
        return float(found.seconds.mean()) - forecast.mean_seconds

    def _forecast(
        self,
        cuts: tuple[int, int],
        codec: str,
        chain: Sequence[Link],
        overheads: tuple[float, float],
    ) -> planning.Forecast:
        bounds = [0, *cuts, len(self.thresholds) + 1]
        runs = [first < end for first, end in itertools.pairwise(bounds)]
        asked_first = runs.index(True)
        devices = [
            Device(
                watts=self.arguments.watts if tier == 0 else 0.0,
                overhead_seconds=overheads[0 if tier == asked_first else 1],
            )
            for tier in range(3)
        ]
        plan = Plan(cuts, (codec, codec), self.thresholds)
        return planning.predict(plan, self.trace, [self.times] * 3, chain, devices)

    def row(
        self,
        cuts: tuple[int, int],
        codec: str,
        chain: Sequence[Link],
        overheads: tuple[float, float],
    ) -> dict[str, Any]:
        """What a placement takes and what was forecast, per request."""
        chain = [dataclasses.replace(link, overhead_seconds=0.0) for link in chain]
        forecast = self._forecast(cuts, codec, chain, overheads)
        found, used = self._ask(cuts, codec, chain)
        count = len(self.images)
        # Without a device among the processes, all of them are servers.
        device = used["cpu"][0] if cuts[0] else 0.0
        sent = used["up"][0] if used["up"] else 0
        return {
            "mean": float(found.seconds.mean()),
            "p50": float(np.quantile(found.seconds, 0.5)),
            "p99": float(np.quantile(found.seconds, 0.99)),
            "accuracy": float((found.labels == self.labels).mean()),
            "tiers": np.bincount(found.tiers, minlength=3).tolist(),
            "fallbacks": found.fallbacks,
            "link_bytes": [
                (up + down) / count for up, down in zip(used["up"], used["down"], strict=True)
            ],
            "server_seconds": (sum(used["cpu"]) - device) / count,
            "device_seconds": device / count,
            "device_joules": (self.arguments.watts * device + chain[0].joules_per_byte * sent)
            / count,
            "forecast": forecast._asdict(),
        }

    def _ask(
        self, cuts: tuple[int, int], codec: str, chain: Sequence[Link]
    ) -> tuple[Asked, dict[str, list[Any]]]:
        exits = len(self.thresholds) + 1
        threads, pause = self.arguments.threads, self.arguments.pause

        async def run() -> tuple[Asked, dict[str, list[Any]]]:
            running: Running
            async with tiers(self.artifact, cuts, exits, (codec, codec), chain, threads) as running:
                # Connections, first runs of the models, and what the tiers say of themselves.
                await asked(running.address, self.images[:20], pause)
                before = [cpu_seconds(pid) for pid in running.pids]
                crossed = [(link.up.bytes, link.down.bytes) for link in running.links]
                found = await asked(running.address, self.images, pause)
                after = zip(running.pids, before, strict=True)
                links = zip(running.links, crossed, strict=True)
                used = [(link.up.bytes - up, link.down.bytes - down) for link, (up, down) in links]
                return found, {
                    "cpu": [cpu_seconds(pid) - start for pid, start in after],
                    "up": [up for up, _ in used],
                    "down": [down for _, down in used],
                }

        return asyncio.run(run())


def table(link: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of a first link: what was measured, and in brackets what was forecast."""
    shown = Table(box=box.SIMPLE_HEAD, title=link, title_justify="left", pad_edge=False)
    shown.add_column("", no_wrap=True)
    for name in ("mean ms", "p99 ms", "right %", "kB", "in tiers %", "server ms", "device mJ"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        forecast = row["forecast"]
        shares = 100 * np.array(row["tiers"]) / sum(row["tiers"])
        shown.add_row(
            row["placement"],
            f"{1e3 * row['mean']:.1f} ({1e3 * forecast['mean_seconds']:.1f})",
            f"{1e3 * row['p99']:.0f} ({1e3 * forecast['p99_seconds']:.0f})",
            f"{100 * row['accuracy']:.1f}",
            ", ".join(f"{1e-3 * size:.1f}" for size in row["link_bytes"]) or "0",
            " ".join(f"{share:.0f}" for share in shares),
            f"{1e3 * row['server_seconds']:.1f}",
            f"{1e3 * row['device_joules']:.1f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
