"""From traces to temperatures, thresholds and what they come to on the test split."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from eejax import policies
from eejax.evaluation import metrics
from eejax.evaluation.routing import Routed, Scored, route, score
from eejax.policies.base import Policy
from eejax.selection import thresholds
from eejax.trace import Trace
from experiments.evaluate.config import PoliciesConfig


class Traces(NamedTuple):
    """One trace a split; each has one use."""

    calibrate: Trace
    choose: Trace
    test: Trace


class Evaluated(NamedTuple):
    """A policy on its two splits.

    Attributes:
      policy: fitted.
      choose: what thresholds are chosen on.
      test: what is reported.
    """

    policy: Policy
    choose: Scored
    test: Scored


def evaluated(name: str, traces: Traces, cost: np.ndarray) -> Evaluated:
    """A policy, fitted on `calibrate`, and its scores; `cost` `[E]` of leaving at each exit."""
    policy = policies.fit(name, traces.calibrate, cost)
    return Evaluated(policy, score(policy, traces.choose), score(policy, traces.test))


def exit_rows(
    scored: Scored, labels: np.ndarray, cumulative: np.ndarray, temperatures: np.ndarray
) -> list[dict[str, Any]]:
    """Each exit alone: its cost, its accuracy, its calibration."""
    return [
        {
            "index": e,
            "macs": float(cumulative[e]),
            "fraction": float(cumulative[e] / cumulative[-1]),
            "accuracy": float((scored.predictions[:, e] == labels).mean()),
            "ece": metrics.expected_calibration_error(scored.logits[:, e], labels),
            "temperature": float(temperatures[e]),
        }
        for e in range(len(cumulative))
    ]


def policy_rows(
    name: str,
    scored: Evaluated,
    traces: Traces,
    cumulative: np.ndarray,
    config: PoliciesConfig,
) -> list[dict[str, Any]]:
    """A policy at every target: thresholds from `choose`, numbers from `test`.

    A target that cannot be met is a row that says why.
    """
    fractions = cumulative / cumulative[-1]
    correct = scored.choose.predictions == traces.choose.labels[:, None]
    searches: list[tuple[dict[str, Any], str, Any]] = []
    for budget in config.budgets:
        target = {"kind": "budget", "value": budget}
        searches.append((target, "optimal", (thresholds.for_budget, budget)))
        searches.append((target, "geometric", (thresholds.geometric, budget)))
    for drop in config.drops:
        searches.append(({"kind": "drop", "value": drop}, "optimal", (thresholds.for_drop, drop)))

    rows = []
    for target, search, (choose, value) in searches:
        row: dict[str, Any] = {"name": name, "target": target, "search": search}
        try:
            choice = choose(scored.choose.scores, correct, fractions, value)
        except ValueError as error:
            empty = dict.fromkeys(("thresholds", "accuracy", "mean_macs", "exit_fractions"))
            rows.append({**row, **empty, "error": str(error)})
            continue
        rows.append(
            {
                **row,
                **_outcome(route(scored.test, choice.thresholds), traces.test.labels, cumulative),
                "thresholds": choice.thresholds.tolist(),
                "chosen": {"accuracy": choice.accuracy, "mean_fraction": choice.mean_cost},
            }
        )
    if config.thresholds:
        rows.append(
            {
                "name": name,
                "target": {"kind": "fixed"},
                "search": "given",
                **_outcome(route(scored.test, config.thresholds), traces.test.labels, cumulative),
                "thresholds": list(config.thresholds),
            }
        )
    return rows


def curve(
    scored: Evaluated, traces: Traces, cumulative: np.ndarray, points: int
) -> list[dict[str, float]]:
    """Test accuracy against mean cost at `points` budgets, each chosen for on `choose`."""
    fractions = cumulative / cumulative[-1]
    correct = scored.choose.predictions == traces.choose.labels[:, None]
    budgets = np.linspace(fractions[0], 1, points)
    rows = []
    for choice in thresholds.for_budgets(scored.choose.scores, correct, fractions, budgets):
        outcome = _outcome(route(scored.test, choice.thresholds), traces.test.labels, cumulative)
        rows.append({k: outcome[k] for k in ("mean_macs", "mean_fraction", "accuracy")})
    return rows


def reliability_rows(scored: Scored, labels: np.ndarray) -> list[dict[str, list[float]]]:
    """For each exit, `metrics.reliability` as lists."""
    return [
        {
            name: values.tolist()
            for name, values in metrics.reliability(scored.logits[:, e], labels)._asdict().items()
        }
        for e in range(scored.scores.shape[1])
    ]


def _outcome(routed: Routed, labels: np.ndarray, cumulative: np.ndarray) -> dict[str, Any]:
    result = metrics.outcome(routed, labels, cumulative)
    return {
        "accuracy": result.accuracy,
        "mean_macs": result.mean_cost,
        "mean_fraction": result.mean_cost / float(cumulative[-1]),
        "exit_fractions": result.exit_fractions.tolist(),
        "ece": metrics.expected_calibration_error(routed.logits, labels),
    }
