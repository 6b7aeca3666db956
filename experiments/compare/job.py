"""A comparison, from a checked configuration to the report. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.panel import Panel

from eejax.training import REGIMES
from experiments.command_line import read_run, to_json
from experiments.compare import cells as compare_cells
from experiments.compare import decide as compare_decide
from experiments.compare import report as compare_report
from experiments.compare import results as compare_results
from experiments.compare import timing as compare_timing
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.choose import CASCADE, Settings, Subject
from experiments.compare.cli import Arguments
from experiments.compare.config import Comparison
from experiments.compare.differences import Answer, correct_at_last
from experiments.compare.results import Facts
from experiments.compare.timing import Contender
from experiments.report import report
from experiments.report.environment import circumstances
from experiments.train import pool as compare_pool
from experiments.train import trained
from experiments.train.pool import Job


class NothingToCompare(Exception):
    """No network could be trained; the message says why."""


class Prepared(NamedTuple):
    """What a comparison begins with.

    Attributes:
      workdir: its directory, with `config.json`.
      facts: what the report opens with.
      console: where everything is shown.
    """

    workdir: Path
    facts: dict[str, Any]
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
    facts = {
        "dataset": dataset.name,
        "data_source": dataset.source,
        "notice": dataset.notice,
        "classes": list(dataset.classes),
        "samples": {
            name: len(getattr(dataset, name).labels)
            for name in ("train", "calibrate", "choose", "certify", "test")
        },
        **circumstances("experiments.compare", argv, datetime.datetime.now().astimezone()),
    }
    if arguments.resume:
        # By its stored name the data set is no fall-back any more; the comparison still is.
        facts["notice"] = read_run(workdir).get("notice", "")
    stored = to_json(config)
    stored["data"]["name"] = dataset.name
    report.write_json(workdir / "config.json", {**facts, "config": stored})
    if facts["notice"]:
        console.print(Panel(facts["notice"], title="NOTICE", style="bold yellow"))
    console.print(f"{dataset.name}: {dataset.source}\neverything goes to {workdir}")
    return Prepared(workdir, facts, console)


def run(arguments: Arguments, prepared: Prepared) -> dict[str, Any]:
    """Trains, decides, measures, and returns the results that it wrote.

    Raises:
      NothingToCompare: not one network with early exits could be trained.
      KeyboardInterrupt: a signal came; what is done is kept.
    """
    config = arguments.run
    workdir, facts, console = prepared
    workers = arguments.jobs or compare_pool.default_workers()
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

    # Who decides on what: every policy on every network with early exits, and on the cascade.
    with _timer(seconds, "measuring"):
        subjects = _subjects(cells, config, workdir)
    settings = Settings(config.targets, config.guarantee, config.drift, config.timing.batch)
    pairs = [(s, p) for s in subjects for p in _policies(s, config)]
    jobs = [
        Job(f"{s.name}, seed {s.seed}, {p}", compare_decide.decide, (s, p, settings, workdir))
        for s, p in pairs
        if compare_decide.read(s, p, settings, workdir) is None
    ]
    with _timer(seconds, "choosing"):
        failures += compare_pool.run("decisions", jobs, workers, console)[1]
    answers = []
    for subject, policy in pairs:
        found = compare_decide.read(subject, policy, settings, workdir)
        if found is not None:
            answers.append(Answer(subject, policy, found))
    if not answers:
        raise NothingToCompare(f"every decision failed, the first with: {failures[0].error}")

    # Wall-clock time, with nothing else running.
    with _timer(seconds, "timing"), console.status("timing compiled inference"):
        timing, placement = _measure(answers, cells, config, workdir)

    with _timer(seconds, "statistics"), console.status("statistics and pictures"):
        results = compare_results.assemble(
            Facts(facts, seconds, failures, timing, placement), config, cells, answers, workdir
        )
        compare_report.write(workdir, results)
    console.print(compare_report.console_table(results))
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


def _subjects(cells: Sequence[Cell], config: Comparison, workdir: Path) -> list[Subject]:
    """What policies decide on, with costs in one unit for all: the plain network's.

    Equal networks take equal time, so one is measured for all regimes and seeds.
    """
    plain = next((c for c in cells if c.name == PLAIN), None)
    if plain is None:
        raise NothingToCompare("the plain network failed, which everything is measured by")
    whole = compare_cells.macs(plain)[-1]
    early = [cell for cell in cells if cell.kind == "regime"]

    def cost(cell: Cell) -> tuple[float, ...]:
        return tuple((compare_cells.macs(cell) / whole).tolist())

    def ms(cell: Cell) -> tuple[float, ...]:
        if not config.targets.budgets_ms:
            return ()
        timing = config.timing
        one = next(c for c in cells if (c.network, c.ends_at) == (cell.network, cell.ends_at))
        return tuple(compare_timing.unit_ms(one, workdir, timing.batch, timing.repeats).cumulative)

    found = [Subject(c.name, c.seed, (c,), cost(c), ms(c)) for c in early]
    if config.static.enabled:
        for seed in config.seeds:
            members = [c for c in cells if c.kind == "static" and c.seed == seed]
            members.sort(key=lambda c: compare_cells.macs(c)[-1])
            if len(members) > 1:
                costs = tuple(cost(member)[-1] for member in members)
                times = tuple(t for member in members for t in ms(member)[-1:])
                found.append(Subject(CASCADE, seed, tuple(members), costs, times))
    return found


def _policies(subject: Subject, config: Comparison) -> list[str]:
    """A cascade stops by confidence; a gate has to be trained."""
    if subject.name == CASCADE:
        return [config.policies[0]]
    return [p for p in config.policies if p != "gate" or REGIMES[subject.name].trains_gate]


def _measure(
    answers: Sequence[Answer], cells: Sequence[Cell], config: Comparison, workdir: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of times, the plain network's first, and of exits to keep; networks of one seed."""
    seed, timing = config.seeds[0], config.timing
    static = [c for c in cells if c.kind == "static" and c.seed == seed]
    static.sort(key=lambda c: c.name != PLAIN)
    first = next((c for c in cells if c.kind == "regime" and c.seed == seed), None)
    if first is None or not static or static[0].name != PLAIN:
        return [], []
    units = compare_timing.unit_ms(first, workdir, timing.batch, timing.repeats)
    contenders = []
    for cell in static:
        correct = float(correct_at_last(compare_cells.traces(cell, workdir).test).mean())
        row = {"regime": "static", "policy": cell.name, "accuracy": correct}
        contenders.append(Contender(row, (cell,), None, None, ()))
    contenders += [
        contender
        for answer in answers
        if answer.subject.seed == seed and answer.policy in timing.policies
        for contender in _contenders(answer)
    ]
    placement = []
    able = [p for p in timing.policies if p != "gate" or REGIMES[first.name].trains_gate]
    for share, policy in itertools.product(timing.keep_exits, able[:1]):
        budget = share * float(units.cumulative[-1])
        chosen, row = compare_timing.placed(first, policy, units, budget, workdir)
        placement.append(row)
        if chosen is None:
            continue
        both: list[tuple[tuple[int, ...] | None, Any]] = [(chosen.exits, chosen.thresholds)]
        if chosen.whole is not None:
            both.append((None, chosen.whole.thresholds))
        for kept, limits in both:
            words = {"regime": first.name, "policy": policy, "placement": budget}
            words["all"] = kept is None
            limits = tuple(map(float, limits))
            contenders.append(Contender(words, (first,), kept, policy, limits))
    rows = compare_timing.timed(contenders, units, workdir, timing.batch, timing.repeats)
    return rows, placement


def _contenders(answer: Answer) -> Iterator[Contender]:
    """What is timed of a policy: its thresholds for each budget."""
    subject = answer.subject
    for row in answer.decided.facts["rows"]:
        budget = row["target"]["kind"] in ("budget", "ms") and row["search"] == "optimal"
        if not budget or "error" in row:
            continue
        cascade = len(subject.cells) > 1
        own = tuple(subject.cells[e] for e in row["exits"]) if cascade else subject.cells
        if cascade and len(own) == 1:
            continue  # a plain network by itself, which is timed already
        words = {"regime": subject.name, "policy": answer.policy, "target": row["target"]}
        words |= {"accuracy": row["accuracy"], "cost": row["cost"]}
        yield Contender(words, own, None, answer.policy, tuple(row["thresholds"]))
