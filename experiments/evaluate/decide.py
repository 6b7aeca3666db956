"""From the traces of a network to thresholds and what they come to on the test split.

Each split has one use: policies are fitted on `calibrate`, thresholds chosen on `choose`, risks
certified on `certify`, and everything that is reported is of `test`. Main job and comparison both
decide here. A policy is fitted once, and its thresholds for all budgets come from one search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eejax import policies
from eejax.evaluation import metrics
from eejax.evaluation.routing import Routed, Scored, route, score
from eejax.policies import Policy
from eejax.selection import thresholds
from eejax.selection.placement import keep_trace
from eejax.selection.thresholds import Choice, Forecast, Search
from eejax.trace import Trace
from experiments.report.table import accuracy_columns, target_columns


class Traces(NamedTuple):
    """One trace a split.

    Attributes:
      calibrate: temperatures, and everything else that is fitted after training.
      choose: thresholds.
      certify: risks; None where nothing is certified.
      test: is reported.
    """

    calibrate: Trace
    choose: Trace
    certify: Trace | None
    test: Trace


class View(NamedTuple):
    """A fitted policy, and its scores on each split.

    Attributes:
      name: of the policy.
      policy: fitted on the split `calibrate`.
      exits: the exits, or members of a cascade, in use, from 0.
      choose, certify, test: scores on these splits.
      correct: `[N, E]` on the split `choose`.
      cost: `[E]`, of leaving at each exit, as fractions.
      ms: `[E]`, the same in milliseconds for a batch; empty where no target is in them.
    """

    name: str
    policy: Policy
    exits: tuple[int, ...]
    choose: Scored
    certify: Scored | None
    test: Scored
    correct: np.ndarray
    cost: np.ndarray
    ms: np.ndarray


class Targets(NamedTuple):
    """What thresholds are searched for.

    Attributes:
      budgets: mean cost, as fractions.
      drops: loss of accuracy against the last exit, as fractions.
      drop_confidence: with which the drops are to be kept on new data.
      budgets_ms: mean cost in milliseconds for a batch.
      geometric: search for the budgets in MSDNet's way too.
      given: thresholds to be reported beside the chosen ones.
      curve: points of the cost curve.
      batch: that `budgets_ms` is stated for.
    """

    budgets: tuple[float, ...]
    drops: tuple[float, ...] = ()
    drop_confidence: float = 0.9
    budgets_ms: tuple[float, ...] = ()
    geometric: bool = True
    given: tuple[float, ...] = ()
    curve: int = 2
    batch: int | None = None


class Decision(NamedTuple):
    """Thresholds for one target.

    Attributes:
      target: `{kind, value, ...}`.
      search: how they were chosen.
      view: of the policy that they are for.
      thresholds: `[E - 1]`, or None where the target cannot be met.
      chosen: accuracy and mean cost on the split `choose`, or None.
      words: an error, or a certificate.
      forecast: for new data, from the split `choose` alone, or None.
    """

    target: dict[str, Any]
    search: str
    view: View
    thresholds: np.ndarray | None
    chosen: Choice | None = None
    words: str | None = None
    forecast: Forecast | None = None


def view(
    name: str, traces: Traces, exits: tuple[int, ...], cost: np.ndarray, ms: np.ndarray
) -> View:
    """Fits a policy for some exits, and scores the splits with it.

    Args:
      name: of the policy.
      traces: of the whole network.
      exits: from 0, the exits in use.
      cost: `[len(exits)]`.
      ms: `[len(exits)]`, or empty.
    """
    calibrate, choose, test = (
        keep_trace(trace, exits) for trace in (traces.calibrate, traces.choose, traces.test)
    )
    policy = policies.fit(name, calibrate, cost)
    scored = score(policy, choose)
    certify = None if traces.certify is None else score(policy, keep_trace(traces.certify, exits))
    correct = scored.predictions == choose.labels[:, None]
    return View(name, policy, exits, scored, certify, score(policy, test), correct, cost, ms)


def decide(
    views: Sequence[View], targets: Targets, highest: float
) -> tuple[list[Decision], list[Decision]]:
    """Thresholds for every target, and for the budgets of the cost curve.

    Args:
      views: one, or several to choose from for each target by accuracy on the split `choose`: the
        members that a cascade may have. Then budgets are the only targets.
      targets: what to search for.
      highest: the largest budget of the cost curve.

    Returns:
      The decisions for the targets, and those for the curve.
    """
    low = min(v.cost[0] for v in views)
    curve = np.linspace(low, highest, targets.curve).tolist()
    searches = [thresholds.search(v.choose.scores, v.correct, v.cost) for v in views]
    budgets = [
        [_tried(search.for_budget, value) for value in (*targets.budgets, *curve)]
        for search in searches
    ]
    count = len(targets.budgets)

    def best(
        kind: str, values: Sequence[float], choices: Sequence[Sequence[Choice | str]], **more: Any
    ) -> list[Decision]:
        """For each value the best view; `choices` has a choice a view and value."""
        return [
            _best({"kind": kind, "value": value, **more}, "optimal", views, of_views)
            for value, *of_views in zip(values, *choices, strict=True)
        ]

    decisions = [
        _forecast(decision, views, searches, lambda s, value=value: s.for_budget(value))
        for value, decision in zip(
            targets.budgets,
            best("budget", targets.budgets, [c[:count] for c in budgets]),
            strict=True,
        )
    ]
    if len(views[0].ms):
        in_ms = [thresholds.search(v.choose.scores, v.correct, v.ms) for v in views]
        times = [[_tried(s.for_budget, value) for value in targets.budgets_ms] for s in in_ms]
        decisions += best("ms", targets.budgets_ms, times, batch=targets.batch)
    if len(views) == 1:
        decisions += _others(views[0], searches[0], targets)
    return decisions, best("curve", curve, [c[count:] for c in budgets])


def _others(one: View, search: Search, targets: Targets) -> list[Decision]:
    """The geometric search, drops in accuracy, and given thresholds."""
    decisions = []
    for value in targets.budgets if targets.geometric else ():
        choice = _tried(search.geometric, value)
        decisions.append(_best({"kind": "budget", "value": value}, "geometric", [one], [choice]))
    for value in targets.drops:

        def close(part: Search, drop: float = value) -> Choice:
            return part.for_drop(drop, targets.drop_confidence)

        target = {"kind": "drop", "value": value}
        decision = Decision(target, "optimal", one, (chosen := close(search)).thresholds, chosen)
        decisions.append(_forecast(decision, [one], [search], close))
    if targets.given:
        given = np.asarray(targets.given, np.float32)
        choice = thresholds.evaluate(one.choose.scores, one.correct, one.cost, given)
        decisions.append(Decision({"kind": "given"}, "given", one, given, choice))
    return decisions


def _forecast(
    decision: Decision,
    views: Sequence[View],
    searches: Sequence[Search],
    choose: Callable[[Search], Choice],
) -> Decision:
    """The decision with the forecast of its view, where it can be had."""
    if decision.chosen is None or len(decision.view.correct) < 2:
        return decision
    of_view = next(s for v, s in zip(views, searches, strict=True) if v is decision.view)
    return decision._replace(forecast=of_view.forecast(choose))


def _tried(choose: Callable[[float], Choice], target: float) -> Choice | str:
    try:
        return choose(target)
    except ValueError as error:
        return str(error)


def _best(
    target: dict[str, Any], search: str, views: Sequence[View], choices: Sequence[Choice | str]
) -> Decision:
    """Of several views the one that is best on the split `choose`; of equals the cheapest, and on
    the curve the first, which has the fewest members."""
    able = [(c, v) for c, v in zip(choices, views, strict=True) if not isinstance(c, str)]
    if not able:
        return Decision(target, search, views[0], None, None, str(choices[-1]))
    curve = target["kind"] == "curve"
    choice, best = min(
        able, key=lambda pair: (-pair[0].accuracy, 0 if curve else pair[0].mean_cost)
    )
    return Decision(target, search, best, choice.thresholds, choice)


def outcome(decision: Decision, test: Trace) -> tuple[dict[str, Any], Routed | None]:
    """What a decision comes to on the test split, in the columns of the results table.

    Args:
      decision: thresholds, or none.
      test: the trace that `decision.view.test` scores.

    Returns:
      The columns, and the exits and logits of each test image; None where there are no thresholds.
    """
    row = {**target_columns(decision.target), "search": decision.search}
    if decision.thresholds is None:
        return {**row, "error": decision.words}, None
    v = decision.view
    routed = route(v.test, decision.thresholds)
    result = metrics.outcome(routed, test.labels, v.cost)
    predictions = routed.logits.argmax(-1)
    correct = v.test.predictions == test.labels[:, None]
    row |= accuracy_columns(predictions == test.labels)
    row |= {
        "cost": result.mean_cost,
        "expected_ms": float(v.ms[routed.exits].mean()) if len(v.ms) else None,
        # The logits of `vote` count votes, and are no probabilities.
        "ece": metrics.expected_calibration_error(routed.logits, test.labels)
        if v.name != "vote"
        else None,
        "random": metrics.random_at_equal_rates(correct, result.exit_fractions),
        "oracle": metrics.oracle_accuracy(correct, v.cost, result.mean_cost),
        "exit_fractions": tuple(result.exit_fractions.tolist()),
        "thresholds": tuple(map(float, decision.thresholds)),
        "exits": v.exits,
    }
    if decision.chosen is not None:
        row["chosen_accuracy"] = decision.chosen.accuracy
        row["chosen_cost"] = decision.chosen.mean_cost
    if decision.forecast is not None:
        row["forecast_accuracy"], row["forecast_cost"] = decision.forecast
    if "loss" in decision.target:
        last = test.labels if decision.target["loss"] == "error" else v.test.predictions[:, -1]
        row["risk"] = float((predictions != last).mean())
    if decision.words is not None:
        row["certificate"] = decision.words
    row["met"] = met(decision.target, row, float(correct[:, -1].mean()))
    return row, routed


def met(target: Mapping[str, Any], row: Mapping[str, Any], last_accuracy: float) -> bool | None:
    """Whether a target, chosen for on other data, holds on the test split."""
    kind: str = target["kind"]
    value: Any = target.get("value")
    if kind == "drop":
        return row["accuracy"] >= last_accuracy - value
    if kind == "certificate":
        return row["risk"] <= value and row["cost"] <= target["budget"]
    column = {"budget": "cost", "curve": "cost", "ms": "expected_ms", "risk": "risk"}.get(kind)
    return None if column is None else row[column] <= value


def exit_rows(scored: Scored, test: Trace, cost: np.ndarray) -> list[dict[str, Any]]:
    """Each exit alone: its cost, accuracy and calibration, in the columns of the results table."""
    return [
        {
            **target_columns({"kind": "exit", "value": e + 1}),
            **accuracy_columns(scored.predictions[:, e] == test.labels),
            "policy": "none",
            "cost": float(cost[e]),
            "ece": metrics.expected_calibration_error(scored.logits[:, e], test.labels),
        }
        for e in range(len(cost))
    ]
