"""A comparison, from a checked configuration to the report. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.panel import Panel

from eejax.policies import POLICIES
from eejax.training import REGIMES
from experiments.command_line import read_run, write_run
from experiments.compare import cells as compare_cells
from experiments.compare import decide as compare_decide
from experiments.compare import report as compare_report
from experiments.compare import timing as compare_timing
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Arguments, Comparison
from experiments.compare.decide import CASCADE, Choice, Model
from experiments.compare.differences import correct_at_last
from experiments.compare.results import assemble
from experiments.report.environment import describe
from experiments.train import pool as compare_pool
from experiments.train import trained
from experiments.train.pool import Job


class NothingToCompare(Exception):
    """No network could be trained; the message says why."""


class Prepared(NamedTuple):
    """What a comparison begins with.

    Attributes:
      config: checked.
      workers: trainings, and choices, at a time.
      workdir: its directory, with `config.json`.
      environment: data set, device, versions, command and date, for the report.
      console: for messages.
    """

    config: Comparison
    workers: int
    workdir: Path
    environment: dict[str, Any]
    console: Console


def prepare(arguments: Arguments, argv: Sequence[str]) -> Prepared:
    """Reads the images and opens the directory.

    Raises:
      ValueError, OSError: the data cannot be had or do not fit the configuration, a network cannot
        be made for them, or the directory cannot be written; one line.
    """
    console = Console(soft_wrap=True)
    config, workdir = arguments.run, arguments.workdir
    assert workdir is not None
    with console.status("reading images"):
        dataset = compare_cells.dataset(config)
    for name, batch, images in (
        ("train.batch", config.train.batch, dataset.train.images),
        ("timing.batch", config.timing.batch, dataset.test.images),
    ):
        if len(images) < batch:
            raise ValueError(f"{name}: {batch} for {len(images)} images; give a smaller batch.")
    for cell in compare_cells.cells(config):  # made here, so that a mistake is no failed training
        trained.network(cell.run)
    environment = {
        "dataset": dataset.name,
        "data_source": dataset.source,
        "notice": dataset.notice,
        "classes": list(dataset.classes),
        "samples": {
            name: len(getattr(dataset, name).labels)
            for name in ("train", "calibrate", "choose", "certify", "test")
        },
        **describe("experiments.compare", argv),
    }
    if arguments.resume:
        # By its stored name the data set is no fall-back any more; the comparison still is.
        environment["notice"] = read_run(workdir).get("notice", "")
    write_run(workdir, config, dataset.name, environment)
    if environment["notice"]:
        console.print(Panel(environment["notice"], title="NOTICE", style="bold yellow"))
    console.print(f"{dataset.name}: {dataset.source}\neverything goes to {workdir}")
    workers = arguments.jobs or compare_pool.default_workers()
    return Prepared(config, workers, workdir, environment, console)


def run(prepared: Prepared) -> dict[str, Any]:
    """Trains, decides, measures, and returns the results that it wrote.

    Raises:
      NothingToCompare: not one network with early exits could be trained.
      KeyboardInterrupt: a signal came; what is done is kept.
    """
    config, workers, workdir, environment, console = prepared
    seconds: dict[str, float] = {}

    # Every network, with every seed, and what it says of every split.
    wanted = compare_cells.cells(config)
    jobs = [
        Job(
            _name(cell),
            compare_cells.prepare,
            (cell, config.drift, workdir),
            functools.partial(compare_cells.progress, cell, workdir),
        )
        for cell in wanted
        if compare_cells.missing(cell, config.drift, workdir)
    ]
    with _timer(seconds, "training"):
        failures = compare_pool.run("networks", jobs, workers, console)[1]
    failed = {failure.name for failure in failures}
    cells = [cell for cell in wanted if _name(cell) not in failed]
    if not any(cell.kind == "regime" for cell in cells):
        raise NothingToCompare(f"every network failed, the first with: {failures[0].error}")

    # Every policy on every network with early exits, and on the cascade.
    with _timer(seconds, "measuring"):
        models = _models(cells, config, workdir)
    pairs = [(m, p) for m in models for p in _policies(m, config)]
    jobs = [
        Job(f"{m.name}, seed {m.seed}, {p}", compare_decide.decide, (m, p, config, workdir))
        for m, p in pairs
        if not compare_decide.path(m, p, config, workdir).exists()
    ]
    with _timer(seconds, "choosing"):
        failures += compare_pool.run("decisions", jobs, workers, console)[1]
    choices = [
        Choice(m, p, compare_decide.read(m, p, config, workdir))
        for m, p in pairs
        if compare_decide.path(m, p, config, workdir).exists()
    ]
    if not choices:
        raise NothingToCompare(f"every decision failed, the first with: {failures[0].error}")

    # Wall-clock time, with nothing else running.
    with _timer(seconds, "timing"), console.status("timing compiled inference"):
        timing, placement = _measure(choices, cells, config, workdir)

    with _timer(seconds, "statistics"), console.status("statistics and pictures"):
        figures, table = assemble(config, cells, choices, timing, placement, workdir)
        results = {
            **environment,
            "seeds": list(config.seeds),
            "seconds": {**seconds, "total": sum(seconds.values())},
            "failed": [{"cell": f.name, "error": f.error} for f in failures],
            **figures,
        }
        compare_report.write(workdir, results, table)
    console.print(compare_report.console(results, table))
    for failure in failures:
        console.print(f"FAILED {failure.name}: {failure.error}", style="red")
    console.print(f"\nreport: {workdir / 'report.html'}")
    return results


def _name(cell: Cell) -> str:
    return f"{cell.name}, seed {cell.seed}"


@contextlib.contextmanager
def _timer(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _models(cells: Sequence[Cell], config: Comparison, workdir: Path) -> list[Model]:
    """What policies decide on, with costs in one unit for all: the plain network's.

    Equal networks take equal time, so one is measured for all regimes and seeds.
    """
    plain = next((c for c in cells if c.name == PLAIN), None)
    if plain is None:
        raise NothingToCompare("the plain network failed, and costs are fractions of its cost")
    whole = compare_cells.macs(plain)[-1]

    def cost(cell: Cell) -> tuple[float, ...]:
        return tuple((compare_cells.macs(cell) / whole).tolist())

    def ms(cell: Cell) -> tuple[float, ...]:
        if not config.targets.budgets_ms:
            return ()
        timing = config.timing
        alike = next(c for c in cells if (c.network, c.ends_at) == (cell.network, cell.ends_at))
        units = compare_timing.unit_ms(alike, workdir, timing.batch, timing.repeats)
        return tuple(units.cumulative)

    early = [cell for cell in cells if cell.kind == "regime"]
    models = [Model(c.name, c.seed, (c,), cost(c), ms(c)) for c in early]
    for seed in config.seeds if config.static.enabled else ():
        members = [c for c in cells if c.kind == "static" and c.seed == seed]
        members.sort(key=lambda c: compare_cells.macs(c)[-1])
        if len(members) > 1:
            costs = tuple(cost(member)[-1] for member in members)
            times = tuple(t for member in members for t in ms(member)[-1:])
            models.append(Model(CASCADE, seed, tuple(members), costs, times))
    return models


def _policies(model: Model, config: Comparison) -> list[str]:
    """A cascade stops by confidence; a gate has to be trained."""
    if model.name == CASCADE:
        return [config.policies[0]]
    gate = REGIMES[model.cells[0].train.regime].trains_gate
    return [p for p in config.policies if gate or not POLICIES[p].needs_gate]


def _measure(
    choices: Sequence[Choice], cells: Sequence[Cell], config: Comparison, workdir: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of times, the plain network's first, and of exits to keep; networks of one seed."""
    seed, timing = config.seeds[0], config.timing
    static = [c for c in cells if c.kind == "static" and c.seed == seed]
    static.sort(key=lambda c: c.name != PLAIN)
    first = next((c for c in cells if c.kind == "regime" and c.seed == seed), None)
    if first is None or not static or static[0].name != PLAIN:
        return [], []
    units = compare_timing.unit_ms(first, workdir, timing.batch, timing.repeats)
    schemes = []
    for cell in static:
        accuracy = float(correct_at_last(compare_cells.traces(cell, workdir).test).mean())
        row = {"regime": "static", "policy": cell.name, "accuracy": accuracy}
        schemes.append(compare_timing.Scheme(row, (cell,)))
    schemes += [
        scheme
        for choice in choices
        if choice.model.seed == seed and choice.policy in timing.policies
        for scheme in _timed_schemes(choice)
    ]
    placement = []
    gate = REGIMES[first.train.regime].trains_gate
    able = [p for p in timing.policies if gate or not POLICIES[p].needs_gate]
    for share, policy in itertools.product(timing.keep_exits, able[:1]):
        budget = share * float(units.cumulative[-1])
        more, row = compare_timing.placed(first, policy, units, budget, workdir)
        placement.append(row)
        schemes += more
    rows = compare_timing.timed(schemes, units, workdir, timing.batch, timing.repeats)
    return rows, placement


def _timed_schemes(choice: Choice) -> Iterator[compare_timing.Scheme]:
    """What is timed of a policy: its thresholds for each budget."""
    model = choice.model
    for row in choice.decided.rows:
        budget = row["target_kind"] in ("budget", "ms") and row["search"] == "optimal"
        if not budget or "error" in row:
            continue
        cascade = model.name == CASCADE
        cells = tuple(model.cells[e] for e in row["exits"]) if cascade else model.cells
        if cascade and len(cells) == 1:
            continue  # a plain network by itself, which is timed already
        words = {"regime": model.name, "policy": choice.policy, "target": row["json_target"]}
        words |= {"accuracy": row["accuracy"], "cost": row["cost"]}
        policy = compare_decide.fitted(choice.decided, row["exits"])
        yield compare_timing.Scheme(words, cells, None, policy, tuple(row["thresholds"]))
