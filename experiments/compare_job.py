"""A comparison, from a checked configuration to the report. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.panel import Panel

from experiments import (
    compare_cells,
    compare_decide,
    compare_pool,
    compare_report,
    compare_results,
    compare_timing,
    report,
)
from experiments.circumstances import circumstances
from experiments.compare_cells import PLAIN, Cell
from experiments.compare_choose import CASCADE, Settings, Subject
from experiments.compare_cli import Arguments
from experiments.compare_config import Comparison
from experiments.compare_differences import Answer
from experiments.compare_pool import Job
from experiments.compare_results import Facts
from experiments.compare_timing import Contender
from experiments.config import to_json


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
      ValueError, OSError: the data cannot be had or do not fit the configuration, or the directory
        cannot be written; one line.
    """
    console = Console(soft_wrap=True)
    config, workdir = arguments.run, arguments.workdir
    assert workdir is not None
    with console.status("reading images"):
        dataset = compare_cells.dataset(config.data)
    if len(dataset.train.images) < config.train.batch:
        raise ValueError(
            f"train.batch: {config.train.batch} for {len(dataset.train.images)} training images; "
            "give a smaller batch."
        )
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
    stored = to_json(config)
    stored["data"]["name"] = dataset.name
    report.write_json(workdir / "config.json", {**facts, "config": stored})
    if dataset.notice:
        console.print(Panel(dataset.notice, title="NOTICE", style="bold yellow"))
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

    All regimes have the same network, so the stages of one are measured for all.
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
        return tuple(compare_timing.unit_ms(cell, workdir, timing.batch, timing.repeats).cumulative)

    found = [Subject(c.name, c.seed, (c,), cost(c), ms(early[0])) for c in early]
    if config.static.enabled:
        for seed in config.seeds:
            members = _members([c for c in cells if c.kind == "static" and c.seed == seed], workdir)
            if len(members) > 1:
                costs = tuple(cost(member)[-1] for member in members)
                times = tuple(t for member in members for t in ms(member)[-1:])
                found.append(Subject(CASCADE, seed, tuple(members), costs, times))
    return found


def _members(static: Sequence[Cell], workdir: Path) -> list[Cell]:
    """A cascade's members, cheapest first: those that are better than all cheaper ones on the split
    that temperatures are fitted on."""
    found: list[Cell] = []
    best = -1.0
    for cell in sorted(static, key=lambda c: compare_cells.macs(c)[-1]):
        trace = compare_cells.traces(cell, workdir).calibrate
        accuracy = float((trace.logits[:, -1].argmax(-1) == trace.labels).mean())
        if accuracy > best:
            found.append(cell)
            best = accuracy
    return found


def _policies(subject: Subject, config: Comparison) -> list[str]:
    """A cascade stops by confidence; a gate has to be trained."""
    if subject.name == CASCADE:
        return [config.policies[0]]
    return [p for p in config.policies if p != "gate" or subject.name != "joint"]


def _measure(
    answers: Sequence[Answer], cells: Sequence[Cell], config: Comparison, workdir: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of times, the plain network's first, and of exits to keep; networks of one seed."""
    seed, timing = config.seeds[0], config.timing
    static = [c for c in cells if c.kind == "static" and c.seed == seed]
    static.sort(key=lambda c: c.name != PLAIN)
    if not static or static[0].name != PLAIN:
        return [], []
    contenders = [
        Contender({"regime": "static", "policy": cell.name}, (cell,), None, None, ())
        for cell in static
    ]
    for answer in answers:
        subject, policy = answer.subject, answer.policy
        if subject.seed != seed or policy not in timing.policies:
            continue
        for row in answer.decided.facts["rows"]:
            if row["target"]["kind"] != "budget" or row["search"] != "optimal" or "error" in row:
                continue
            kept = [subject.cells[e] for e in row["exits"]] if len(subject.cells) > 1 else []
            if len(kept) == 1:
                continue  # one plain network alone, which is timed already
            words = {"regime": subject.name, "policy": policy, "target": row["target"]}
            words |= {"accuracy": row["accuracy"], "cost": row["cost"]}
            limits = tuple(row["thresholds"])
            contenders.append(Contender(words, tuple(kept) or subject.cells, None, policy, limits))
    placement = []
    first = next((c for c in cells if c.kind == "regime" and c.seed == seed), None)
    if first is None or not timing.policies:
        return compare_timing.timed(contenders, workdir, timing.batch, timing.repeats), []
    ms = compare_timing.unit_ms(first, workdir, timing.batch, timing.repeats)
    whole = compare_timing.unit_ms(static[0], workdir, timing.batch, timing.repeats)
    for share in timing.keep_exits:
        budget, policy = share * float(whole.cumulative[-1]), timing.policies[0]
        found = compare_timing.placed(first, policy, ms, budget, workdir)
        if found is None:
            continue
        chosen, row = found
        placement.append(row)
        both: list[tuple[tuple[int, ...] | None, Any]] = [(chosen.exits, chosen.thresholds)]
        if chosen.whole is not None:
            both.append((None, chosen.whole.thresholds))
        for kept, limits in both:
            words = {"regime": first.name, "policy": policy, "placement": budget}
            contenders.append(
                Contender(
                    {**words, "all": kept is None},
                    (first,),
                    kept,
                    policy,
                    tuple(map(float, limits)),
                )
            )
    return compare_timing.timed(contenders, workdir, timing.batch, timing.repeats), placement
