"""Tests of the differences between schemes, and how often policies agree.

A scheme is a regime and a policy. `differences` in results.json:

    [{target T, a, b, difference, low, high, p, adjusted_p, significant, seeds {seed: difference},
      cost_difference}]

`a` and `b` are {regime, policy}, and `a` minus `b` is meant. `low` and `high` are the ends of the
interval by paired bootstrap, widened for the number of comparisons (Bonferroni), and `adjusted_p`
is `p` times that number. `agreement` there:

    [{regime, target, policies [P], exits [P][P], answers [P][P]}]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax.evaluation import metrics
from eejax.evaluation.significance import paired_bootstrap
from eejax.policies import POLICIES
from eejax.trace import Trace
from experiments.compare import cells as compare_cells
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Comparison
from experiments.compare.decide import Choice

DRAWS = 20_000
LEVEL = 0.95
Groups = Mapping[tuple[str, str], Sequence[Choice]]


class Scheme(NamedTuple):
    """A scheme at a target.

    Attributes:
      name: regime and policy.
      correct: by seed, `[N]` bool: which test images are classified correctly.
      cost: by seed.
    """

    name: tuple[str, str]
    correct: dict[int, np.ndarray]
    cost: dict[int, float]


def by_name(cells: Sequence[Cell], kind: str) -> dict[str, list[Cell]]:
    """The cells of a kind by name, each with its seeds in order."""
    names: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: c.seed):
        if cell.kind == kind:
            names.setdefault(cell.name, []).append(cell)
    return names


def against(
    groups: Groups,
    reference: tuple[str, str],
    cells: Sequence[Cell],
    config: Comparison,
    workdir: Path,
) -> tuple[list[dict[str, Any]], int, int]:
    """Every scheme minus the reference at each budget, and the reference minus the best plain
    network within the budget, by paired bootstrap over test samples and seeds.

    A difference is significant where its interval, widened for the number of comparisons, lies on
    one side of zero, *and* the difference of every seed does: three seeds resampled do not show how
    far the next one may lie.

    Returns:
      The rows, how many different comparisons they hold (two budgets may come to the same
      predictions), and the draws of the bootstrap.
    """
    pairs = []
    for budget in config.targets.budgets:
        target = {"kind": "budget", "value": budget}
        first = _scheme(reference, groups.get(reference, ()), target)
        for key, group in groups.items():
            # Baselines are there for scale: their differences would only dilute the others.
            if key != reference and not POLICIES[key[1]].baseline:
                pairs.append((target, _scheme(key, group, target), first))
        plain = _best_plain(cells, budget, workdir)
        if plain is not None:
            pairs.append((target, first, plain))
    shared = []
    for target, a, b in pairs:
        seeds = sorted(a.correct.keys() & b.correct.keys())
        if seeds:
            left, right = (np.stack([scheme.correct[s] for s in seeds]) for scheme in (a, b))
            shared.append((target, a, b, seeds, left, right))
    distinct = {(left.tobytes(), right.tobytes()): (left, right) for *_, left, right in shared}
    # Enough draws beyond the ends of the widened intervals for them to rest on.
    draws = max(DRAWS, math.ceil(40 * len(distinct) / (1 - LEVEL)))
    tests = {
        key: paired_bootstrap(*pair, seed=0, draws=draws, level=LEVEL, comparisons=len(distinct))
        for key, pair in distinct.items()
    }
    rows = []
    for target, a, b, seeds, left, right in shared:
        test = tests[left.tobytes(), right.tobytes()]
        by_seed = (left.mean(1) - right.mean(1)).tolist()
        alike = all(d > 0 for d in by_seed) or all(d < 0 for d in by_seed)
        rows.append(
            {
                "target": target,
                "a": {"regime": a.name[0], "policy": a.name[1]},
                "b": {"regime": b.name[0], "policy": b.name[1]},
                "difference": test.mean,
                "low": test.low,
                "high": test.high,
                "p": test.p,
                "adjusted_p": min(1.0, test.p * len(distinct)),
                "significant": alike and (test.low > 0 or test.high < 0),
                "seeds": dict(zip(map(str, seeds), by_seed, strict=True)),
                "cost_difference": float(np.mean([a.cost[s] - b.cost[s] for s in seeds])),
            }
        )
    return rows, len(distinct), draws


def _scheme(name: tuple[str, str], group: Sequence[Choice], target: Mapping[str, Any]) -> Scheme:
    """A scheme at a target; seeds that could not meet it are left out."""
    scheme = Scheme(name, {}, {})
    for choice in group:
        i = _index(choice, target)
        row = choice.decided.rows[i]
        if "error" not in row:
            scheme.correct[choice.model.seed] = choice.decided.arrays["correct"][i]
            scheme.cost[choice.model.seed] = row["cost"]
    return scheme


def _index(choice: Choice, target: Mapping[str, Any]) -> int:
    """Which row of a decision is of the optimal search for a target."""
    return next(
        i
        for i, row in enumerate(choice.decided.rows)
        if row["json_target"] == target and row["search"] == "optimal"
    )


def _best_plain(cells: Sequence[Cell], budget: float, workdir: Path) -> Scheme | None:
    """The plain network within a budget that is best on the held-out split `choose`."""
    whole = float(next(compare_cells.macs(c)[-1] for c in cells if c.name == PLAIN))
    best: tuple[float, Scheme] | None = None
    for name, group in by_name(cells, "static").items():
        cost = float(compare_cells.macs(group[0])[-1]) / whole
        if cost > budget:
            continue
        traces = {cell.seed: compare_cells.traces(cell, workdir) for cell in group}
        held_out = float(np.mean([correct_at_last(t.choose).mean() for t in traces.values()]))
        if best is None or held_out > best[0]:
            correct = {seed: correct_at_last(t.test) for seed, t in traces.items()}
            best = held_out, Scheme(("static", name), correct, dict.fromkeys(correct, cost))
    return None if best is None else best[1]


def correct_at_last(trace: Trace) -> np.ndarray:
    """`[N]`, whether the prediction of the last exit is correct."""
    return trace.logits[:, -1].argmax(-1) == trace.labels


def agreement(groups: Groups, config: Comparison) -> list[dict[str, Any]]:
    """How often two policies take the same exit and predict the same class, at the first budget."""
    target = {"kind": "budget", "value": config.targets.budgets[0]}
    rows = []
    for regime in config.regimes:
        members = {policy: group for (name, policy), group in groups.items() if name == regime}
        most = max((len(group) for group in members.values()), default=0)
        outputs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for policy, group in members.items():
            # One that failed for a seed has nothing to be compared with the others there.
            if len(_scheme((regime, policy), group, target).correct) == most:
                arrays = [(c.decided.arrays, _index(c, target)) for c in group]
                outputs[policy] = (
                    np.concatenate([a["exits"][i] for a, i in arrays]),
                    np.concatenate([a["predictions"][i] for a, i in arrays]),
                )
        if outputs:
            exits, predictions = (np.stack(part) for part in zip(*outputs.values(), strict=True))
            rows.append(
                {
                    "regime": regime,
                    "target": target,
                    "policies": list(outputs),
                    "exits": metrics.agreement_matrix(exits).tolist(),
                    "answers": metrics.agreement_matrix(predictions).tolist(),
                }
            )
    return rows
