"""Thresholds for a mean-cost budget and for an accuracy drop, chosen on a held-out trace.

`for_budget` and `for_drop` search one threshold for each exit. With the other thresholds fixed, the
best one for exit e is exact and cheap to find: order the samples that reach e by score, add up what
each gains by leaving here instead of going on, and stop at the largest sum. Sweeping this over the
exits, at a price per unit of cost that runs from nothing to everything, traces the frontier of
accuracy against cost (a Lagrangian search). The best feasible points of that frontier, of a grid of
shared thresholds and of geometric ones are then polished by the same move under the constraint
itself, and the best of them is kept. So the result is never worse on the held-out data than those.
Nothing is random.

`geometric` is MSDNet's one-parameter search (Huang et al., ICLR 2018,
https://arxiv.org/abs/1703.09844).

Costs are the cumulative costs of leaving at each exit, in any unit; budgets are in the same unit.
A chosen threshold lies halfway between two held-out scores, away from both, so that rounding in
another compiled program does not move a held-out sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eejax.evaluation.routing import first_exit

_PRICES = 48
_SWEEPS = 20
_SHARED = 64
# A single start gets stuck where an exit is bad: in 800 draws of 300 samples and 3 exits it was up
# to 24 samples behind the exact optimum; 8 starts 6, 16 starts 2, 40 starts 1.
_STARTS = 16


class Choice(NamedTuple):
    """Thresholds, and what they come to on the data they were chosen on (never a result).

    Attributes:
      thresholds: `[E - 1]` float32; +inf switches an exit off, -inf makes it always fire.
      accuracy: on the held-out trace.
      mean_cost: on the held-out trace.
    """

    thresholds: np.ndarray
    accuracy: float
    mean_cost: float


def for_budget(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, budget: float) -> Choice:
    """The thresholds of highest held-out accuracy at a mean cost of at most `budget`.

    Args:
      scores: `[N, E]`.
      correct: `[N, E]`, whether the answer at each exit is right.
      cost: `[E]`, increasing.
      budget: in the unit of `cost`.

    Raises:
      ValueError: a budget under the cost of leaving at the first exit, or arrays that do not fit.
    """
    return for_budgets(scores, correct, cost, [budget])[0]


def for_budgets(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, budgets: Sequence[float] | np.ndarray
) -> list[Choice]:
    """`for_budget` for several budgets, of which the larger part of the search is shared."""
    scores, correct, cost = _checked(scores, correct, cost)
    for budget in budgets:
        _check_budget(cost, budget)
    frontier = _frontier(scores, correct, cost)

    def within(budget: float) -> _Better:
        # Highest accuracy among what is within the budget; of equals the cheapest.
        return lambda accuracy, mean_cost: np.lexsort(
            (mean_cost, -accuracy, mean_cost > budget * (1 + 1e-9))
        )[0]

    choices = []
    for budget in budgets:
        even = _even(scores, correct, cost, budget)
        candidates = frontier if even is None else [*frontier, even]
        choices.append(_polish(scores, correct, cost, candidates, within(budget)))
    return choices


def for_drop(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, drop: float) -> Choice:
    """The cheapest thresholds that lose at most `drop` of accuracy against the last exit.

    Args:
      scores: `[N, E]`.
      correct: `[N, E]`.
      cost: `[E]`, increasing.
      drop: as a fraction: 0.01 is one point of accuracy.

    Raises:
      ValueError: a negative drop, or arrays that do not fit.
    """
    scores, correct, cost = _checked(scores, correct, cost)
    if not drop >= 0:
        raise ValueError(f"an accuracy drop of {drop}; give a fraction of at least 0, like 0.01.")
    target = correct[:, -1].mean() - drop

    def better(accuracy: np.ndarray, mean_cost: np.ndarray) -> Any:
        # Cheapest among what is accurate enough; of equals the most accurate.
        return np.lexsort((-accuracy, mean_cost, accuracy < target - 1e-9))[0]

    return _polish(scores, correct, cost, _frontier(scores, correct, cost), better)


def geometric(
    scores: np.ndarray,
    correct: np.ndarray,
    cost: np.ndarray,
    budget: float,
    tolerance: float = 0.02,
) -> Choice:
    """MSDNet's search: exit e is to take a share `q^e` of the samples, one `q` for all exits.

    The published code takes `q` from a grid for its nominal cost; with tied scores the real cost is
    another (asked for 3.0, it gave 1.0), and a share below one sample gives an infinite threshold
    by accident. Here `q` is found by bisection on the cost that the thresholds really have, shares
    are rounded to the nearest edge between different scores, and a budget that ties keep out of
    reach is refused.

    Args:
      scores: `[N, E]`.
      correct: `[N, E]`.
      cost: `[E]`, increasing.
      budget: in the unit of `cost`.
      tolerance: how far below the budget the mean cost may stay, as a fraction of it.

    Raises:
      ValueError: a budget that cannot be hit, or arrays that do not fit.
    """
    scores, correct, cost = _checked(scores, correct, cost)
    _check_budget(cost, budget)
    if budget >= cost[-1]:
        return evaluate(scores, correct, cost, np.full(len(cost) - 1, np.inf, np.float32))
    best = _even(scores, correct, cost, budget)
    if best is None or best.mean_cost < budget * (1 - tolerance):
        found = "none" if best is None else f"{best.mean_cost:.4g}"
        raise ValueError(
            f"a mean cost of {budget:.4g} cannot be hit: the nearest below it is {found}, because "
            "too many scores are equal, or samples too few; use a policy with finer scores, or "
            "another budget."
        )
    return best


def evaluate(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, thresholds: np.ndarray
) -> Choice:
    """What thresholds come to on a trace."""
    exits = first_exit(scores, thresholds)
    accuracy = correct[np.arange(len(exits)), exits].mean()
    return Choice(thresholds, float(accuracy), float(np.asarray(cost, np.float64)[exits].mean()))


def shared(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, count: int) -> list[Choice]:
    """A fixed grid: the same threshold at every exit, at `count` quantiles of all scores."""
    edges = np.quantile(scores[:, :-1], np.linspace(0, 1, count)) if scores.shape[1] > 1 else []
    exits = scores.shape[1] - 1
    return [evaluate(scores, correct, cost, np.full(exits, t, np.float32)) for t in edges]


def _even(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, budget: float
) -> Choice | None:
    """The dearest geometric thresholds found within a budget, if any are."""
    low, high, best = -12.0, 12.0, None
    for _ in range(50):
        middle = (low + high) / 2
        choice = evaluate(scores, correct, cost, _shares(scores, middle))
        if choice.mean_cost <= budget * (1 + 1e-9):
            low = middle
            best = choice if best is None or choice.mean_cost >= best.mean_cost else best
        else:
            high = middle
    return best


# The index of the best of several candidates, from their accuracies and mean costs.
_Better = Callable[[np.ndarray, np.ndarray], Any]


def _frontier(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray) -> list[Choice]:
    """Candidates along the whole range of costs, the same for every target."""
    exits = scores.shape[1]
    start = np.full(exits - 1, np.inf, np.float32)
    candidates = [evaluate(scores, correct, cost, start)]
    for e in range(exits - 1):
        always = np.where(np.arange(exits - 1) < e, np.inf, -np.inf).astype(np.float32)
        candidates.append(evaluate(scores, correct, cost, always))
    candidates += shared(scores, correct, cost, _SHARED)
    for log_q in np.linspace(-4, 4, _SHARED):
        candidates.append(evaluate(scores, correct, cost, _shares(scores, log_q)))
    orders = [np.argsort(-scores[:, e], kind="stable") for e in range(exits - 1)]
    # From dear to cheap: each price starts from the thresholds of the one before.
    thresholds = start
    for price in np.geomspace(100, 1e-3, _PRICES) / cost[-1]:

        def worth(accuracy: np.ndarray, mean_cost: np.ndarray, price: float = price) -> Any:
            return np.argmax(accuracy - price * mean_cost)

        for _ in range(_SWEEPS):
            before = thresholds
            for e in reversed(range(exits - 1)):
                # A fresh array each time: what is a candidate already must not change.
                thresholds = _move(scores, correct, cost, thresholds, e, orders[e], worth)
            if np.array_equal(before, thresholds):
                break
        candidates.append(evaluate(scores, correct, cost, thresholds))
    return candidates


def _polish(
    scores: np.ndarray,
    correct: np.ndarray,
    cost: np.ndarray,
    candidates: list[Choice],
    better: _Better,
) -> Choice:
    """The best candidates, improved one exit at a time under the target's own constraint."""
    orders = [np.argsort(-scores[:, e], kind="stable") for e in range(scores.shape[1] - 1)]
    # Candidates that come to the same are one.
    rest = list({(c.accuracy, c.mean_cost): c for c in reversed(candidates)}.values())
    polished = []
    while rest and len(polished) < _STARTS:
        best = _pick(rest, better)
        rest = [c for c in rest if c is not best]
        for _ in range(_SWEEPS):
            before = best
            for e, order in enumerate(orders):
                moved = _move(scores, correct, cost, best.thresholds, e, order, better)
                best = _pick([best, evaluate(scores, correct, cost, moved)], better)
            if best is before:
                break
        polished.append(best)
    best = _pick(polished, better)
    return evaluate(scores, correct, cost, _centred(scores, best.thresholds))


def _pick(candidates: list[Choice], better: _Better) -> Choice:
    accuracy = np.array([c.accuracy for c in candidates])
    mean_cost = np.array([c.mean_cost for c in candidates])
    return candidates[int(better(accuracy, mean_cost))]


def _move(
    scores: np.ndarray,
    correct: np.ndarray,
    cost: np.ndarray,
    thresholds: np.ndarray,
    e: int,
    order: np.ndarray,
    better: _Better,
) -> np.ndarray:
    """The thresholds with the best one for exit e, the others fixed.

    `order` are the samples from the highest score at e to the lowest. Candidate k lets the first k
    of those that reach e leave there.
    """
    switched_off = thresholds.copy()
    switched_off[e] = np.inf
    otherwise = first_exit(scores, switched_off)  # where each sample leaves if not at e
    now = order[otherwise[order] > e]
    correct_else = correct[np.arange(len(scores)), otherwise].astype(np.float64)
    cost_else = cost[otherwise]
    correct_sum = correct_else.sum() + np.cumsum(correct[now, e] - correct_else[now])
    cost_sum = cost_else.sum() + np.cumsum(cost[e] - cost_else[now])
    accuracy = np.concatenate([[correct_else.sum()], correct_sum]) / len(scores)
    mean_cost = np.concatenate([[cost_else.sum()], cost_sum]) / len(scores)
    edges = _edges(scores[now, e])
    chosen = int(edges[better(accuracy[edges], mean_cost[edges])])
    moved = thresholds.copy()
    moved[e] = _between(scores[now, e], chosen)
    return moved


def _centred(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Thresholds that part the samples in the same way, each halfway between two of them."""
    centred = thresholds.copy()
    left = np.ones(len(scores), bool)
    for e in range(len(thresholds)):
        descending = -np.sort(-scores[left, e])
        centred[e] = _between(descending, int((descending >= thresholds[e]).sum()))
        left &= scores[:, e] < thresholds[e]
    return centred


def _edges(descending: np.ndarray) -> np.ndarray:
    """How many samples a threshold can let through: 0, all, and wherever the score changes."""
    n = len(descending)
    inner = np.flatnonzero(np.diff(descending)) + 1
    return np.concatenate([[0], inner, [n] if n else []]).astype(int)


def _between(descending: np.ndarray, count: int) -> np.float32:
    """A threshold that lets exactly the first `count` through; `count` is one of `_edges`."""
    if count == 0:
        return np.float32(np.inf)
    if count == len(descending):
        return np.float32(-np.inf)
    above, below = np.float32(descending[count - 1]), np.float32(descending[count])
    middle = np.float32((np.float64(above) + np.float64(below)) / 2)
    return middle if middle > below else above


def _shares(scores: np.ndarray, log_q: float) -> np.ndarray:
    """Thresholds with which exit e takes about a share `q^e` of the samples."""
    n, exits = scores.shape
    power = log_q * np.arange(exits)
    share = np.exp(power - power.max())
    share = share / share.sum()
    thresholds = np.full(exits - 1, np.inf, np.float32)
    left = np.ones(n, bool)
    for e in range(exits - 1):
        descending = -np.sort(-scores[left, e], kind="stable")
        edges = _edges(descending)
        thresholds[e] = _between(descending, int(edges[np.abs(edges - share[e] * n).argmin()]))
        left &= scores[:, e] < thresholds[e]
    return thresholds


def _checked(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores as float32, as the executors compare them, right as bool, and costs as float64."""
    scores, correct = np.asarray(scores, np.float32), np.asarray(correct, bool)
    cost = np.asarray(cost, np.float64)
    if scores.ndim != 2 or correct.shape != scores.shape or np.shape(cost) != scores.shape[1:]:
        raise ValueError(
            f"scores {scores.shape}, correct {correct.shape}, cost {np.shape(cost)}; give [N, E], "
            "[N, E] and [E]."
        )
    if not len(scores):
        raise ValueError("an empty trace; give at least one held-out sample.")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; the network or the policy has diverged.")
    if not (np.diff(cost) >= 0).all() or not (cost > 0).all():
        raise ValueError(f"costs {cost.tolist()}; give cumulative costs, positive and increasing.")
    return scores, correct, cost


def _check_budget(cost: np.ndarray, budget: float) -> None:
    # The slack that the search itself allows: a mean of equal costs may round above them.
    if not budget * (1 + 1e-9) >= cost[0]:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the first exit costs {cost[0]:.4g} already, and "
            f"the whole network {cost[-1]:.4g}; give something between."
        )
