"""One policy on one network: thresholds for every target, and what they come to on the test split.

Thresholds are chosen on the split `choose`, risks certified on `certify`, and everything that is
reported is of the split `test`. No network is run here: traces are all that is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax import policies
from eejax.evaluation import metrics, routing
from eejax.evaluation.routing import Routed, route
from eejax.policies import ensembles, scheduler
from eejax.policies import temperature as calibration
from eejax.selection import bounds, guarantees, placement, thresholds
from eejax.trace import Trace
from experiments.command_line import to_json
from experiments.compare import choose as compare_choose
from experiments.compare import drift as compare_drift
from experiments.compare.cells import Traces
from experiments.compare.choose import (
    CASCADE,
    Family,
    Settings,
    Subject,
    families,
    for_targets,
    subject_traces,
)
from experiments.compare.drift import drifted
from experiments.data.cache import replacing

# What is decided depends on these; when one changes, everything is decided anew.
_DECIDING = (
    *(bounds, calibration, ensembles, guarantees, metrics, placement, policies, routing, scheduler),
    *(thresholds, compare_choose, compare_drift),
)


class Decided(NamedTuple):
    """What was written.

    Attributes:
      facts: `rows`, one a target; `curve`; `drift`.
      arrays: `exits`, `answers` and `correct`, each `[rows, N]` on the test split, and for each row
        of `drift` its losses.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def key(subject: Subject, policy: str, settings: Settings) -> str:
    """The name of its files, which changes with everything that changes the result."""
    made_of = [
        _sources(),
        [cell.key for cell in subject.cells],
        subject.cost,
        subject.ms,
        policy,
        [to_json(part) for part in settings[:3]],
        settings.batch,
    ]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return f"{subject.name}-seed{subject.seed}-{policy}-{digest}"


@functools.cache
def _sources() -> str:
    files = [module.__file__ for module in _DECIDING] + [__file__]
    return hashlib.sha256(b"".join(Path(str(f)).read_bytes() for f in files)).hexdigest()


def decide(subject: Subject, policy: str, settings: Settings, workdir: Path) -> None:
    """Decides and writes; what is there already is left alone."""
    place = workdir / "decisions"
    place.mkdir(parents=True, exist_ok=True)
    name = key(subject, policy, settings)
    if (place / f"{name}.json").exists():
        return
    decided = _decided(subject, policy, settings, workdir)
    with replacing(place / f"{name}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **decided.arrays)  # type: ignore[arg-type]
    with replacing(place / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(decided.facts))


def read(subject: Subject, policy: str, settings: Settings, workdir: Path) -> Decided | None:
    """What `decide` wrote, or None."""
    path = workdir / "decisions" / f"{key(subject, policy, settings)}.json"
    if not path.exists():
        return None
    with np.load(path.with_suffix(".npz")) as stored:
        return Decided(json.loads(path.read_text()), dict(stored))


def _decided(subject: Subject, policy: str, settings: Settings, workdir: Path) -> Decided:
    traces = subject_traces(subject, workdir)
    some = families(subject, policy, traces)
    rows, routes = [], []
    for row, family, limits in for_targets(some, policy, traces, settings, subject):
        routed = None
        if limits is not None:
            routed = route(family.test, limits)
            row |= _outcome(routed, family, traces.test, limits)
            if policy == "vote":
                row["ece"] = None  # its answer counts votes, and is no probability
        rows.append(row)
        routes.append(routed)
    arrays = _arrays(routes, traces.test)
    drift, losses = [], {}
    if policy in settings.drift.policies and subject.name != CASCADE:
        drift, losses = drifted(subject, policy, traces, rows, settings.drift, workdir)
    facts = {
        "rows": rows,
        "curve": _curve(some, traces, max(subject.cost), settings.targets.curve),
        "drift": drift,
    }
    return Decided(facts, arrays | losses)


def _outcome(routed: Routed, family: Family, test: Trace, limits: np.ndarray) -> dict[str, Any]:
    """What thresholds come to on the test split."""
    result = metrics.outcome(routed, test.labels, family.cost)
    correct = family.test.predictions == test.labels[:, None]
    classes = family.test.logits.shape[-1]
    by_class = metrics.exit_fractions_by_class(routed.exits, test.labels, classes, len(family.cost))
    answers = routed.logits.argmax(-1)
    return {
        "thresholds": [float(t) for t in limits],
        "accuracy": result.accuracy,
        "cost": result.mean_cost,
        "ms": float(family.ms[routed.exits].mean()) if len(family.ms) else None,
        "exit_fractions": result.exit_fractions.tolist(),
        "ece": metrics.expected_calibration_error(routed.logits, test.labels),
        "random": metrics.random_at_equal_rates(correct, result.exit_fractions),
        "oracle": metrics.oracle_accuracy(correct, family.cost, result.mean_cost),
        "last_accuracy": float(correct[:, -1].mean()),
        "disagreement": float((answers != family.test.predictions[:, -1]).mean()),
        "class_exit_fractions": by_class.tolist(),
    }


def _arrays(routes: list[Routed | None], test: Trace) -> dict[str, np.ndarray]:
    n = len(test.labels)
    exits, answers = np.full((len(routes), n), 255, np.uint8), np.full((len(routes), n), -1, int)
    for i, routed in enumerate(routes):
        if routed is not None:
            exits[i], answers[i] = routed.exits, routed.logits.argmax(-1)
    correct = answers == test.labels[None]
    return {"exits": exits, "answers": answers.astype(np.int16), "correct": correct}


def _curve(
    some: list[Family], traces: Traces, dearest: float, points: int
) -> list[dict[str, float]]:
    """Test accuracy and cost at budgets over the whole range, each chosen for on `choose`."""
    cheapest = min(f.cost[0] for f in some)
    budgets = np.linspace(cheapest, dearest, points)
    best: list[Any] = [None] * points
    for family in some:
        able = np.flatnonzero(budgets >= family.cost[0])
        correct = family.choose.predictions == traces.choose.labels[:, None]
        found = thresholds.for_budgets(family.choose.scores, correct, family.cost, budgets[able])
        for i, choice in zip(able, found, strict=True):
            if best[i] is None or choice.accuracy > best[i][0].accuracy:
                best[i] = (choice, family)
    rows = []
    for choice, family in best:
        routed = route(family.test, choice.thresholds)
        result = metrics.outcome(routed, traces.test.labels, family.cost)
        rows.append({"cost": result.mean_cost, "accuracy": result.accuracy})
    return rows
