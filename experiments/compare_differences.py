"""What the differences between schemes are worth, and how often they say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax import metrics
from eejax.routing import Trace
from eejax.significance import holm, paired_bootstrap
from experiments import compare_cells
from experiments.compare_cells import PLAIN, Cell
from experiments.compare_choose import Subject
from experiments.compare_config import Comparison
from experiments.compare_decide import Decided

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


def against(
    groups: Mapping[tuple[str, str], Group],
    reference: tuple[str, str],
    cells: Sequence[Cell],
    config: Comparison,
    workdir: Path,
) -> list[dict[str, Any]]:
    """Every scheme against the reference at each budget, and the reference against the best plain
    network within the budget, by paired bootstrap over test samples and seeds."""
    whole = float(next(compare_cells.macs(c)[-1] for c in cells if c.name == PLAIN))
    pairs = []
    for budget in config.targets.budgets:
        target = {"kind": "budget", "value": budget}
        own = _right(groups[reference], target) if reference in groups else None
        if own is None:
            continue
        for key, group in groups.items():
            theirs = _right(group, target)
            if key != reference and key[1] not in SCALE and theirs is not None:
                pairs.append((target, key, reference, theirs, own))
        frontier = _frontier(cells, whole * budget, workdir)
        if frontier is not None:
            name, right, cost = frontier
            pairs.append((target, reference, ("static", name), own, (right, cost / whole)))
    rows = []
    for target, a, b, (right_a, cost_a), (right_b, cost_b) in pairs:
        seeds = min(len(right_a), len(right_b))
        found = paired_bootstrap(
            right_a[:seeds], right_b[:seeds], 0, DRAWS, LEVEL, comparisons=len(pairs)
        )
        rows.append(
            {
                "target": target,
                "a": {"regime": a[0], "policy": a[1]},
                "b": {"regime": b[0], "policy": b[1]},
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
                "p": found.p,
                "cost_difference": float(cost_a - cost_b),
            }
        )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["adjusted_p"] = float(adjusted)
        row["significant"] = bool(row["low"] > 0 or row["high"] < 0)
    return rows


def _right(group: Group, target: Mapping[str, Any]) -> tuple[np.ndarray, float] | None:
    """Whether each test sample was right, `[S, N]`, and the mean cost; None where a seed lacks."""
    found, cost = [], []
    for answer in group:
        rows = answer.decided.facts["rows"]
        i = next(
            i for i, r in enumerate(rows) if r["target"] == target and r["search"] == "optimal"
        )
        if "accuracy" not in rows[i]:
            return None
        found.append(answer.decided.arrays["right"][i])
        cost.append(rows[i]["cost"])
    return np.stack(found), float(np.mean(cost))


def _frontier(
    cells: Sequence[Cell], most: float, workdir: Path
) -> tuple[str, np.ndarray, float] | None:
    """The plain network within a budget that is best on the held-out split `choose`."""
    best: tuple[float, str, np.ndarray, float] | None = None
    for name, group in named(cells, "static").items():
        cost = float(compare_cells.macs(group[0])[-1])
        if cost > most:
            continue
        traces = [compare_cells.traces(cell, workdir) for cell in group]
        right = [
            [(t.logits[:, -1].argmax(-1) == t.labels) for t in (x.choose, x.test)] for x in traces
        ]
        held_out = float(np.mean([chosen.mean() for chosen, _ in right]))
        if best is None or held_out > best[0]:
            best = held_out, name, np.stack([test for _, test in right]), cost
    return None if best is None else best[1:]


def _right_at_last(trace: Trace) -> np.ndarray:
    return trace.logits[:, -1].argmax(-1) == trace.labels


def agreement(groups: Mapping[tuple[str, str], Group], config: Comparison) -> list[dict[str, Any]]:
    """How often two policies say the same at the first budget, over seeds; of each regime."""
    target = {"kind": "budget", "value": config.targets.budgets[0]}
    made = []
    for regime in config.regimes:
        seeds = {a.subject.seed for key, group in groups.items() for a in group if key[0] == regime}
        names, exits, answers = [], [], []
        for (name, policy), group in groups.items():
            # A policy that failed for a seed has nothing to be laid beside the others there.
            if name != regime or len(group) < len(seeds) or _right(group, target) is None:
                continue
            i = config.targets.budgets.index(target["value"])
            names.append(policy)
            exits.append(np.concatenate([a.decided.arrays["exits"][i] for a in group]))
            answers.append(np.concatenate([a.decided.arrays["answers"][i] for a in group]))
        if names:
            made.append(
                {
                    "regime": regime,
                    "target": target,
                    "policies": names,
                    "exits": metrics.agreement_matrix(np.stack(exits)).tolist(),
                    "answers": metrics.agreement_matrix(np.stack(answers)).tolist(),
                }
            )
    return made
