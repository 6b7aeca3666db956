"""Thresholds for a mean-cost budget and for an accuracy drop, chosen on a held-out trace.

Sample n with scores `s_ne` leaves at `x_n(t) = min {e : s_ne >= t_e}`, or at the last exit. With
`a_ne` = 1 where exit e is correct and `c_e` the cost of leaving there, thresholds t have

    accuracy  A(t) = mean_n a_{n, x_n(t)},    mean cost  C(t) = mean_n c_{x_n(t)},

and the search maximises A(t) subject to C(t) <= budget (`for_budget`), or minimises C(t) subject to
A(t) >= A(last exit) - drop (`for_drop`).

One step replaces the threshold of one exit e by the best one, the others fixed. Let `y_n` be where
sample n leaves with exit e switched off, and `n_1, n_2, ...` the samples that reach e (`y_n > e`),
from the highest score at e to the lowest. If the first k of them leave at e,

    A_k = A_0 + 1/N sum_{i <= k} (a_{n_i, e} - a_{n_i, y}),
    C_k = C_0 + 1/N sum_{i <= k} (c_e - c_y),

which two cumulative sums give for every k. The step takes the k that is best for its objective,
among those at which the score changes, and sets `t_e` halfway between the scores of `n_k` and
`n_{k+1}`.

The search has two phases. First, the steps are swept over the exits with the objective
`A - price C`, at prices that go from nothing to everything: a Lagrangian search, which traces the
frontier of accuracy against cost. Then the best feasible points of that frontier, of a grid of
shared thresholds and of geometric ones are improved by the same step under the constraint itself,
and the best of them is kept. So on the held-out data the result is never worse than those. Nothing
is random. The first phase does not depend on the target: a `Search` does it once for all targets.

`geometric` is the one-parameter search of MSDNet (Huang et al., ICLR 2018,
https://arxiv.org/abs/1703.09844).

Costs are cumulative and in any unit; budgets are in the same unit. A chosen threshold lies halfway
between two held-out scores, away from both, so that rounding in another compiled program moves no
held-out sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eejax.evaluation.routing import first_exit
from eejax.policies.base import check_costs

_PRICES = 48
_SWEEPS = 20
_SHARED = 64
# A single start gets stuck where an exit is bad: in 800 draws of 300 samples and 3 exits it was up
# to 24 samples behind the exact optimum; 8 starts 6, 16 starts 2, 40 starts 1.
_STARTS = 16
# A mean of equal costs may be rounded above them.
_SLACK = 1 + 1e-9


class Choice(NamedTuple):
    """Thresholds with their accuracy and cost on the data they were chosen on (never a result).

    Attributes:
      thresholds: `[E - 1]` float32; +inf switches an exit off, -inf makes it always fire.
      accuracy: on the held-out trace.
      mean_cost: on the held-out trace.
    """

    thresholds: np.ndarray
    accuracy: float
    mean_cost: float


# The index of the best of several candidates, from their accuracies and mean costs.
_Better = Callable[[np.ndarray, np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class Search:
    """A held-out trace to choose thresholds on, for any number of targets; made by `search`.

    Attributes:
      scores: `[N, E]` float32.
      correct: `[N, E]` bool.
      cost: `[E]` float64.
    """

    scores: np.ndarray
    correct: np.ndarray
    cost: np.ndarray

    def for_budget(self, budget: float) -> Choice:
        """As the function `for_budget`."""
        _check_budget(self.cost, budget)

        def better(accuracy: np.ndarray, mean_cost: np.ndarray) -> Any:
            # Highest accuracy among those within the budget; among equals the cheapest.
            return np.lexsort((mean_cost, -accuracy, mean_cost > budget * _SLACK))[0]

        spread = self._geometric_within(budget)
        candidates = self._frontier if spread is None else [*self._frontier, spread]
        return self._improved(candidates, better)

    def for_drop(self, drop: float) -> Choice:
        """As the function `for_drop`."""
        if not drop >= 0:
            raise ValueError(
                f"an accuracy drop of {drop}; give a fraction of at least 0, like 0.01."
            )
        target = self.correct[:, -1].mean() - drop

        def better(accuracy: np.ndarray, mean_cost: np.ndarray) -> Any:
            # Cheapest among those that are accurate enough; among equals the most accurate.
            return np.lexsort((-accuracy, mean_cost, accuracy < target - 1e-9))[0]

        return self._improved(self._frontier, better)

    def geometric(self, budget: float, tolerance: float = 0.02) -> Choice:
        """As the function `geometric`."""
        _check_budget(self.cost, budget)
        if budget >= self.cost[-1]:
            return self._evaluated(np.full(len(self.cost) - 1, np.inf, np.float32))
        best = self._geometric_within(budget)
        if best is None or best.mean_cost < budget * (1 - tolerance):
            nearest = "none" if best is None else f"{best.mean_cost:.4g}"
            raise ValueError(
                f"a mean cost of {budget:.4g} cannot be hit: the nearest below it is {nearest}, "
                "because too many scores are equal, or samples too few; use a policy with finer "
                "scores, or another budget."
            )
        return best

    def _evaluated(self, thresholds: np.ndarray) -> Choice:
        return evaluate(self.scores, self.correct, self.cost, thresholds)

    def _geometric_within(self, budget: float) -> Choice | None:
        """The most expensive geometric thresholds within a budget, if any, by bisection."""
        low, high, best = -12.0, 12.0, None
        for _ in range(50):
            middle = (low + high) / 2
            choice = self._evaluated(_geometric_thresholds(self.scores, middle))
            if choice.mean_cost <= budget * _SLACK:
                low = middle
                best = choice if best is None or choice.mean_cost >= best.mean_cost else best
            else:
                high = middle
        return best

    @functools.cached_property
    def _orders(self) -> list[np.ndarray]:
        """For each exit but the last, the samples from the highest score to the lowest."""
        return [np.argsort(-s, kind="stable") for s in self.scores.T[:-1]]

    @functools.cached_property
    def _frontier(self) -> list[Choice]:
        """Candidates along the whole range of costs, the same for every target."""
        early = self.scores.shape[1] - 1
        thresholds = np.full(early, np.inf, np.float32)
        single = [np.where(np.arange(early) < e, np.inf, -np.inf) for e in range(early)]
        candidates = [self._evaluated(t.astype(np.float32)) for t in (thresholds, *single)]
        candidates += shared(self.scores, self.correct, self.cost, _SHARED)
        for log_q in np.linspace(-4, 4, _SHARED):
            candidates.append(self._evaluated(_geometric_thresholds(self.scores, log_q)))
        # From expensive to cheap: each price starts from the thresholds of the one before.
        for price in np.geomspace(100, 1e-3, _PRICES) / self.cost[-1]:

            def worth(accuracy: np.ndarray, mean_cost: np.ndarray, price: float = price) -> Any:
                return np.argmax(accuracy - price * mean_cost)

            for _ in range(_SWEEPS):
                before = thresholds
                for e in reversed(range(early)):
                    thresholds = self._step(thresholds, e, worth)
                if np.array_equal(before, thresholds):
                    break
            candidates.append(self._evaluated(thresholds))
        return candidates

    def _improved(self, candidates: list[Choice], better: _Better) -> Choice:
        """The best candidates, improved one exit at a time under the constraint of the target."""
        # Of candidates with equal accuracy and cost one is enough.
        rest = list({(c.accuracy, c.mean_cost): c for c in reversed(candidates)}.values())
        improved = []
        while rest and len(improved) < _STARTS:
            best = _pick(rest, better)
            rest = [c for c in rest if c is not best]
            for _ in range(_SWEEPS):
                before = best
                for e in range(len(self._orders)):
                    moved = self._evaluated(self._step(best.thresholds, e, better))
                    best = _pick([best, moved], better)
                if best is before:
                    break
            improved.append(best)
        return self._evaluated(_centred(self.scores, _pick(improved, better).thresholds))

    def _step(self, thresholds: np.ndarray, e: int, better: _Better) -> np.ndarray:
        """New thresholds, with the best one for exit e and the others unchanged."""
        moved = thresholds.copy()
        moved[e] = np.inf
        otherwise = first_exit(self.scores, moved)  # where a sample leaves if not at e
        order = self._orders[e]
        reach = order[otherwise[order] > e]
        correct_else = self.correct[np.arange(len(otherwise)), otherwise].astype(np.float64)
        cost_else = self.cost[otherwise]

        def totals(here: Any, there: np.ndarray) -> np.ndarray:
            """The mean if none, the first, the first two, ... of `reach` leave at e."""
            sums = there.sum() + np.cumsum(here - there[reach])
            return np.concatenate([[there.sum()], sums]) / len(otherwise)

        edges = _edges(self.scores[reach, e])
        accuracy = totals(self.correct[reach, e], correct_else)[edges]
        count = int(edges[better(accuracy, totals(self.cost[e], cost_else)[edges])])
        moved[e] = _between(self.scores[reach, e], count)
        return moved


def search(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray) -> Search:
    """The search on a trace; what all targets share is computed once, when it is first needed.

    Arguments are those of `for_budget`.

    Raises:
      ValueError: if the arrays do not fit.
    """
    scores, correct = np.asarray(scores, np.float32), np.asarray(correct, bool)
    if scores.ndim != 2 or correct.shape != scores.shape or np.shape(cost) != scores.shape[1:]:
        raise ValueError(
            f"scores {scores.shape}, correct {correct.shape}, cost {np.shape(cost)}; give [N, E], "
            "[N, E] and [E]."
        )
    if not len(scores):
        raise ValueError("an empty trace; give at least one held-out sample.")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; the network or the policy has diverged.")
    return Search(scores, correct, check_costs(cost, scores.shape[1]))


def for_budget(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, budget: float) -> Choice:
    """The thresholds of highest held-out accuracy at a mean cost of at most `budget`.

    Args:
      scores: `[N, E]`.
      correct: `[N, E]`, whether the answer at each exit is correct.
      cost: `[E]`, increasing.
      budget: in the unit of `cost`.

    Raises:
      ValueError: if the budget is below the cost of leaving at the first exit, or the arrays do not
        fit.
    """
    return search(scores, correct, cost).for_budget(budget)


def for_budgets(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, budgets: Sequence[float] | np.ndarray
) -> list[Choice]:
    """`for_budget` for several budgets, by one `Search`."""
    searched = search(scores, correct, cost)
    return [searched.for_budget(budget) for budget in budgets]


def for_drop(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, drop: float) -> Choice:
    """The cheapest thresholds that lose at most `drop` of accuracy against the last exit.

    Args:
      scores, correct, cost: as for `for_budget`.
      drop: as a fraction: 0.01 is one point of accuracy.

    Raises:
      ValueError: if the drop is negative, or the arrays do not fit.
    """
    return search(scores, correct, cost).for_drop(drop)


def geometric(
    scores: np.ndarray,
    correct: np.ndarray,
    cost: np.ndarray,
    budget: float,
    tolerance: float = 0.02,
) -> Choice:
    """The search of MSDNet: exit e takes a share of `q^e` of the samples, one `q` for all exits.

    The published code takes `q` from a grid by its nominal cost; with tied scores the real cost is
    another (asked for 3.0, it gave 1.0), and a share below one sample gives an infinite threshold
    by accident. Here `q` comes from bisection on the real cost of the thresholds, shares are
    rounded to the nearest edge between different scores, and a budget that cannot be reached
    because of ties is an error.

    Args:
      scores, correct, cost, budget: as for `for_budget`.
      tolerance: how far below the budget the mean cost may stay, as a fraction of it.

    Raises:
      ValueError: if the budget cannot be hit, or the arrays do not fit.
    """
    return search(scores, correct, cost).geometric(budget, tolerance)


def evaluate(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, thresholds: np.ndarray
) -> Choice:
    """Thresholds `[E - 1]` with their accuracy and mean cost on a trace."""
    exits = first_exit(scores, thresholds)
    accuracy = correct[np.arange(len(exits)), exits].mean()
    return Choice(thresholds, float(accuracy), float(np.asarray(cost, np.float64)[exits].mean()))


def shared(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, count: int) -> list[Choice]:
    """A fixed grid: the same threshold at every exit, at `count` quantiles of all scores."""
    edges = np.quantile(scores[:, :-1], np.linspace(0, 1, count)) if scores.shape[1] > 1 else []
    exits = scores.shape[1] - 1
    return [evaluate(scores, correct, cost, np.full(exits, t, np.float32)) for t in edges]


def _check_budget(cost: np.ndarray, budget: float) -> None:
    if not budget * _SLACK >= cost[0]:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the first exit costs {cost[0]:.4g} already, and "
            f"the whole network {cost[-1]:.4g}; give something between."
        )


def _pick(candidates: list[Choice], better: _Better) -> Choice:
    accuracy = np.array([c.accuracy for c in candidates])
    mean_cost = np.array([c.mean_cost for c in candidates])
    return candidates[int(better(accuracy, mean_cost))]


def _centred(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Thresholds that separate the samples in the same way, each halfway between two scores."""
    centred = thresholds.copy()
    active = np.ones(len(scores), bool)
    for e in range(len(thresholds)):
        descending = -np.sort(-scores[active, e])
        centred[e] = _between(descending, int((descending >= thresholds[e]).sum()))
        active &= scores[:, e] < thresholds[e]
    return centred


def _geometric_thresholds(scores: np.ndarray, log_q: float) -> np.ndarray:
    """Thresholds with which exit e takes about a share `q^e` of the samples."""
    n, exits = scores.shape
    power = log_q * np.arange(exits)
    share = np.exp(power - power.max())
    share = share / share.sum()
    thresholds = np.full(exits - 1, np.inf, np.float32)
    active = np.ones(n, bool)
    for e in range(exits - 1):
        descending = -np.sort(-scores[active, e], kind="stable")
        edges = _edges(descending)
        thresholds[e] = _between(descending, int(edges[np.abs(edges - share[e] * n).argmin()]))
        active &= scores[:, e] < thresholds[e]
    return thresholds


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
