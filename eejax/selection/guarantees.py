"""Thresholds with a promise: bounded risk, and bounded mean cost, on data not seen yet.

Three splits, none of them used for anything else before: on one the candidates are chosen, a path
of thresholds from the safest to the boldest; on the next one they are certified; what is left tells
what they are worth. `control_risk` returns the boldest candidate whose risk is certified, `certify`
one whose risk and mean cost both are.

Candidates are tested in the fixed order of the path, until one fails (`bounds.fixed_sequence`,
`bounds.conformal`); the order, and so all that was chosen, has to be fixed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from eejax.evaluation.routing import Scored, first_exit
from eejax.policies.base import check_thresholds
from eejax.selection import bounds, thresholds
from eejax.trace import Trace

Test = Literal["betting", "hoeffding_bentkus"]
Method = Literal["betting", "hoeffding_bentkus", "crc"]

# Data sets hold exact duplicates, of which a few in every split are no sign of a split used twice.
_OVERLAP = 0.01


class Candidates(NamedTuple):
    """A path of thresholds, and the samples that it was chosen on.

    Attributes:
      thresholds: `[K, E - 1]` float32, from the safest to the boldest. The promises hold for any
        order, but only an order of rising risk and falling cost gets far.
      ids: `[M]` uint64, as in `Trace`; empty where thresholds came from no data at all.
    """

    thresholds: np.ndarray
    ids: np.ndarray


class Certificate(NamedTuple):
    """Certified thresholds, and what is promised of them.

    Attributes:
      thresholds: `[E - 1]` float32.
      method: `"betting"`, `"hoeffding_bentkus"` or `"crc"`.
      risk: the largest mean loss that is promised.
      delta: the chance that the promise about the risk fails; None for `"crc"`, which is about an
        expectation.
      empirical_risk: mean loss on the certification samples.
      mean_cost: on the certification samples, in the unit of the costs that were given.
      position: which of the candidates these are, 0 for the safest.
      samples: how many certified it.
      budget: the largest mean cost that is promised, or None.
      delta_cost: the chance that the promise about the cost fails, or None.
    """

    thresholds: np.ndarray
    method: Method
    risk: float
    delta: float | None
    empirical_risk: float
    mean_cost: float
    position: int
    samples: int
    budget: float | None = None
    delta_cost: float | None = None

    @property
    def words(self) -> str:
        """What is promised, over which randomness and on which condition, in one sentence."""
        measured = f"{self.empirical_risk:.4g} and {self.mean_cost:.4g} on these samples"
        if self.delta is None:
            return (
                f"Averaged over the draw of the {self.samples} certification samples and of a new "
                f"one, the expected loss is at most {self.risk:.4g} (mean loss and mean cost were "
                f"{measured}), if all of them are exchangeable and nothing was fitted on them."
            )
        promise = (
            f"a mean loss above {self.risk:.4g} on new samples is at most {_percent(self.delta)}"
        )
        if self.budget is not None and self.delta_cost is not None:
            promise += (
                f", of a mean cost above {self.budget:.4g} at most {_percent(self.delta_cost)}, and"
                f" of either at most {_percent(min(self.delta + self.delta_cost, 1.0))}"
            )
        return (
            f"Over the draw of the {self.samples} certification samples, the chance of certifying "
            f"thresholds with {promise} (mean loss and mean cost were {measured}), if certification"
            " and new samples are independent draws from one distribution and nothing was fitted "
            "on them."
        )


def shared_path(scored: Scored, trace: Trace, *, steps: int = 50) -> Candidates:
    """One threshold for all exits, from +inf down by quantiles of the scores to -inf.

    Args:
      scored: N samples of the split to choose on, E exits.
      trace: the same samples.
      steps: at most so many candidates after the first; fewer where scores are equal.

    Raises:
      ValueError: no early exit, no steps, or another number of samples.
    """
    early = _early(scored, trace, steps)
    values = np.unique(early)
    chosen = np.unique(np.quantile(early, np.linspace(0, 1, steps), method="lower"))
    at = np.searchsorted(values, chosen[1:])
    # Halfway between two scores, so that rounding in another program moves no sample.
    between = np.unique(values[at - 1] + (values[at] - values[at - 1]) / 2)
    path = np.concatenate([[np.inf], between[::-1], [-np.inf]]).astype(np.float32)
    return Candidates(np.repeat(path[:, None], early.shape[1], axis=1), trace.ids)


def per_exit_path(scored: Scored, trace: Trace, cost: ArrayLike, *, steps: int = 20) -> Candidates:
    """A threshold for each exit, of the best accuracy within budgets from the whole cost down.

    The first candidate switches all early exits off; the others are `thresholds.for_budgets`. For
    a promise about `disagreement` the last exit's answers are to be the labels:
    `trace._replace(labels=scored.predictions[:, -1])`.

    Args:
      scored: N samples of the split to choose on, E exits.
      trace: the same samples, with their labels.
      cost: `[E]`, increasing.
      steps: budgets, evenly spaced; at most so many candidates after the first.

    Raises:
      ValueError: no early exit, no steps, or arrays that do not fit.
    """
    _early(scored, trace, steps)
    c = np.asarray(cost, np.float64)
    correct = scored.predictions == trace.labels[:, None]
    budgets = np.linspace(c[-1], c[0], steps)
    choices = thresholds.for_budgets(scored.scores, correct, c, budgets)
    path = np.stack([np.full_like(choices[0].thresholds, np.inf), *(a.thresholds for a in choices)])
    first = np.sort(np.unique(path, axis=0, return_index=True)[1])
    return Candidates(path[first], trace.ids)


def errors(scored: Scored, labels: np.ndarray) -> np.ndarray:
    """Losses `[N, E]` float64: 1 where the answer at an exit is not the label `[N]`."""
    return (scored.predictions != np.asarray(labels)[:, None]).astype(np.float64)


def disagreement(scored: Scored) -> np.ndarray:
    """Losses `[N, E]` float64: 1 where the answer at an exit is not that of the last exit."""
    return errors(scored, scored.predictions[:, -1])


def control_risk(
    candidates: Candidates,
    scored: Scored,
    losses: ArrayLike,
    trace: Trace,
    cost: ArrayLike,
    risk: float,
    *,
    used: Mapping[str, ArrayLike],
    delta: float = 0.1,
    method: Method = "betting",
) -> Certificate:
    """The boldest candidate whose risk, the mean loss on new samples, is promised.

    `"betting"` and `"hoeffding_bentkus"` promise that with probability at least 1 - delta over the
    certification samples the risk is at most `risk`. `"crc"` promises that it is so on average over
    them, which says less and asks less: conformal risk control (Angelopoulos, Bates, Fisch, Lei,
    Schuster, ICLR 2024, https://arxiv.org/abs/2208.02814). A draw for which nothing is certified
    counts as a promise kept, and as no loss.

    Args:
      candidates: K, chosen on other samples.
      scored: the N certification samples, E exits.
      losses: `[N, E]` in [0, 1], the loss of a sample that leaves at an exit: `errors`,
        `disagreement` or another.
      trace: the certification samples.
      cost: `[E]`, increasing, in any unit; reported, and not part of the promise.
      risk: in (0, 1).
      used: ids of the samples that anything was fitted on, by what it was, such as
        `{"training": ids, "calibrating temperatures": ids}`.
      delta: the chance of a broken promise, in (0, 1); `"crc"` has none.
      method: which promise, by which test.

    Raises:
      ValueError: not even the safest candidate can be certified, certification samples that were
        used before, or arguments that do not fit.
    """
    x, spent = _paths(candidates, scored, losses, trace, cost, used)
    last = int(certified(x, risk, delta, method)) - 1
    if last < 0:
        raise ValueError(_uncertified(x, risk, delta, method))
    return Certificate(
        np.asarray(candidates.thresholds[last], np.float32),
        method,
        risk,
        None if method == "crc" else delta,
        float(x[last].mean()),
        float(spent[last].mean()),
        last,
        x.shape[1],
    )


def certify(
    candidates: Candidates,
    scored: Scored,
    losses: ArrayLike,
    trace: Trace,
    cost: ArrayLike,
    risk: float,
    budget: float,
    *,
    used: Mapping[str, ArrayLike],
    delta_risk: float = 0.05,
    delta_cost: float = 0.05,
    method: Test = "betting",
) -> Certificate:
    """A candidate of which a largest risk and a largest mean cost are both promised.

    Risks are tested from the safest candidate on, costs from the boldest one back; each promise
    holds with probability at least 1 - its delta, for all candidates that its test certified at
    once, and so both together with at least 1 - delta_risk - delta_cost. Of those that have both
    the one of smallest empirical risk is returned, the cheapest of equals: a budget is there to be
    spent.

    Args:
      candidates, scored, losses, trace, used: as `control_risk` takes them.
      cost: `[E]`, increasing, in any unit.
      risk: in (0, 1).
      budget: in the unit of `cost`, above that of the first exit.
      delta_risk: in (0, 1).
      delta_cost: in (0, 1).
      method: of both tests.

    Raises:
      ValueError: no candidate has both, and which of the two fails by how much; certification
        samples that were used before, or arguments that do not fit.
    """
    if method not in ("betting", "hoeffding_bentkus"):
        raise ValueError(f'method {method!r}; give "betting" or "hoeffding_bentkus".')
    x, spent = _paths(candidates, scored, losses, trace, cost, used)
    least, most = (float(c) for c in np.asarray(cost, np.float64)[[0, -1]])
    if not budget > least:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the first exit costs {least:.4g} already, and "
            f"the whole network {most:.4g}; give something between."
        )
    last = int(certified(x, risk, delta_risk, method)) - 1
    first = 0
    if budget < most:
        scaled = np.clip((spent[::-1] - least) / (most - least), 0, 1)
        limit = (budget - least) / (most - least)
        first = len(spent) - int(certified(scaled, limit, delta_cost, method))
    mean_loss, mean_cost = x.mean(1), spent.mean(1)
    if last < 0:
        raise ValueError(_uncertified(x, risk, delta_risk, method))
    if first == len(spent):
        raise ValueError(
            f"the boldest candidate's mean cost of {mean_cost[-1]:.4g} on {x.shape[1]} samples "
            f"does not certify a budget of {budget:.4g} at delta_cost {delta_cost:.4g}; give a "
            "larger budget, more samples or bolder candidates."
        )
    if first > last:
        raise ValueError(
            f"no candidate has both: the risk of {risk:.4g} is certified down to a mean cost of "
            f"{mean_cost[last]:.4g}, and the budget of {budget:.4g} only from an empirical risk of "
            f"{mean_loss[first]:.4g} on; give a larger risk or budget, or more samples."
        )
    both = np.arange(first, last + 1)
    chosen = int(both[np.lexsort((mean_cost[both], mean_loss[both]))[0]])
    return Certificate(
        np.asarray(candidates.thresholds[chosen], np.float32),
        method,
        risk,
        delta_risk,
        float(mean_loss[chosen]),
        float(mean_cost[chosen]),
        chosen,
        x.shape[1],
        budget,
        delta_cost,
    )


def certified(losses: np.ndarray, risk: float, delta: float, method: Method) -> np.ndarray:
    """How many candidates, counted from the first, have a risk of at most `risk`.

    Args:
      losses: `[..., K, N]` in [0, 1], of sample n under candidate k; the samples in an order that
        has nothing to do with their losses.
      risk, delta, method: as for `control_risk`.

    Returns:
      `[...]` int, 0 where not even the first is certified.

    Raises:
      ValueError: another method, or numbers out of range.
    """
    if method == "crc":
        return bounds.conformal(losses, risk)
    if method == "betting":
        return bounds.fixed_sequence(bounds.betting(losses, risk, delta), delta)
    if method == "hoeffding_bentkus":
        p_values = bounds.hoeffding_bentkus(losses.mean(-1), losses.shape[-1], risk)
        return bounds.fixed_sequence(p_values, delta)
    raise ValueError(f'method {method!r}; give "betting", "hoeffding_bentkus" or "crc".')


def _paths(
    candidates: Candidates,
    scored: Scored,
    losses: ArrayLike,
    trace: Trace,
    cost: ArrayLike,
    used: Mapping[str, ArrayLike],
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and costs `[K, N]` along the path, the samples in an order fixed beforehand."""
    x, c = np.asarray(losses, np.float64), np.asarray(cost, np.float64)
    n, exits = scored.scores.shape
    if x.shape != (n, exits) or c.shape != (exits,) or trace.ids.shape != (n,) or not n:
        raise ValueError(
            f"losses {x.shape}, cost {c.shape} and {len(trace.ids)} ids for scores {(n, exits)}; "
            "give [N, E], [E] and N of the same samples, at least one."
        )
    bounds.check_unit("losses", x)
    if not (np.diff(c) >= 0).all() or not (c > 0).all():
        raise ValueError(f"costs {c.tolist()}; give cumulative costs, positive and increasing.")
    if not len(candidates.thresholds):
        raise ValueError("no candidates; give at least one.")
    path = np.stack([check_thresholds(t, exits) for t in candidates.thresholds])
    for use, ids in [("choosing the candidates", candidates.ids), *used.items()]:
        _refuse_used(trace.ids, use, ids)
    # Betting needs an order that has nothing to do with the losses; splits come sorted by class.
    order = np.random.default_rng(0).permutation(n)
    scores = scored.scores[order]
    left = [first_exit(scores, limits) for limits in path]
    return np.stack([x[order, e] for e in left]), np.stack([c[e] for e in left])


def _refuse_used(ids: np.ndarray, use: str, theirs: ArrayLike) -> None:
    others = np.asarray(theirs)
    if others.ndim != 1 or (others.size and others.dtype.kind not in "iu"):
        raise ValueError(
            f"ids of {use} of shape {others.shape} and type {others.dtype}; give whole numbers "
            "[M], like `trace.ids`."
        )
    # uint64 beside int64 would be compared as float64, and different ids be found equal.
    again = int(np.isin(ids, others.astype(np.uint64)).sum())
    if again > _OVERLAP * len(ids):
        raise ValueError(
            f"{again} of the {len(ids)} certification samples were used for {use}; a bound holds "
            "only for samples that nothing was fitted on: hold out a split of its own."
        )


def _uncertified(losses: np.ndarray, risk: float, delta: float, method: Method) -> str:
    n = losses.shape[1]
    level = "" if method == "crc" else f" at delta {delta:.4g}"
    without_loss = certified(np.zeros((1, n)), risk, delta, method)
    few = "" if without_loss else f" ({n} samples are too few even without any loss)"
    remedy = "" if method == "crc" else " or a larger delta"
    return (
        f"the safest candidate's empirical risk of {losses[0].mean():.4g} on {n} samples does not "
        f"certify a risk of {risk:.4g}{level}{few}; give a larger risk, more samples{remedy}."
    )


def _early(scored: Scored, trace: Trace, steps: int) -> np.ndarray:
    """Scores `[N, E - 1]` of the exits that have a threshold."""
    scores = scored.scores
    if scores.shape[1] < 2 or not len(scores) or len(trace.ids) != len(scores):
        raise ValueError(
            f"scores {scores.shape} and {len(trace.ids)} ids; give the same samples, at least one, "
            "and two exits or more."
        )
    if steps < 1:
        raise ValueError(f"{steps} steps; give at least one.")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; the network or the policy has diverged.")
    return scores[:, :-1]


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
