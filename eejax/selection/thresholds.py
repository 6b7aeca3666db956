"""Thresholds for a mean-cost budget and for an accuracy drop, chosen on a held-out trace.

Sample n with scores `s_ne` leaves at `x_n(t) = min {e : s_ne >= t_e}`, or at the last exit. With
`c_e` the cost of leaving at exit e and `a_ne` the probability that exit e is correct, as
`smoothing.chance` fits it to the held-out outcomes, thresholds t have

    accuracy  A(t) = mean_n a_{n, x_n(t)},    mean cost  C(t) = mean_n c_{x_n(t)},

and `for_budget` maximises A(t) subject to C(t) <= budget, with the search of `frontier`. A search
that maximises the number of correct held-out samples finds thresholds that fit their luck, and
loses on new data what it gained on them.

`for_drop` walks along the frontier's path of prices, from the most expensive point to the
cheapest. The loss against the last exit is bounded by outcomes as they are, paired sample by
sample; the walk ends before the first point whose bound is above the drop. The points hardly depend
on single outcomes and their order is fixed, so a bound that holds for one point nearly holds for
the walk; `docs/lab/generalisation.md` has the simulation.

`geometric` is the one-parameter search of MSDNet (Huang et al., ICLR 2018,
https://arxiv.org/abs/1703.09844).

Costs are cumulative and in any unit; budgets are in the same unit. A chosen threshold lies halfway
between two held-out scores, away from both, so that rounding in another compiled program moves no
held-out sample. Nothing is random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from eejax.evaluation.routing import first_exit
from eejax.policies.base import check_costs
from eejax.selection import places, smoothing
from eejax.selection.frontier import SLACK, Choice, Frontier, affordable, evaluate

# The walk of `for_drop` ends later than at one point fixed beforehand. Without this factor 12 % of
# the drops were missed that were to be kept with confidence 0.9 (1,000 samples, 60 draws).
_MARGIN = 1.15
_HALVINGS = 5
_FOLDS = 5


class Forecast(NamedTuple):
    """What a choice comes to on new data, as far as the held-out samples tell.

    Attributes:
      accuracy: ends of the interval of the expected accuracy.
      mean_cost: ends of the interval of the expected mean cost, in the unit of the costs.
    """

    accuracy: tuple[float, float]
    mean_cost: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Search:
    """A held-out trace to choose thresholds on, for any number of targets; made by `search`.

    Attributes:
      scores: `[N, E]` float32.
      correct: `[N, E]` bool.
      cost: `[E]` float64.
      given: `[N, E]` float64, what to maximise; None for the fitted `chance`.
    """

    scores: np.ndarray
    correct: np.ndarray
    cost: np.ndarray
    given: np.ndarray | None = None

    def for_budget(self, budget: float) -> Choice:
        """As the function `for_budget`."""
        _check_budget(self.cost, budget)
        spread = self.frontier.geometric(budget)
        more = [] if spread is None else [spread]
        best = self.frontier.best(affordable(budget), *more)
        return self._outcome(best.thresholds)

    def for_drop(self, drop: float, confidence: float = 0.9) -> Choice:
        """As the function `for_drop`."""
        if not drop >= 0:
            raise ValueError(
                f"an accuracy drop of {drop}; give a fraction of at least 0, like 0.01."
            )
        if not 0.5 <= confidence < 1:
            raise ValueError(
                f"a confidence of {confidence}; give one from 0.5 (kept in half of all draws) up "
                "to, and without, 1."
            )
        z = _MARGIN * float(special.ndtri(confidence))

        def kept(choice: Choice) -> bool:
            exits = first_exit(self.scores, choice.thresholds)
            return _loss_bound(self.correct, exits, z) <= drop + 1e-12

        never = self.frontier.at(np.full(len(self.cost) - 1, np.inf, np.float32))
        best = never
        for following in sorted(self.frontier.path, key=lambda c: -c.mean_cost):
            if kept(following):
                best = following
                continue
            # The prices jump from point to point; in between there are other budgets.
            low, high, ends = following.mean_cost, best.mean_cost, [best, following]
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                between = self.frontier.improved(ends, affordable(middle))
                if kept(between):
                    best, high = between, middle
                else:
                    low = middle
            break
        return self._outcome(best.thresholds)

    def geometric(self, budget: float, tolerance: float = 0.02) -> Choice:
        """As the function `geometric`."""
        _check_budget(self.cost, budget)
        if budget >= self.cost[-1]:
            return self._outcome(np.full(len(self.cost) - 1, np.inf, np.float32))
        best = self.frontier.geometric(budget)
        if best is None or best.mean_cost < budget * (1 - tolerance):
            nearest = "none" if best is None else f"{best.mean_cost:.4g}"
            raise ValueError(
                f"a mean cost of {budget:.4g} cannot be hit: the nearest below it is {nearest}, "
                "because too many scores are equal, or samples too few; use a policy with finer "
                "scores, or another budget."
            )
        return self._outcome(best.thresholds)

    def forecast(self, choose: Callable[[Search], Choice], confidence: float = 0.95) -> Forecast:
        """Intervals for accuracy and mean cost on new data, by cross-fitting.

        The samples are divided into five parts. Thresholds are chosen on four of them and judged on
        the fifth, for each in turn, so that no sample is judged by thresholds that it had a part
        in. The interval of the accuracy is Clopper and Pearson's, that of the cost Student's. They
        are of the expectation: the mean of a small new sample varies more. Chosen on a fifth fewer
        samples, thresholds are a little worse than those of the whole.

        Args:
          choose: the same choice on another search, `lambda search: search.for_budget(0.6)`.
          confidence: of each interval, in (0, 1).

        Raises:
          ValueError: if there are fewer than 2 samples, or `choose` raises it.
        """
        if len(self.scores) < 2:
            raise ValueError("one sample cannot be divided; give two or more.")
        correct, costs = np.empty(len(self.scores), bool), np.empty(len(self.scores))
        for searched, held in self._folds:
            exits = first_exit(self.scores[held], choose(searched).thresholds)
            correct[held], costs[held] = self.correct[held, exits], self.cost[exits]
        count, mean = len(correct), costs.mean()
        ends = stats.binomtest(int(correct.sum()), count).proportion_ci(confidence, "exact")
        half = stats.t.ppf((1 + confidence) / 2, count - 1) * costs.std(ddof=1) / count**0.5
        low, high = np.clip([mean - half, mean + half], self.cost[0], self.cost[-1])
        return Forecast((float(ends.low), float(ends.high)), (float(low), float(high)))

    @functools.cached_property
    def _folds(self) -> list[tuple[Search, np.ndarray]]:
        """A search on the other parts, and the samples `[M]` of each part."""
        count = len(self.scores)
        # Splits come sorted by class.
        part = np.random.default_rng(0).permutation(count) % min(_FOLDS, count)
        held = [np.flatnonzero(part == k) for k in range(part.max() + 1)]
        rest = [np.setdiff1d(np.arange(count), samples) for samples in held]
        given = [None if self.given is None else self.given[r] for r in rest]
        searches = [
            Search(self.scores[r], self.correct[r], self.cost, g)
            for r, g in zip(rest, given, strict=True)
        ]
        return list(zip(searches, held, strict=True))

    @functools.cached_property
    def frontier(self) -> Frontier:
        """Of the fitted probabilities, or of what is given in their place."""
        worth = smoothing.chance(self.scores, self.correct) if self.given is None else self.given
        return Frontier(np.asfortranarray(self.scores), worth, self.cost)

    def _outcome(self, thresholds: np.ndarray) -> Choice:
        """The choice, with its accuracy by outcomes as they are."""
        centred = places.centred(self.scores, thresholds)
        return evaluate(self.scores, self.correct, self.cost, centred)


def search(
    scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, given: np.ndarray | None = None
) -> Search:
    """The search on a trace; what all targets share is computed once, when it is first needed.

    Args:
      scores, correct, cost: as for `for_budget`.
      given: `[N, E]`, what to maximise in the place of the fitted probability of being correct.
        `correct` itself gives the search over outcomes as they are, which is exact on the held-out
        samples and worse on others: `experiments.generalisation` compares with it.

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
    cost = check_costs(cost, scores.shape[1])
    return Search(scores, correct, cost, None if given is None else np.asarray(given, np.float64))


def for_budget(scores: np.ndarray, correct: np.ndarray, cost: np.ndarray, budget: float) -> Choice:
    """The thresholds of highest accuracy at a mean held-out cost of at most `budget`.

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


def for_drop(
    scores: np.ndarray,
    correct: np.ndarray,
    cost: np.ndarray,
    drop: float,
    confidence: float = 0.9,
) -> Choice:
    """The cheapest thresholds that lose at most `drop` of accuracy against the last exit.

    The loss on new data is at most `drop` in about a fraction `confidence` of all draws of the
    held-out samples: the upper bound of the paired loss is a normal one. `guarantees` certifies.
    Where nothing passes, all early exits are off.

    Args:
      scores, correct, cost: as for `for_budget`.
      drop: as a fraction: 0.01 is one point of accuracy.
      confidence: from 0.5, at which the held-out loss itself is at most `drop`, to below 1.

    Raises:
      ValueError: if drop or confidence are out of range, or the arrays do not fit.
    """
    return search(scores, correct, cost).for_drop(drop, confidence)


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


def _check_budget(cost: np.ndarray, budget: float) -> None:
    if not budget * SLACK >= cost[0]:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the first exit costs {cost[0]:.4g} already, and "
            f"the whole network {cost[-1]:.4g}; give something between."
        )


def _loss_bound(correct: np.ndarray, exits: np.ndarray, z: float) -> float:
    """An upper bound of the loss against the last exit, z standard errors above the mean.

    The standard error is that of paired proportions with one discordant sample more than were seen
    (after Agresti, Min, *Simple improved confidence intervals for comparing matched proportions*,
    Statistics in Medicine 2005, https://doi.org/10.1002/sim.1781), so that it is not 0 where a few
    samples leave early and none of them was lost.
    """
    if (exits == correct.shape[1] - 1).all():
        return 0.0
    loss = correct[:, -1].astype(np.float64) - correct[np.arange(len(exits)), exits]
    return float(loss.mean() + z * np.sqrt(np.abs(loss).sum() + 1) / len(loss))
