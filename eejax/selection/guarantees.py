"""Thresholds with a guarantee: bounded risk, and bounded mean cost, on new data.

It takes three splits that serve no other purpose. On the first, candidates are chosen: a path of
thresholds from the safest to the boldest. On the second, they are certified. The third measures the
result. `control_risk` returns the boldest candidate with a certified risk, `certify` a candidate
with a certified risk and a certified mean cost.

Candidates are tested in the order of the path, until one fails (`bounds.fixed_sequence`,
`bounds.conformal`). The path, and so everything that was chosen, must not depend on the
certification samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from eejax.evaluation.routing import Scored, first_exit
from eejax.policies.base import check_costs, check_thresholds
from eejax.selection import bounds, thresholds
from eejax.trace import Trace

Test = Literal["auto", "binomial", "betting", "hoeffding_bentkus"]
Method = Literal["auto", "binomial", "betting", "hoeffding_bentkus", "crc"]

# Data sets hold exact duplicates; a few of them do not mean that a split was used twice.
_OVERLAP = 0.01


class Candidates(NamedTuple):
    """A path of thresholds, and the samples that it was chosen on.

    Attributes:
      thresholds: `[K, E - 1]` float32, from the safest to the boldest. The guarantees hold for any
        order, but only with rising risk and falling cost do many candidates pass.
      ids: `[M]` uint64, as in `Trace`; empty for thresholds that were chosen without data.
    """

    thresholds: np.ndarray
    ids: np.ndarray


class Certificate(NamedTuple):
    """Certified thresholds, and their guarantee.

    Attributes:
      thresholds: `[E - 1]` float32.
      method: of the test of the risk: `"binomial"`, `"betting"`, `"hoeffding_bentkus"` or `"crc"`.
      risk: the guaranteed upper bound of the mean loss.
      delta: the probability that the bound on the risk fails; None for `"crc"`, which bounds an
        expectation.
      empirical_risk: mean loss on the certification samples.
      mean_cost: on the certification samples, in the unit of the costs that were given.
      position: the index of the candidate, 0 for the safest.
      samples: N of the certification split.
      budget: the guaranteed upper bound of the mean cost, or None.
      delta_cost: the probability that the bound on the cost fails, or None.
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
        """The guarantee, its randomness and its condition, in one sentence."""
        measured = f"{self.empirical_risk:.4g} and {self.mean_cost:.4g} on these samples"
        if self.delta is None:
            return (
                f"Averaged over the draw of the {self.samples} certification samples and of a new "
                f"one, the expected loss is at most {self.risk:.4g} (mean loss and mean cost were "
                f"{measured}), if all of them are exchangeable and nothing was fitted on them."
            )
        promise = (
            f"a mean loss above {self.risk:.4g} on new samples is at most {100 * self.delta:.4g} %"
        )
        if self.budget is not None and self.delta_cost is not None:
            promise += (
                f", of a mean cost above {self.budget:.4g} at most {100 * self.delta_cost:.4g} %, "
                f"and of either at most {100 * min(self.delta + self.delta_cost, 1.0):.4g} %"
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
      steps: the largest number of candidates after the first; equal scores give fewer.

    Raises:
      ValueError: if there is no early exit, no step, or another number of samples.
    """
    early = _early_scores(scored, trace, steps)
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
    a guarantee on `disagreement`, give the predictions of the last exit as labels:
    `trace._replace(labels=scored.predictions[:, -1])`.

    Args:
      scored: N samples of the split to choose on, E exits.
      trace: the same samples, with their labels.
      cost: `[E]`, increasing.
      steps: the number of budgets, evenly spaced; the largest number of candidates after the first.

    Raises:
      ValueError: if there is no early exit or no step, or the arrays do not fit.
    """
    _early_scores(scored, trace, steps)
    cost = np.asarray(cost, np.float64)
    correct = scored.predictions == trace.labels[:, None]
    budgets = np.linspace(cost[-1], cost[0], steps)
    choices = thresholds.for_budgets(scored.scores, correct, cost, budgets)
    path = np.stack([np.full_like(choices[0].thresholds, np.inf), *(c.thresholds for c in choices)])
    first = np.sort(np.unique(path, axis=0, return_index=True)[1])
    return Candidates(path[first], trace.ids)


def errors(scored: Scored, labels: np.ndarray) -> np.ndarray:
    """Losses `[N, E]` float64: 1 where the prediction at an exit is not the label `[N]`."""
    return (scored.predictions != np.asarray(labels)[:, None]).astype(np.float64)


def disagreement(scored: Scored) -> np.ndarray:
    """Losses `[N, E]` float64: 1 where the prediction at an exit is not that of the last exit."""
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
    method: Method = "auto",
) -> Certificate:
    """The boldest candidate whose risk, the mean loss on new samples, is bounded by `risk`.

    With `"binomial"`, `"betting"` and `"hoeffding_bentkus"` the bound holds with probability at
    least 1 - delta over the certification samples. With `"crc"` it holds on average over them,
    which is weaker and needs fewer samples: conformal risk control (Angelopoulos, Bates, Fisch,
    Lei, Schuster, ICLR 2024, https://arxiv.org/abs/2208.02814). A draw that certifies nothing
    counts as a bound that holds, and as no loss.

    Args:
      candidates: K, chosen on other samples.
      scored: the N certification samples, E exits.
      losses: `[N, E]` in [0, 1], the loss of a sample that leaves at an exit: `errors`,
        `disagreement` or another.
      trace: the certification samples.
      cost: `[E]`, increasing, in any unit; reported, and not part of the guarantee.
      risk: in (0, 1).
      used: ids of the samples that anything was fitted on, by purpose, such as
        `{"training": ids, "calibrating temperatures": ids}`.
      delta: the probability that the bound fails, in (0, 1); not used by `"crc"`.
      method: the test. `"auto"` is `"binomial"` if every entry of `losses` is 0 or 1, else
        `"betting"`; name the method for a loss that only happens to be so.

    Raises:
      ValueError: if not even the safest candidate can be certified, certification samples were
        used before, or arguments do not fit.
    """
    method = _method(losses, method)
    path = _path(candidates, scored, losses, trace, cost, used)
    last = _last_certified(path, risk, delta, method)
    delta_risk = None if method == "crc" else delta
    return _certificate(path, last, method=method, risk=risk, delta=delta_risk)


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
    method: Test = "auto",
) -> Certificate:
    """A candidate whose risk is bounded by `risk` and whose mean cost is bounded by `budget`.

    Risks are tested from the safest candidate on, costs from the boldest one back. The bound on the
    risk holds with probability at least 1 - delta_risk for all candidates that its test certified,
    the bound on the cost with at least 1 - delta_cost, and so both together with at least
    1 - delta_risk - delta_cost. Of the candidates with both bounds, the result is the one of
    smallest empirical risk, and among equals the cheapest.

    Args:
      candidates, scored, losses, trace, used: as `control_risk` takes them.
      cost: `[E]`, increasing, in any unit.
      risk: in (0, 1).
      budget: in the unit of `cost`, above that of the first exit.
      delta_risk: in (0, 1).
      delta_cost: in (0, 1).
      method: of both tests, but `"betting"` for costs where it is `"auto"` or `"binomial"`.

    Raises:
      ValueError: if no candidate has both bounds (the message says which fails by how much),
        certification samples were used before, or arguments do not fit.
    """
    if method == "crc":
        raise ValueError(f"method {method!r}; give one of {get_args(Test)}.")
    of_cost: Test = "betting" if method in ("auto", "binomial") else method
    method = _method(losses, method)
    path = _path(candidates, scored, losses, trace, cost, used)
    least, most = (float(c) for c in np.asarray(cost, np.float64)[[0, -1]])
    if not budget > least:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the first exit costs {least:.4g} already, and "
            f"the whole network {most:.4g}; give something between."
        )
    last, first = _last_certified(path, risk, delta_risk, method), 0
    if budget < most:
        scaled = np.clip((path.costs[::-1] - least) / (most - least), 0, 1)
        scaled_budget = (budget - least) / (most - least)
        first = len(scaled) - int(certified(scaled, scaled_budget, delta_cost, of_cost))
    mean_loss, mean_cost = path.losses.mean(1), path.costs.mean(1)
    if first == len(mean_cost):
        raise ValueError(
            f"the boldest candidate's mean cost of {mean_cost[-1]:.4g} on {len(trace.ids)} samples "
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
    position = int(both[np.lexsort((mean_cost[both], mean_loss[both]))[0]])
    promise = {"risk": risk, "delta": delta_risk, "budget": budget, "delta_cost": delta_cost}
    return _certificate(path, position, method=method, **promise)


def certified(losses: np.ndarray, risk: float, delta: float, method: Method) -> np.ndarray:
    """How many candidates, counted from the first, have a risk of at most `risk`.

    Args:
      losses: `[..., K, N]` in [0, 1], of sample n under candidate k, in an order of samples that
        is independent of their losses.
      risk, delta, method: as for `control_risk`.

    Returns:
      `[...]` int, 0 where not even the first is certified.

    Raises:
      ValueError: if the method is unknown, or numbers are out of range.
    """
    if method == "crc":
        return bounds.conformal(losses, risk)
    method = _method(losses, method)
    if method == "binomial":
        return bounds.fixed_sequence(bounds.binomial(losses, risk), delta)
    if method == "betting":
        return bounds.fixed_sequence(bounds.betting(losses, risk, delta), delta)
    if method == "hoeffding_bentkus":
        p_values = bounds.hoeffding_bentkus(losses.mean(-1), losses.shape[-1], risk)
        return bounds.fixed_sequence(p_values, delta)
    raise ValueError(f"method {method!r}; give one of {get_args(Method)}.")


def _method(losses: ArrayLike, method: Any) -> Any:
    """The test that `"auto"` stands for."""
    return ("binomial" if bounds.binary(losses) else "betting") if method == "auto" else method


class _Path(NamedTuple):
    """Losses and costs `[K, N]` of the certification samples under each candidate `[K, E - 1]`."""

    thresholds: np.ndarray
    losses: np.ndarray
    costs: np.ndarray


def _certificate(path: _Path, position: int, **promise: Any) -> Certificate:
    return Certificate(
        path.thresholds[position],
        empirical_risk=float(path.losses[position].mean()),
        mean_cost=float(path.costs[position].mean()),
        position=position,
        samples=path.losses.shape[1],
        **promise,
    )


def _path(
    candidates: Candidates,
    scored: Scored,
    losses: ArrayLike,
    trace: Trace,
    cost: ArrayLike,
    used: Mapping[str, ArrayLike],
) -> _Path:
    """Checks the arguments and routes the samples, in an order fixed beforehand."""
    losses, cost = np.asarray(losses, np.float64), np.asarray(cost, np.float64)
    n, exits = scored.scores.shape
    if losses.shape != (n, exits) or cost.shape != (exits,) or trace.ids.shape != (n,) or not n:
        raise ValueError(
            f"losses {losses.shape}, cost {cost.shape} and {len(trace.ids)} ids for scores "
            f"{(n, exits)}; give [N, E], [E] and N of the same samples, at least one."
        )
    bounds.check_unit("losses", losses)
    check_costs(cost, exits)
    if not len(candidates.thresholds):
        raise ValueError("no candidates; give at least one.")
    path = np.stack([check_thresholds(t, exits) for t in candidates.thresholds])
    for purpose, ids in [("choosing the candidates", candidates.ids), *used.items()]:
        _check_unused(trace.ids, purpose, ids)
    # Betting needs an order that is independent of the losses; splits come sorted by class.
    order = np.random.default_rng(0).permutation(n)
    scores = scored.scores[order]
    exits_taken = [first_exit(scores, t) for t in path]
    along = np.stack([losses[order, e] for e in exits_taken])
    return _Path(path, along, np.stack([cost[e] for e in exits_taken]))


def _check_unused(ids: np.ndarray, purpose: str, used: ArrayLike) -> None:
    """Raises ValueError if more than a few of the samples were used for `purpose`."""
    others = np.asarray(used)
    if others.ndim != 1 or (others.size and others.dtype.kind not in "iu"):
        raise ValueError(
            f"ids of {purpose} of shape {others.shape} and type {others.dtype}; give whole numbers "
            "[M], like `trace.ids`."
        )
    # NumPy compares uint64 with int64 as float64, which would make different ids equal.
    again = int(np.isin(ids, others.astype(np.uint64)).sum())
    if again > _OVERLAP * len(ids):
        raise ValueError(
            f"{again} of the {len(ids)} certification samples were used for {purpose}; a bound "
            "holds only for samples that nothing was fitted on: hold out a split of its own."
        )


def _last_certified(path: _Path, risk: float, delta: float, method: Method) -> int:
    """The boldest candidate with a certified risk; raises ValueError if there is none."""
    last = int(certified(path.losses, risk, delta, method)) - 1
    if last >= 0:
        return last
    n = path.losses.shape[1]
    level = "" if method == "crc" else f" at delta {delta:.4g}"
    without_loss = certified(np.zeros((1, n)), risk, delta, method)
    few = "" if without_loss else f" ({n} samples are too few even without any loss)"
    remedy = "" if method == "crc" else " or a larger delta"
    raise ValueError(
        f"the safest candidate's empirical risk of {path.losses[0].mean():.4g} on {n} samples does "
        f"not certify a risk of {risk:.4g}{level}{few}; give a larger risk, more samples{remedy}."
    )


def _early_scores(scored: Scored, trace: Trace, steps: int) -> np.ndarray:
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
