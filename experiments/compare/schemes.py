"""What is compared: policies on networks and on a cascade of them, and how long they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eejax.policies import POLICIES
from eejax.training import REGIMES
from experiments.compare import cells as compare_cells
from experiments.compare import decide as compare_decide
from experiments.compare import timing as compare_timing
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Comparison
from experiments.compare.decide import CASCADE, Choice, Model
from experiments.compare.differences import correct_at_last


def models(cells: Sequence[Cell], config: Comparison, workdir: Path) -> list[Model]:
    """What policies decide on, with costs in one unit for all: the plain network's.

    Equal networks take equal time, so one is measured for all regimes and seeds.
    """
    plain = next(c for c in cells if c.name == PLAIN)
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


def able(model: Model, config: Comparison) -> list[str]:
    """A cascade stops by confidence; a gate has to be trained."""
    if model.name == CASCADE:
        return [config.policies[0]]
    gate = REGIMES[model.cells[0].train.regime].trains_gate
    return [p for p in config.policies if gate or not POLICIES[p].needs_gate]


def measure(
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
