"""What a comparison has to prepare: which networks are missing, what they will take, in what order.

A forecast rests on the networks that are there already: the same network with other seeds, else, by
multiply-accumulates, images and epochs, all of them (`experiments.pool.jobs.Costs`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from experiments.compare import cells as compare_cells
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Block, DriftConfig
from experiments.pool.jobs import Costs, Job
from experiments.store import Store, fetch, names_by_directory
from experiments.train import trained as training


class Task(NamedTuple):
    """A network to prepare.

    Attributes:
      block: name of its block.
      backbone: of its block, in words.
      cell: the network and its seed.
      drift: corrupted images to try it on.
    """

    block: str
    backbone: str
    cell: Cell
    drift: DriftConfig

    @property
    def name(self) -> str:
        """For people."""
        words = f"{self.cell.name}, seed {self.cell.seed}"
        return f"{self.block}: {words}" if self.block else words


class Plan(NamedTuple):
    """What there is to do.

    Attributes:
      tasks: all networks.
      missing: those of them that are to be trained, or to be traced; each cell once.
      costs: what trained networks took.
    """

    tasks: list[Task]
    missing: list[Task]
    costs: Costs


def plan(blocks: Sequence[Block], store: Store) -> Plan:
    """Looks at what is there."""
    tasks = [
        Task(block.name, block.config.network.words, cell, block.config.drift)
        for block in blocks
        for cell in compare_cells.cells(block.config)
    ]
    there = names_by_directory(store, compare_cells.NETWORKS)
    trained = {cell.key for cell in compare_cells.trained([t.cell for t in tasks], store)}
    costs, missing = Costs(), {}
    for task in tasks:
        cell = task.cell
        if cell.key in trained:
            fetch(store, cell.place)
            record = compare_cells.record(cell, store.workdir)
            costs.note(cell.any_seed, _work(cell, record["macs"][-1]), record["seconds"])
        traces = there.get(cell.key, set())
        if cell.key not in trained or compare_cells.missing(cell, task.drift, traces, store):
            missing.setdefault(cell.key, task)
    return Plan(tasks, list(missing.values()), costs)


def jobs(plan: Plan, store: Store, *, by_seed: bool) -> list[Job]:
    """A job for each missing network.

    Args:
      plan: what is missing.
      store: where to.
      by_seed: most useful first: all networks of the first seed before those of the next, and the
        plain network, by whose cost all others are measured, before those with exits, before the
        other plain networks. Otherwise all seeds of a network follow one another, which share a
        compiled program.
    """
    tasks = list(plan.missing)
    if by_seed:
        seeds = list(dict.fromkeys(task.cell.seed for task in plan.tasks))
        tasks.sort(key=lambda task: (seeds.index(task.cell.seed), _use(task.cell)))
    return [
        Job(
            task.name,
            compare_cells.prepare,
            (task.cell, task.drift, store),
            functools.partial(compare_cells.progress, task.cell, store.workdir),
            task.cell.any_seed,
            _work(task.cell, compare_cells.macs(task.cell)[-1]),
        )
        for task in tasks
    ]


def table(plan: Plan, jobs: Sequence[Job], title: str) -> Table:
    """How many seeds of each network are there and are missing, and how long those take."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    result.add_column("network", overflow="fold")
    for name in ("cached", "missing", "hours"):
        result.add_column(name, justify="right", no_wrap=True)
    forecasts = {job.name: plan.costs.seconds(job) for job in jobs}
    groups: dict[str, dict[str, list[Task]]] = {}
    for task in plan.tasks:
        words = f"{task.cell.data.name}, {task.backbone}"
        groups.setdefault(words, {}).setdefault(task.cell.name, []).append(task)
    total: list[float | None] = []
    for words, networks in groups.items():
        result.add_row(words)
        for name, tasks in networks.items():
            hours = [forecasts[task.name] for task in tasks if task.name in forecasts]
            total += hours
            counts = len(tasks) - len(hours), len(hours)
            result.add_row(f"  {name}", *map(str, counts), _hours(hours))
    counts = len(plan.tasks) - len(total), len(total)
    result.add_row("all", *map(str, counts), _hours(total))
    return result


def _hours(seconds: Sequence[float | None]) -> str:
    """Their sum, or that it cannot be told."""
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return "unknown" if not known else f"over {sum(known) / 3600:.2f}"
    return f"{sum(known) / 3600:.2f}" if known else ""


def _use(cell: Cell) -> int:
    return 0 if cell.name == PLAIN else 1 if cell.kind == "regime" else 2


def _work(cell: Cell, macs: float) -> float:
    return macs * len(training.dataset(cell.run).train.images) * cell.train.epochs
