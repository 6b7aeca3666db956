"""Engines on the CPU: XLA and ONNX Runtime, with early exits and without.

    python -m experiments.engines                      # ResNet-56, random variables
    python -m experiments.engines --run runs/cifar10   # a run of the main job, its test images
    python -m experiments.engines --run runs/cifar10 --agree 10000

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
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.checks import require, require_all
from experiments.command_line import execute
from experiments.files import write_json
from experiments.latency.arguments import check_parents, spaced
from experiments.latency.distributions import exit_rates
from experiments.latency.plot import milliseconds
from experiments.latency.workload import Workload, random_workload, run_workload, thresholds_of
from experiments.report.environment import describe
from experiments.train.config import FamilyName, NetworkConfig, network_arguments

EngineName = Literal["xla", "onnxruntime"]
SINGLES = 20  # images of a call at batch 1, one after another


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
    """Compare the answers of all engines on so many images, with the run's own thresholds."""
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
    return arguments


class Contender:
    """An engine in a process of its own, which answers one request at a time."""

    def __init__(self, name: str, place: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, place, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """The answer to a request; RuntimeError with the engine's own words if it failed."""
        try:
            self._pipe.send(request)
            failed, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{self.name} ended without an answer") from None
        if failed:
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(name: str, place: Path, pipe: Any) -> None:
    """The process of an engine."""
    engine = None
    while True:
        try:
            what, *details = pipe.recv()
        except EOFError:
            return
        try:
            engine = engine or ENGINES[name](place)
            if what == "predict":
                predict, images, thresholds = engine["early"], *details
                answer = predict(images, thresholds)
            else:
                answer = _timed(engine, *details)
        except Exception:
            pipe.send((True, traceback.format_exc(limit=-1).strip().splitlines()[-1]))
        else:
            pipe.send((False, answer))


def _timed(
    engine: dict[str, Callable[..., Any]],
    kind: str,
    images: np.ndarray,
    batch: int,
    thresholds: np.ndarray,
) -> float:
    """Seconds for all images in calls of `batch`, after a pass that is not timed."""
    predict = engine[kind]
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    for part in parts[:2]:
        predict(part, thresholds)
    start = time.perf_counter()
    for part in parts:
        predict(part, thresholds)
    return time.perf_counter() - start


def _xla(place: Path) -> dict[str, Callable[..., Any]]:
    import eejax

    bundle = eejax.load(place)
    last = bundle.network.num_exits - 1
    plain = eejax.predictor(
        bundle.network.keeping([last]),
        eejax.max_prob,
        eejax.keep_variables(bundle.variables, [last]),
        eejax.full,
    )
    single = eejax.predictor(bundle.network, bundle.policy, bundle.variables, eejax.cond)
    packed = eejax.predictor(bundle.network, bundle.policy, bundle.variables, eejax.compact)
    return {
        "plain": lambda images, thresholds: plain((), images),
        "early": lambda images, t: (single if len(images) == 1 else packed)(t, images),
    }


def _onnxruntime(place: Path) -> dict[str, Callable[..., Any]]:
    from eejax import runtime
    from eejax.runtime.engine import session

    loaded = runtime.load(place / "artifact")
    plain = session((place / "plain.onnx").read_bytes(), loaded.threads)

    def outputs(images: np.ndarray) -> Any:
        return plain.run(None, {"images": images})

    return {
        "plain": lambda images, t: np.argmax(outputs(images)[0], -1),
        "early": loaded.predict,
    }


ENGINES: dict[str, Callable[[Path], dict[str, Callable[..., Any]]]] = {
    "xla": _xla,
    "onnxruntime": _onnxruntime,
}


def write_engines(workload: Workload, bundle: Any, place: Path) -> None:
    """Writes what the engines read: bundle, artifact, and the plain network."""
    import eejax
    from eejax import bundle as bundles

    bundles.save(bundle, place / "bundle")
    eejax.export(bundle, place / "artifact", layers=["onnx"], images=workload.images[:4])
    (place / "plain.onnx").write_bytes(plain_model(bundle))


def plain_model(bundle: Any, quantise: Any = None) -> bytes:
    """The whole network without its early heads; `quantise` as for `eejax.export`."""
    import jax

    import eejax
    from eejax import onnx
    from eejax.onnx.quantising import quantised

    last = bundle.network.num_exits - 1
    plain = onnx.stages(
        bundle.network.keeping([last]),
        eejax.max_prob,
        eejax.keep_variables(bundle.variables, [last]),
        jax.ShapeDtypeStruct(bundle.image, np.uint8),
        [],
    )
    (model,) = plain if quantise is None else quantised(plain, quantise)
    return model.SerializeToString()


def rows(arguments: Arguments, workload: Workload, contenders: Sequence[Contender], say: Any):
    """Times everything; yields a row for each batch size and engine."""
    exits = workload.network.num_exits
    rates = exit_rates(arguments.mixture, exits, workload.rates)
    for batch in arguments.batches:
        count = SINGLES if batch == 1 else batch
        images = workload.images[:count]
        mixed = thresholds_of(workload, arguments.mixture, count)
        limits = {"plain": mixed, "mixture": mixed}
        for e in range(exits):
            limits[f"exit {e + 1}"] = np.where(np.arange(exits - 1) < e, np.inf, -np.inf)
        times: dict[tuple[str, str], list[float]] = {}
        for done in range(arguments.rounds):
            say(f"batch {batch}: round {done + 1} of {arguments.rounds}")
            for contender in contenders:
                for what, thresholds in limits.items():
                    kind = "plain" if what == "plain" else "early"
                    seconds = contender.ask(
                        "time", kind, images, batch, thresholds.astype(np.float32)
                    )
                    times.setdefault((contender.name, what), []).append(seconds)
        # What really left where, by the engine itself.
        for contender in contenders:
            taken = contender.ask("predict", images, mixed.astype(np.float32))
            shares = np.bincount(taken.exits, minlength=exits) / count
            yield _row(contender.name, batch, count, times, shares, rates)


def _row(
    engine: str,
    batch: int,
    count: int,
    times: dict[tuple[str, str], list[float]],
    shares: np.ndarray,
    rates: Sequence[float],
) -> dict[str, Any]:
    per = 1000 / (count if batch == 1 else 1)  # milliseconds of an image, or of a batch
    middle = {
        what: per * float(np.median(t)) for (name, what), t in times.items() if name == engine
    }
    exits = [middle[f"exit {e + 1}"] for e in range(len(shares))]
    ideal = middle["plain"] * float(np.dot(shares, exits)) / exits[-1]
    low, high = np.percentile(times[engine, "mixture"], [25, 75])
    return {
        "batch": batch,
        "engine": engine,
        "plain_ms": middle["plain"],
        "exits_ms": exits,
        "mixture_ms": middle["mixture"],
        "spread": float((high - low) * per / middle["mixture"]),
        "ideal_ms": ideal,
        "efficiency": ideal / middle["mixture"],
        "speedup": middle["plain"] / middle["mixture"],
        "first_speedup": middle["plain"] / exits[0],
        "shares": shares.tolist(),
        "rates": list(rates),
    }


def agreement(
    workload: Workload, contenders: Sequence[Contender], count: int
) -> list[dict[str, Any]]:
    """Labels and exits of every engine against the first, on `count` images, with the thresholds of
    the run; and how many scores lie within 1e-5 of a threshold."""
    thresholds = thresholds_of(workload, "trained", count).astype(np.float32)
    images = workload.images[:count]
    first, *others = [(c.name, c.ask("predict", images, thresholds)) for c in contenders]
    scores = workload.scores[:count, :-1]
    close = (np.abs(scores - thresholds) <= 1e-5 * np.maximum(1, np.abs(thresholds))).any(1)
    return [
        {
            "engines": f"{first[0]}, {name}",
            "images": count,
            "other_labels": int((got.labels != first[1].labels).sum()),
            "other_exits": int((got.exits != first[1].exits).sum()),
            "close": int(close.sum()),
            "largest_difference": float(np.abs(got.logits - first[1].logits).max()),
        }
        for name, got in others
    ]


AGREEMENT = """{engines}, {images:,} images: {other_labels} other labels, {other_exits} other exits;
{close} scores within 1e-5 of a threshold, logits within {largest_difference:.1e}"""


def table(batch: int, found: Sequence[dict[str, Any]]) -> Table:
    """The rows of a batch size for the terminal."""
    title = f"batch {batch}, milliseconds " + ("an image" if batch == 1 else "a batch")
    shown = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False
    )
    shown.add_column("engine", no_wrap=True)
    for name in ("plain", "at exit 1, 2, ...", "mixture", "ideal", "eff.", "speedup", "spread"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found:
        exits = " ".join(map(milliseconds, row["exits_ms"]))
        plain, mixture, ideal = (
            milliseconds(row[f"{k}_ms"]) for k in ("plain", "mixture", "ideal")
        )
        shares = f"{row['efficiency']:.2f}", f"{row['speedup']:.2f}", f"{100 * row['spread']:.0f}%"
        shown.add_row(row["engine"], plain, exits, mixture, ideal, *shares)
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
        write_engines(workload, bundle, Path(scratch))
        contenders = [Contender(name, Path(scratch)) for name in arguments.engines]
        try:
            if arguments.agree:
                spinner.update("comparing answers")
                for row in agreement(workload, contenders, arguments.agree):
                    console.print(AGREEMENT.format(**row))
                    found.append({**row, **environment})
            shown: list[dict[str, Any]] = []
            for row in rows(arguments, workload, contenders, spinner.update):
                shown.append(row)
                found.append({**row, "seed": arguments.seed, **environment})
                if len(shown) == len(contenders):
                    console.print(table(row["batch"], shown))
                    shown = []
        finally:
            for contender in contenders:
                contender.end()
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
