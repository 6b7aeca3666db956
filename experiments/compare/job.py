"""A comparison, from a checked configuration to the report. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.panel import Panel

from experiments.command_line import read_run, write_run
from experiments.compare import cells as compare_cells
from experiments.compare import decide as compare_decide
from experiments.compare import grid as compare_grid
from experiments.compare import planning, schemes
from experiments.compare import report as compare_report
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Arguments, Block, Comparison, store_grid
from experiments.compare.decide import DECISIONS, Choice
from experiments.compare.results import assemble
from experiments.data.splits import StreamedSplit
from experiments.pool import run as pool
from experiments.pool.config import PoolConfig
from experiments.pool.jobs import Costs, Failure, Job
from experiments.report.environment import describe
from experiments.store import Store, names, publish
from experiments.train import trained


class NothingToCompare(Exception):
    """No network could be trained; the message says why."""


class Prepared(NamedTuple):
    """What a comparison begins with.

    Attributes:
      blocks: of its grid, checked; one if it is none.
      environments: of each block: data set, device, versions, command and date, for the report.
      pool: where networks and decisions are computed.
      budget: seconds of training, or None.
      store: its directory, with `config.json`, and its bucket.
      console: for messages.
    """

    blocks: Sequence[Block]
    environments: Sequence[dict[str, Any]]
    pool: PoolConfig
    budget: float | None
    store: Store
    console: Console


def prepare(arguments: Arguments, blocks: Sequence[Block], argv: Sequence[str]) -> Prepared:
    """Reads the images and opens the directory.

    Raises:
      ValueError, OSError: the data cannot be had or do not fit the configuration, a network cannot
        be made for them, or directory or bucket cannot be had; one line.
    """
    console = Console(soft_wrap=True)
    assert arguments.workdir is not None
    store = Store(arguments.workdir, arguments.bucket)
    environments = []
    for block in blocks:
        with console.status(f"reading images {block.name}"):
            environments.append(_prepare(block, store.workdir / block.name, argv))
    store_grid(store.workdir, arguments.grid)
    try:
        names(store, DECISIONS)
    except Exception as error:  # each kind of bucket raises its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--bucket {arguments.bucket} cannot be read: {reason[0]}") from error
    for notice in dict.fromkeys(e["notice"] for e in environments):
        if notice:
            console.print(Panel(notice, title="NOTICE", style="bold yellow"))
    for words in dict.fromkeys(f"{e['dataset']}: {e['data_source']}" for e in environments):
        console.print(words)
    console.print(f"everything goes to {arguments.bucket or store.workdir}")
    hours = arguments.budget_hours
    budget = None if hours is None else 3600 * hours
    return Prepared(blocks, environments, arguments.pool, budget, store, console)


def _prepare(block: Block, place: Path, argv: Sequence[str]) -> dict[str, Any]:
    config = block.config
    dataset = compare_cells.dataset(config)
    if isinstance(dataset.train, StreamedSplit):
        raise ValueError(
            "data.feed: these images would be streamed, and the networks of a comparison share "
            "images on the device; give --data.feed resident, or smaller images."
        )
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
            name: len(getattr(dataset, name).images)
            for name in ("train", "calibrate", "choose", "certify", "test")
        },
        **describe("experiments.compare", argv),
    }
    if block.resumed:
        # By its stored name the data set is no fall-back any more; the comparison still is.
        environment["notice"] = read_run(place).get("notice", "")
    write_run(place, config, dataset.name, environment)
    return environment


class _Part(NamedTuple):
    """A block with the networks that could be prepared.

    Attributes:
      name: of the block.
      config: with the seeds that have a network.
      environment: for the report.
      cells: prepared.
      left_out: names of networks that --budget-hours left out.
    """

    name: str
    config: Comparison
    environment: dict[str, Any]
    cells: list[Cell]
    left_out: list[str]


def run(prepared: Prepared) -> list[dict[str, Any]]:
    """Trains, decides, measures, and returns the results of each block, as it wrote them.

    Raises:
      NothingToCompare: not one network with early exits could be trained.
      KeyboardInterrupt: a signal came; what is done is kept.
    """
    store, console = prepared.store, prepared.console
    seconds: dict[str, float] = {}

    # Every network, with every seed, and what it says of every split.
    plan = planning.plan(prepared.blocks, store)
    jobs = planning.jobs(plan, store, by_seed=prepared.budget is not None)
    if jobs:
        console.print(planning.table(plan, jobs, "networks that are there, and that are missing"))
    with _timer(seconds, "training"):
        made, failures = _map("networks", jobs, prepared, plan.costs, prepared.budget)
    left_out = [job for job in jobs if job.name not in {*made, *(f.name for f in failures)}]
    if left_out:
        title = "left out by --budget-hours; the same command goes on with them"
        rest = plan._replace(tasks=[t for t in plan.tasks if t.name in {j.name for j in left_out}])
        console.print(planning.table(rest, left_out, title))
    parts, reasons = _parts(prepared, plan, failures, [job.name for job in left_out])
    for reason in reasons:
        console.print(f"LEFT OUT {reason}", style="yellow")
    if not parts:
        raise NothingToCompare(reasons[0])
    for part in parts:
        for cell in part.cells:
            compare_cells.bring(cell, part.config.drift, store)

    # Every policy on every network with early exits, and on the cascade.
    with _timer(seconds, "measuring"):
        pairs = [
            (part, model, policy)
            for part in parts
            for model in schemes.models(part.cells, part.config, store.workdir)
            for policy in schemes.able(model, part.config)
        ]
    there = names(store, DECISIONS)
    jobs = [
        Job(
            _prefixed(part.name, f"{model.name}, seed {model.seed}, {policy}"),
            compare_decide.decide,
            (model, policy, part.config, store),
            kind=policy,
        )
        for part, model, policy in pairs
        if compare_decide.name(model, policy, part.config) not in there
    ]
    with _timer(seconds, "choosing"):
        failures += _map("decisions", jobs, prepared)[1]
    there = names(store, DECISIONS)
    choices: dict[str, list[Choice]] = {part.name: [] for part in parts}
    for part, model, policy in pairs:
        if compare_decide.name(model, policy, part.config) in there:
            decided = compare_decide.read(model, policy, part.config, store)
            choices[part.name].append(Choice(model, policy, decided))
    if not any(choices.values()):
        raise NothingToCompare(f"every decision failed, the first with: {failures[0].error}")

    # Wall-clock time, with nothing else running; then the report of each block.
    reported = [
        _report(part, choices[part.name], failures, seconds, prepared)
        for part in parts
        if choices[part.name]
    ]
    if any(block.name for block in prepared.blocks):
        over_all = compare_grid.write(store.workdir, reported, reasons)
        console.print(compare_grid.console(reported, over_all))
        console.print(f"\nreport: {store.workdir / 'report.html'}")
        _publish(store, "report.html", "results.json")
    return [dict(part.results) for part in reported]


def _map(
    title: str,
    jobs: Sequence[Job],
    prepared: Prepared,
    costs: Costs | None = None,
    budget: float | None = None,
) -> tuple[dict[str, Any], list[Failure]]:
    folder = prepared.store.workdir / "pool"
    return pool.map(title, jobs, prepared.pool, folder, prepared.console, costs, budget)


def _parts(
    prepared: Prepared, plan: planning.Plan, failures: Sequence[Failure], left_out: Sequence[str]
) -> tuple[list[_Part], list[str]]:
    """What can be compared, and for each block that cannot be the reason."""
    failed = {failure.name: failure for failure in failures}
    parts, reasons = [], []
    for block, environment in zip(prepared.blocks, prepared.environments, strict=True):
        tasks = [task for task in plan.tasks if task.block == block.name]
        own = [failed[task.name].error for task in tasks if task.name in failed]
        left = [task.name for task in tasks if task.name in left_out]
        cells = [task.cell for task in tasks if task.name not in {*failed, *left}]
        reason = ""
        if not any(cell.kind == "regime" for cell in cells):
            reason = f"every network failed, the first with: {own[0]}" if own else ""
            reason = reason or "--budget-hours is over before a network with early exits is there"
        elif not any(cell.name == PLAIN for cell in cells):
            reason = "the plain network is not there, and costs are fractions of its cost"
        if reason:
            reasons.append(_prefixed(block.name, reason))
            continue
        begun = {task.cell.seed for task in tasks if task.name not in left}
        seeds = tuple(seed for seed in block.config.seeds if seed in begun)
        config = dataclasses.replace(block.config, seeds=seeds)
        parts.append(_Part(block.name, config, environment, cells, left))
    return parts, reasons


def _report(
    part: _Part,
    choices: Sequence[Choice],
    failures: Sequence[Failure],
    seconds: dict[str, float],
    prepared: Prepared,
) -> compare_grid.Part:
    """Measures what a block decided, and writes its report."""
    config, cells, console, store = part.config, part.cells, prepared.console, prepared.store
    own = dict(seconds)
    with _timer(own, "timing"), console.status(f"timing compiled inference {part.name}"):
        timing, placement = schemes.measure(choices, cells, config, store.workdir)
    several = len(prepared.blocks) > 1
    failures = [f for f in failures if not several or f.name.startswith(f"{part.name}: ")]
    with _timer(own, "statistics"), console.status(f"statistics and pictures {part.name}"):
        figures, table = assemble(config, cells, choices, timing, placement, store.workdir)
        results = {
            **part.environment,
            "seeds": list(config.seeds),
            "seconds": {**own, "total": sum(own.values())},
            "failed": [{"cell": f.name, "error": f.error} for f in failures],
            "left_out": part.left_out,
            **figures,
        }
        place = store.workdir / part.name
        compare_report.write(place, results, table)
    console.print(compare_report.console(results, table))
    for failure in failures:
        console.print(f"FAILED {failure.name}: {failure.error}", style="red")
    console.print(f"\nreport: {place / 'report.html'}")
    files = ("report.html", "results.json", "results.csv", "table.tex", "config.json")
    _publish(store, *(f"{part.name}/{file}".lstrip("/") for file in files))
    return compare_grid.Part(part.name, results, table)


def _publish(store: Store, *files: str) -> None:
    for file in files:
        if (store.workdir / file).is_file():
            publish(store, file)


def _prefixed(block: str, words: str) -> str:
    return f"{block}: {words}" if block else words


@contextlib.contextmanager
def _timer(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
