"""Thresholds for every target: chosen on the split `choose`, and certified on `certify`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax import policies
from eejax.evaluation.routing import Scored, score
from eejax.selection import guarantees, thresholds
from eejax.selection.guarantees import Certificate
from eejax.selection.placement import keep_trace
from eejax.selection.thresholds import Choice
from eejax.trace import Trace
from experiments.compare import cells as compare_cells
from experiments.compare.cells import Cell, Traces
from experiments.compare.config import DriftConfig, GuaranteeConfig, Loss, TargetsConfig

CASCADE = "cascade"
MOST_MEMBERS = 3


class Subject(NamedTuple):
    """What a policy decides on: a network with early exits, or a cascade of plain ones.

    Attributes:
      name: the regime's, or "cascade".
      seed: of all its cells.
      cells: one for early exits; the members of the cascade, cheapest first.
      cost: multiply-accumulates of leaving at each exit, or of running each member by itself, as
        fractions of the plain network's.
      ms: the same in milliseconds for a batch, as measured; empty where no target is in them.
    """

    name: str
    seed: int
    cells: tuple[Cell, ...]
    cost: tuple[float, ...]
    ms: tuple[float, ...]


class Settings(NamedTuple):
    """The parts of a configuration that decisions depend on."""

    targets: TargetsConfig
    guarantee: GuaranteeConfig
    drift: DriftConfig
    batch: int


class Family(NamedTuple):
    """Exits, or members of a cascade, that are used together, and a policy's view of them."""

    exits: tuple[int, ...]
    choose: Scored
    certify: Scored
    test: Scored
    cost: np.ndarray
    ms: np.ndarray


def subject_traces(subject: Subject, workdir: Path) -> Traces:
    """Its traces; those of a cascade have a member where a network has an exit."""
    members = [compare_cells.traces(cell, workdir) for cell in subject.cells]
    return Traces(*(_together(parts) for parts in zip(*members, strict=True)))


def _together(parts: tuple[Trace, ...]) -> Trace:
    assert all((part.ids == parts[0].ids).all() for part in parts)
    logits = np.concatenate([part.logits for part in parts], axis=1)
    gates = np.concatenate([part.gates for part in parts], axis=1)
    return parts[0]._replace(logits=logits, gates=gates)


def families(subject: Subject, name: str, traces: Traces) -> list[Family]:
    """All exits of a network; of a cascade every choice of up to three members."""
    count = len(subject.cost)
    cost, ms = np.asarray(subject.cost), np.asarray(subject.ms)
    if subject.name != CASCADE:
        return [_family(tuple(range(count)), name, traces, cost, ms)]
    found = []
    for members in range(1, MOST_MEMBERS + 1):
        for chosen in itertools.combinations(range(count), members):
            own = list(chosen)
            spent = np.cumsum(ms[own]) if len(ms) else ms
            found.append(_family(chosen, name, traces, np.cumsum(cost[own]), spent))
    return found


def _family(
    exits: tuple[int, ...], name: str, traces: Traces, cost: np.ndarray, ms: np.ndarray
) -> Family:
    calibrate, choose, certify, test = (keep_trace(trace, exits) for trace in traces)
    policy = policies.fit(name, calibrate, cost)
    scored = (score(policy, choose), score(policy, certify), score(policy, test))
    return Family(exits, *scored, cost, ms)


class Chosen(NamedTuple):
    """Thresholds for a target.

    Attributes:
      row: what the report says of it: `target`, `search`, and `error` where it cannot be met.
      family: what the thresholds are for.
      thresholds: or None.
    """

    row: dict[str, Any]
    family: Family
    thresholds: np.ndarray | None


def for_targets(
    some: Sequence[Family],
    policy: str,
    traces: Traces,
    settings: Settings,
    subject: Subject,
) -> Iterator[Chosen]:
    """Thresholds for every target. A cascade has budgets only."""
    targets = settings.targets

    def best(target: dict[str, Any], search: Any, value: float, unit: str = "cost") -> Chosen:
        words = "geometric" if search is thresholds.geometric else "optimal"
        return _best({"target": target, "search": words}, some, traces, search, value, unit)

    for value in targets.budgets:
        yield best({"kind": "budget", "value": value}, thresholds.for_budget, value)
    for value in targets.budgets_ms if subject.ms else ():
        target = {"kind": "ms", "value": value, "batch": settings.batch}
        yield best(target, thresholds.for_budget, value, "ms")
    if subject.name == CASCADE:
        return
    for value in targets.budgets if targets.geometric else ():
        yield best({"kind": "budget", "value": value}, thresholds.geometric, value)
    for value in targets.drops:
        yield best({"kind": "drop", "value": value}, thresholds.for_drop, value)
    if policy in settings.guarantee.policies:
        for loss in settings.guarantee.losses:
            yield from _guaranteed(some[0], loss, traces, settings.guarantee, subject)


def _best(
    row: dict[str, Any],
    some: Sequence[Family],
    traces: Traces,
    search: Callable[..., Choice],
    value: float,
    unit: str,
) -> Chosen:
    """Of several families the one that is best on the split `choose`."""
    able, error = [], ""
    for family in some:
        correct = family.choose.predictions == traces.choose.labels[:, None]
        try:
            found = search(family.choose.scores, correct, getattr(family, unit), value)
        except ValueError as refused:
            error = str(refused)
        else:
            able.append((found, family))
    if not able:
        return Chosen({**row, "error": error}, some[0], None)
    choice, family = min(able, key=lambda pair: (-pair[0].accuracy, pair[0].mean_cost))
    return Chosen({**row, "exits": list(family.exits)}, family, choice.thresholds)


def _guaranteed(
    family: Family, loss: Loss, traces: Traces, config: GuaranteeConfig, subject: Subject
) -> Iterator[Chosen]:
    """Certified risks, alone and together with a certified mean cost."""
    used = {
        "training": compare_cells.training_ids(subject.cells[0].run),
        "calibrating temperatures": traces.calibrate.ids,
    }
    judged, losses = traces.choose, guarantees.errors(family.certify, traces.certify.labels)
    if loss == "disagreement":
        # What the last exit says then is what is right.
        judged = judged._replace(labels=family.choose.predictions[:, -1])
        losses = guarantees.disagreement(family.certify)
    half = config.delta / 2
    for path in config.paths:
        if path == "shared":
            candidates = guarantees.shared_path(family.choose, traces.choose)
        else:
            candidates = guarantees.per_exit_path(family.choose, judged, family.cost)
        data = (candidates, family.certify, losses, traces.certify, family.cost)
        common = {"loss": loss, "delta": config.delta, "path": path}
        for risk in config.risks:
            for method in config.methods:
                target = {"kind": "risk", "value": risk, "method": method, **common}
                control = functools.partial(
                    guarantees.control_risk, used=used, delta=config.delta, method=method
                )
                yield _certified(target, family, control, *data, risk)
            for budget in config.budgets:
                target = {"kind": "certificate", "value": risk, "budget": budget, **common}
                certify = functools.partial(
                    guarantees.certify, used=used, delta_risk=half, delta_cost=half
                )
                yield _certified(
                    {**target, "method": "betting"}, family, certify, *data, risk, budget
                )


def _certified(
    target: dict[str, Any], family: Family, certify: Callable[..., Certificate], *data: Any
) -> Chosen:
    row = {"target": target, "search": "path"}
    try:
        certificate = certify(*data)
    except ValueError as error:
        return Chosen({**row, "error": str(error)}, family, None)
    words = {"certificate": certificate.words, "exits": list(family.exits)}
    return Chosen({**row, **words}, family, certificate.thresholds)
