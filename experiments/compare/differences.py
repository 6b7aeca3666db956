"""What the differences between schemes are worth, and how often they say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax.evaluation import metrics
from eejax.evaluation.significance import paired_bootstrap
from eejax.trace import Trace
from experiments.compare import cells as compare_cells
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.choose import Subject
from experiments.compare.config import Comparison
from experiments.compare.decide import Decided

DRAWS = 20_000
LEVEL = 0.95
# Baselines that are there for scale: their own differences would only dilute the others.
SCALE = ("fixed", "random")


class Answer(NamedTuple):
    """What a policy decided on a network."""

    subject: Subject
    policy: str
    decided: Decided


Group = Sequence[Answer]


def named(cells: Sequence[Cell], kind: str) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: c.seed):
        if cell.kind == kind:
            found.setdefault(cell.name, []).append(cell)
    return found


class _Side(NamedTuple):
    """One of two schemes: for each seed, who of the test samples was right, `[N]`, and the cost."""

    name: tuple[str, str]
    correct: dict[int, np.ndarray]
    cost: dict[int, float]


def against(
    groups: Mapping[tuple[str, str], Group],
    reference: tuple[str, str],
    cells: Sequence[Cell],
    config: Comparison,
    workdir: Path,
) -> tuple[list[dict[str, Any]], int, int]:
    """Every scheme minus the reference at each budget, and the reference minus the best plain
    network within the budget, by paired bootstrap over test samples and seeds.

    A difference is significant where its interval, widened for the number of comparisons, lies on
    one side of zero, *and* every seed's own difference does: three seeds resampled do not show how
    far the next one may lie, and a sign that seeds do not share is no finding.

    Returns:
      The rows, how many different comparisons they hold (two budgets may come to the same answers),
      and the draws of the bootstrap.
    """
    pairs = []
    for budget in config.targets.budgets:
        target = {"kind": "budget", "value": budget}
        own = _side(reference, groups.get(reference, ()), target)
        for key, group in groups.items():
            if key != reference and key[1] not in SCALE:
                pairs.append((target, _side(key, group, target), own))
        frontier = _frontier(cells, budget, workdir)
        if frontier is not None:
            pairs.append((target, own, frontier))
    shared = [(t, a, b, sorted(a.correct.keys() & b.correct.keys())) for t, a, b in pairs]
    shared = [(t, a, b, seeds) for t, a, b, seeds in shared if seeds]
    answers = []
    for _, a, b, seeds in shared:
        left, correct = (np.stack([side.correct[seed] for seed in seeds]) for side in (a, b))
        answers.append((left.tobytes(), correct.tobytes(), (left, correct)))
    distinct = {(left, correct): both for left, correct, both in answers}
    # Enough draws beyond the ends of the widened intervals for them to rest on.
    draws = max(DRAWS, math.ceil(40 * len(distinct) / (1 - LEVEL)))
    found = {
        key: paired_bootstrap(*both, seed=0, draws=draws, level=LEVEL, comparisons=len(distinct))
        for key, both in distinct.items()
    }
    rows = []
    for (target, a, b, seeds), (left, correct, both) in zip(shared, answers, strict=True):
        difference = found[left, correct]
        each = (both[0].mean(1) - both[1].mean(1)).tolist()
        alike = all(d > 0 for d in each) or all(d < 0 for d in each)
        rows.append(
            {
                "target": target,
                "a": {"regime": a.name[0], "policy": a.name[1]},
                "b": {"regime": b.name[0], "policy": b.name[1]},
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p": difference.p,
                "adjusted_p": min(1.0, difference.p * len(distinct)),
                "significant": alike and (difference.low > 0 or difference.high < 0),
                "seeds": dict(zip(map(str, seeds), each, strict=True)),
                "cost_difference": float(np.mean([a.cost[s] - b.cost[s] for s in seeds])),
            }
        )
    return rows, len(distinct), draws


def _side(name: tuple[str, str], group: Group, target: Mapping[str, Any]) -> _Side:
    """A scheme at a target; seeds that could not meet it are left out."""
    side = _Side(name, {}, {})
    for answer in group:
        for i, row in enumerate(answer.decided.facts["rows"]):
            if row["target"] == target and row["search"] == "optimal" and "accuracy" in row:
                side.correct[answer.subject.seed] = answer.decided.arrays["correct"][i]
                side.cost[answer.subject.seed] = row["cost"]
    return side


def _frontier(cells: Sequence[Cell], budget: float, workdir: Path) -> _Side | None:
    """The plain network within a budget that is best on the held-out split `choose`."""
    whole = float(next(compare_cells.macs(c)[-1] for c in cells if c.name == PLAIN))
    best: tuple[float, _Side] | None = None
    for name, group in named(cells, "static").items():
        cost = float(compare_cells.macs(group[0])[-1]) / whole
        if cost > budget:
            continue
        traces = {cell.seed: compare_cells.traces(cell, workdir) for cell in group}
        held_out = float(np.mean([correct_at_last(t.choose).mean() for t in traces.values()]))
        if best is None or held_out > best[0]:
            correct = {seed: correct_at_last(t.test) for seed, t in traces.items()}
            best = held_out, _Side(("static", name), correct, dict.fromkeys(correct, cost))
    return None if best is None else best[1]


def correct_at_last(trace: Trace) -> np.ndarray:
    """`[N]`, whether the last exit is right."""
    return trace.logits[:, -1].argmax(-1) == trace.labels


def agreement(groups: Mapping[tuple[str, str], Group], config: Comparison) -> list[dict[str, Any]]:
    """How often two policies say the same at the first budget, over seeds; of each regime."""
    target = {"kind": "budget", "value": config.targets.budgets[0]}
    made = []
    for regime in config.regimes:
        own = {policy: group for (name, policy), group in groups.items() if name == regime}
        most = max((len(group) for group in own.values()), default=0)
        said: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for policy, group in own.items():
            # One that failed for a seed has nothing to be laid beside the others there.
            if len(_side((regime, policy), group, target).correct) == most:
                arrays = [(a.decided.arrays, _index(a, target)) for a in group]
                said[policy] = (
                    np.concatenate([found["exits"][i] for found, i in arrays]),
                    np.concatenate([found["answers"][i] for found, i in arrays]),
                )
        if said:
            exits, answers = (np.stack(parts) for parts in zip(*said.values(), strict=True))
            made.append(
                {
                    "regime": regime,
                    "target": target,
                    "policies": list(said),
                    "exits": metrics.agreement_matrix(exits).tolist(),
                    "answers": metrics.agreement_matrix(answers).tolist(),
                }
            )
    return made


def _index(answer: Answer, target: Mapping[str, Any]) -> int:
    rows = answer.decided.facts["rows"]
    return next(i for i, r in enumerate(rows) if r["target"] == target and r["search"] == "optimal")
