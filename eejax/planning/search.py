"""Chooses where to cut, in which codecs to send, and the thresholds, for one objective.

All cuts of the E stages among T tiers are tried, with every codec that no other one beats at its
cut, being no cheaper and changing no fewer labels. For given cuts and codecs the mean latency, the
energy and the price are means of a cost of leaving at each exit, `costs` of `eejax.planning.model`,
so thresholds come from the search of `eejax.selection.thresholds` with that cost. What any of the
searches found on its path is then tried with all cuts and codecs, since what thresholds do to the
accuracy does not depend on them; so is the 0.99 quantile of the latency made small, whose searches
are those for the mean.

SPINN optimises the cut and the early-exit policy together, too, while it runs (Laskaridis et al.,
MobiCom 2020, https://arxiv.org/abs/2008.06402).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eejax.planning.machines import Device, Link, Times
from eejax.planning.model import Costs, Forecast, Plan, latencies, leaving, predict, quantile
from eejax.planning.options import (
    OBJECTIVES,
    Objective,
    Option,
    Problem,
    exit_costs,
    known_codecs,
    options,
    value,
)
from eejax.runtime.manifest import HeldOut
from eejax.selection import guarantees, places, smoothing, thresholds

_DROP = 0.01


class Row(NamedTuple):
    """A plan and what it is expected to come to."""

    plan: Plan
    forecast: Forecast


class Plans(NamedTuple):
    """What `search_plans` returns.

    Attributes:
      best: of all plans that keep the constraint.
      front: plans that no other one beats in both objective and accuracy, the cheapest first,
        whether they keep the constraint or not.
      device: the best that runs on the first tier alone.
      cloud: the best that runs on the last tier alone.
    """

    best: Row
    front: list[Row]
    device: Row
    cloud: Row


class _Limits(NamedTuple):
    """K thresholds that searches found.

    Attributes:
      thresholds: `[K, E - 1]`.
      share: `[K, E]` of the samples that leave at each exit.
      accuracy: `[K]`, without codecs.
      needs: `[K]`, the smallest drop from the last exit's accuracy that a search found them to
        keep; infinite if none did.
    """

    thresholds: np.ndarray
    share: np.ndarray
    accuracy: np.ndarray
    needs: np.ndarray


class _Judged(NamedTuple):
    """What K thresholds come to with the same cuts and codecs; each `[K]`."""

    objective: np.ndarray
    latency: np.ndarray
    accuracy: np.ndarray
    allowed: np.ndarray


def search_plans(
    trace: HeldOut,
    times: Sequence[Times],
    links: Sequence[Link],
    devices: Sequence[Device],
    *,
    objective: Objective = "mean",
    accuracy: float | None = None,
    drop: float | None = None,
    risk: float | None = None,
    confidence: float = 0.9,
    codecs: Sequence[str] | None = None,
) -> Plans:
    """The best plan under a constraint, what no plan beats, and the two extremes.

    Give at most one of `accuracy`, `drop` and `risk`; without any, `drop` is 0.01. A codec that was
    measured to change labels has their share taken from the accuracy, as if all of them had been
    correct. With `risk`, one half of the trace chooses cuts and a path of thresholds, the other
    half certifies along the path and gives all forecasts, and only `"float32"` codecs are used;
    every one of best, device and cloud is certified, each for itself.

    Args:
      trace: N held-out samples, E exits.
      times, links, devices: as for `predict`.
      objective: what is made small: mean or 0.99 quantile of the latency, energy of the first tier,
        or the price of a million requests.
      accuracy: at least this on the trace.
      drop: at most this much below the last exit, with `confidence` on new data, as
        `selection.for_drop`.
      risk: at most this error on new data, certified with `confidence` by the binomial bound of
        `selection.bounds`.
      confidence: for `drop` from 0.5 to below 1, for `risk` in (0, 1).
      codecs: to choose from; by default all that were measured everywhere.

    Raises:
      ValueError: if an argument is out of range, or no threshold has a certified risk.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}; give one of {', '.join(OBJECTIVES)}.")
    if sum(given is not None for given in (accuracy, drop, risk)) > 1:
        raise ValueError("more than one of accuracy, drop and risk; give one of them.")
    problem = Problem(times, links, devices, objective)
    names = known_codecs(times, codecs)
    chosen_on = judged_on = trace
    if risk is not None:
        names = [name for name in names if name.startswith("float32")]
        if not names:
            raise ValueError(
                "a certified risk holds in float32 and float32+zstd; allow one of them."
            )
        chosen_on, judged_on = _halves(trace)
        accuracy = 1 - risk
    last = float(chosen_on.correct[:, -1].mean())
    if accuracy is not None:
        drop, of_drop = last - accuracy + 1e-9, 0.5
        if drop < 0:
            raise ValueError(
                f"an accuracy of {accuracy:.4g}; the last exit has {last:.4g} on the held-out "
                "samples: give at most that."
            )
    else:
        drop, of_drop = _DROP if drop is None else drop, confidence
        if not drop >= 0:
            raise ValueError(f"an accuracy drop of {drop}; give a fraction of at least 0.")
    worth = smoothing.chance(chosen_on.scores, chosen_on.correct)
    exits = trace.scores.shape[1]

    def searched(cost: Costs) -> thresholds.Search:
        return thresholds.search(*chosen_on, _search_cost(cost, objective), worth)

    tried = options(problem, names)
    pairs = [pair for o in tried for pair in _along(searched(o.cost), o.cost, drop, of_drop)]
    limits = _limits(chosen_on, pairs)
    judged = [_judged(problem, option, limits, drop) for option in tried]
    table = _Judged(*map(np.stack, zip(*judged, strict=True)))  # each [options, K]

    def row(option: Option, thresholds: np.ndarray) -> Row:
        centred = places.centred(chosen_on.scores, thresholds)
        plan = Plan(option.cuts, option.codecs, centred)
        return Row(plan, predict(plan, judged_on, times, links, devices))

    def best(ours: Sequence[bool]) -> Row:
        """The best of some options."""
        allowed = np.argwhere(table.allowed & np.array(ours)[:, None])
        at = tuple(allowed.T)
        i, k = allowed[np.lexsort((table.latency[at], table.objective[at]))[0]]
        if risk is None:
            return row(tried[i], limits.thresholds[k])
        search = searched(tried[i].cost)
        return row(tried[i], _certified(search, judged_on, risk, confidence))

    flat = _unbeaten(table.objective.ravel(), table.accuracy.ravel())
    at = np.transpose(np.unravel_index(flat, table.objective.shape))
    front = [row(tried[i], limits.thresholds[k]) for i, k in at]
    # Again, since with a risk other samples judge than those that chose.
    of = [(value(r.forecast, objective), r.forecast.accuracy) for r in front]
    front = [front[i] for i in _unbeaten(*np.transpose(of))]
    return Plans(
        best([True] * len(tried)),
        front,
        best([set(option.cuts) <= {exits} for option in tried]),
        best([set(option.cuts) <= {0} for option in tried]),
    )


def _search_cost(cost: Costs, objective: Objective) -> np.ndarray:
    """The costs `[E]` in a form that the search takes: positive, and 1 from first to last.

    A constant changes nothing for a search; where all exits cost the same, latency decides.
    """
    for each in (exit_costs(cost, objective), cost.latency):
        if each[-1] > each[0]:
            scaled = (each - each[0]) / (each[-1] - each[0])
            return np.maximum.accumulate(scaled) + 1e-6
    return np.ones(len(cost.latency))


def _along(
    search: thresholds.Search, cost: Costs, drop: float, confidence: float
) -> Iterator[tuple[np.ndarray, float]]:
    """Thresholds of the path of a search, and the drop that each of them is known to keep."""
    spare = drop - float(cost.changed.max())
    least = np.inf
    if spare >= 0:
        choice = search.for_drop(spare, confidence)
        yield choice.thresholds, spare
        least = choice.mean_cost
    yield np.full(len(cost.latency) - 1, np.inf, np.float32), 0.0
    for c in search.frontier.path:
        # The walk of the choice ended before the first that does not keep the constraint.
        yield c.thresholds, spare if c.mean_cost > least else np.inf


def _limits(trace: HeldOut, found: Sequence[tuple[np.ndarray, float]]) -> _Limits:
    """All that were found, each once."""
    needs: dict[bytes, float] = {}
    for limits, need in found:
        key = limits.astype(np.float32).tobytes()
        needs[key] = min(need, needs.get(key, np.inf))
    unique = np.stack([np.frombuffer(key, np.float32) for key in needs])
    share, accuracy = [], []
    for limits in unique:
        exits = leaving(trace.scores, limits)
        share.append(np.bincount(exits, minlength=trace.scores.shape[1]) / len(exits))
        accuracy.append(trace.correct[np.arange(len(exits)), exits].mean())
    return _Limits(unique, np.stack(share), np.array(accuracy), np.array(list(needs.values())))


def _judged(problem: Problem, option: Option, limits: _Limits, drop: float) -> _Judged:
    """All thresholds, whichever search found them, with the cuts and codecs of an option."""
    cost, tiers = option.cost, (problem.times, problem.links, problem.devices)
    objective = limits.share @ exit_costs(cost, problem.objective)
    if problem.objective == "p99":
        objective = quantile(latencies(option.cuts, option.codecs, *tiers), limits.share, 0.99)
    return _Judged(
        objective,
        limits.share @ cost.latency,
        limits.accuracy - limits.share @ cost.changed,
        limits.needs <= drop - cost.changed.max(),
    )


def _unbeaten(objective: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Indices of what nothing beats in both, the smallest objective first."""
    order = np.lexsort((-accuracy, objective))
    before = np.maximum.accumulate(np.concatenate([[-np.inf], accuracy[order]]))[:-1]
    return order[accuracy[order] > before]


def _halves(trace: HeldOut) -> tuple[HeldOut, HeldOut]:
    """Two halves of the samples, in an order that does not depend on them."""
    if len(trace.scores) < 2:
        raise ValueError("one sample cannot be divided; give two or more.")
    order = np.random.default_rng(0).permutation(len(trace.scores))
    middle = len(order) // 2
    first, second = (HeldOut(*(a[o] for a in trace)) for o in (order[:middle], order[middle:]))
    return first, second


def _certified(
    search: thresholds.Search, trace: HeldOut, risk: float, confidence: float
) -> np.ndarray:
    """The boldest thresholds of the search's path whose error is certified on another trace."""
    never = np.full(trace.scores.shape[1] - 1, np.inf, np.float32)
    path = sorted(search.frontier.path, key=lambda c: -c.mean_cost)
    limits = [never, *(c.thresholds for c in path)]
    taken = [leaving(trace.scores, t) for t in limits]
    losses = np.stack([1.0 - trace.correct[np.arange(len(e)), e] for e in taken])
    count = int(guarantees.certified(losses, risk, 1 - confidence, "binomial"))
    if not count:
        raise ValueError(
            f"the last exit errs on {losses[0].mean():.4g} of {losses.shape[1]} held-out samples, "
            f"which does not certify a risk of {risk:.4g} with confidence {confidence:.4g}; give a "
            "larger risk, or an artifact with more held-out samples."
        )
    return limits[count - 1]
