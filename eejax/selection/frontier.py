"""The frontier of accuracy against mean cost on a trace, and its improvement for a target.

With `a_ne` the accuracy of sample n at exit e, as an outcome or as a probability, `c_e` the cost of
leaving there and `x_n(t)` where the sample leaves with thresholds t,

    A(t) = mean_n a_{n, x_n(t)},    C(t) = mean_n c_{x_n(t)}.

One step replaces the threshold of one exit e by the best one, the others fixed. Let `y_n` be where
sample n leaves with exit e switched off, and `n_1, n_2, ...` the samples that reach e (`y_n > e`),
from the highest score at e to the lowest. If the first k of them leave at e,

    A_k = A_0 + 1/N sum_{i <= k} (a_{n_i, e} - a_{n_i, y}),
    C_k = C_0 + 1/N sum_{i <= k} (c_e - c_y),

which two cumulative sums give for every k. The step takes the k that is best for its objective,
among those at which the score changes, and sets `t_e` halfway between the scores of `n_k` and
`n_{k+1}`.

The search has two phases. First, the steps are swept over the exits with the objective
`A - price C`, at prices that go from everything to nothing: a Lagrangian search, which traces the
frontier. Then the best feasible points of that frontier, of a grid of shared thresholds, of
geometric ones and of those that use two exits only are improved by the same step under the
constraint itself, and the best of them is kept. So A is never below that of those. The first phase
does not depend on the target: it is done once for all targets. Nothing is random.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eejax.evaluation.routing import first_exit
from eejax.selection import places

_PRICES = 48
_SWEEPS = 20
_SHARED = 64
_GEOMETRIC_HALVINGS = 30
# A single start gets stuck where an exit is bad: in 800 draws of 300 samples and 3 exits it was up
# to 24 samples behind the exact optimum; 8 starts 6, 16 starts 2, 40 starts 1.
_STARTS = 16
# Of them from thresholds that use two exits only. The prices miss those: with exits at 0.42, 0.54,
# 0.77 and 1 of the cost and a budget of 0.5, a search without them lost 0.2 points.
_PAIR_STARTS = 4
_PAIR_GRID = 16
_PAIRS = 32
# A mean of equal costs may be rounded above them.
SLACK = 1 + 1e-9


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
Better = Callable[[np.ndarray, np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class Frontier:
    """What a search climbs on.

    Attributes:
      scores: `[N, E]` float32.
      accuracy: `[N, E]`, what leaving there is worth: 0 or 1, or a probability.
      cost: `[E]` float64.
    """

    scores: np.ndarray
    accuracy: np.ndarray
    cost: np.ndarray

    def at(self, thresholds: np.ndarray) -> Choice:
        """A and C of some thresholds."""
        return evaluate(self.scores, self.accuracy, self.cost, thresholds)

    def best(self, better: Better, *more: Choice) -> Choice:
        """The best thresholds, by what `better` prefers; `more` are further candidates."""
        pairs = _best(self._pairs, better, _PAIR_STARTS)
        singles = _best([*self._candidates, *more], better, _STARTS - len(pairs))
        return self.improved([*singles, *pairs], better)

    def geometric(self, budget: float) -> Choice | None:
        """The most expensive geometric thresholds within a budget, if any, by bisection."""
        low, high, best = -12.0, 12.0, None
        for _ in range(_GEOMETRIC_HALVINGS):
            middle = (low + high) / 2
            choice = self.at(places.geometric(self.scores, self._orders, middle))
            if choice.mean_cost <= budget * SLACK:
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
    def _candidates(self) -> list[Choice]:
        """Candidates along the whole range of costs, the same for every target."""
        early = self.scores.shape[1] - 1
        single = [np.where(np.arange(early) < e, np.inf, -np.inf) for e in range(early + 1)]
        candidates = [self.at(t.astype(np.float32)) for t in reversed(single)]
        candidates += shared(self.scores, self.accuracy, self.cost, _SHARED)
        for log_q in np.linspace(-4, 4, _SHARED):
            candidates.append(self.at(places.geometric(self.scores, self._orders, log_q)))
        return candidates + self.path

    @functools.cached_property
    def path(self) -> list[Choice]:
        """The best thresholds at each price, which starts from those of the price before."""
        early, path = self.scores.shape[1] - 1, []
        thresholds = np.full(early, np.inf, np.float32)
        for price in np.geomspace(100, 1e-3, _PRICES) / self.cost[-1]:

            def worth(accuracy: np.ndarray, mean_cost: np.ndarray, price: float = price) -> Any:
                return np.argmax(accuracy - price * mean_cost)

            for _ in range(_SWEEPS):
                before = thresholds
                for e in reversed(range(early)):
                    thresholds = self._step(thresholds, e, worth)
                if np.array_equal(before, thresholds):
                    break
            path.append(self.at(thresholds))
        return path

    @functools.cached_property
    def _pairs(self) -> list[Choice]:
        """Candidates that use two exits only."""
        exits = self.scores.shape[1]
        pairs = list(itertools.combinations(range(exits), 2))
        candidates = []
        for first, second in pairs[:: 1 + len(pairs) // _PAIRS]:
            thresholds = np.where(np.arange(exits - 1) == second, -np.inf, np.inf)
            for edge in np.quantile(self.scores[:, first], np.linspace(0, 1, _PAIR_GRID)):
                thresholds[first] = edge
                candidates.append(self.at(thresholds.astype(np.float32)))
        return candidates

    def improved(self, starts: list[Choice], better: Better) -> Choice:
        """The best of the starts, improved one exit at a time under the constraint of a target."""
        improved = []
        for best in starts:
            for _ in range(_SWEEPS):
                before = best
                for e in range(len(self._orders)):
                    moved = self.at(self._step(best.thresholds, e, better))
                    best = _pick([best, moved], better)
                if best is before:
                    break
            improved.append(best)
        return _pick(improved, better)

    def _step(self, thresholds: np.ndarray, e: int, better: Better) -> np.ndarray:
        """New thresholds, with the best one for exit e and the others unchanged."""
        moved = thresholds.copy()
        moved[e] = np.inf
        otherwise = first_exit(self.scores, moved)  # where a sample leaves if not at e
        order = self._orders[e]
        reach = order[otherwise[order] > e]
        accuracy_else = self.accuracy[np.arange(len(otherwise)), otherwise]
        cost_else = self.cost[otherwise]

        def totals(here: Any, there: np.ndarray) -> np.ndarray:
            """The mean if none, the first, the first two, ... of `reach` leave at e."""
            sums = there.sum() + np.cumsum(here - there[reach])
            return np.concatenate([[there.sum()], sums]) / len(otherwise)

        edges = places.edges(self.scores[reach, e])
        accuracy = totals(self.accuracy[reach, e], accuracy_else)[edges]
        count = int(edges[better(accuracy, totals(self.cost[e], cost_else)[edges])])
        moved[e] = places.between(self.scores[reach, e], count)
        return moved


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


def affordable(budget: float) -> Better:
    """Highest accuracy among those within the budget; among equals the cheapest."""

    def better(accuracy: np.ndarray, mean_cost: np.ndarray) -> Any:
        within = mean_cost <= budget * SLACK
        worth = np.where(within, accuracy, -np.inf) if within.any() else accuracy
        best = np.flatnonzero(worth == worth.max())
        return best[mean_cost[best].argmin()]

    return better


def _pick(candidates: list[Choice], better: Better) -> Choice:
    accuracy = np.array([c.accuracy for c in candidates])
    mean_cost = np.array([c.mean_cost for c in candidates])
    return candidates[int(better(accuracy, mean_cost))]


def _best(candidates: list[Choice], better: Better, count: int) -> list[Choice]:
    """The best candidates, best first; of those with equal accuracy and cost one is enough."""
    rest = list({(c.accuracy, c.mean_cost): c for c in reversed(candidates)}.values())
    best = []
    while rest and len(best) < count:
        best.append(_pick(rest, better))
        rest = [c for c in rest if c is not best[-1]]
    return best
