"""Metrics of a trace and of a routing: accuracy, cost, calibration, overthinking, and the same for
the oracle and for chance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from eejax.evaluation.routing import Routed
from eejax.policies.base import check_costs


class Reliability(NamedTuple):
    """Confidence against accuracy in equal bins of confidence; each field is `[bins]`.

    Attributes:
      confidence: mean of the bin, NaN where it is empty.
      accuracy: fraction correct, NaN where the bin is empty.
      count: samples in the bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


class Outcome(NamedTuple):
    """Accuracy and cost of a routing.

    Attributes:
      accuracy: fraction correct.
      mean_cost: in the unit of the costs that were given.
      exit_fractions: `[E]`, the fraction of samples that left at each exit.
    """

    accuracy: float
    mean_cost: float
    exit_fractions: np.ndarray


def outcome(routed: Routed, labels: np.ndarray, cumulative_cost: np.ndarray) -> Outcome:
    """Accuracy and mean cost of a routing.

    Args:
      routed: N samples.
      labels: `[N]`.
      cumulative_cost: `[E]`, the cost of leaving at each exit, including the heads before it.
    """
    counts = np.bincount(routed.exits, minlength=len(cumulative_cost))
    return Outcome(
        float((routed.logits.argmax(-1) == labels).mean()),
        float(np.asarray(cumulative_cost, np.float64)[routed.exits].mean()),
        counts / len(labels),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, over the last axis."""
    z = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Reliability:
    """Confidence against accuracy, of one exit or of a routing.

    Args:
      logits: `[N, C]`.
      labels: `[N]`.
      bins: of equal width in [0, 1].
    """
    confidence = softmax(logits).max(-1)
    correct = logits.argmax(-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            np.bincount(index, confidence, bins) / count,
            np.bincount(index, correct, bins) / count,
            count,
        )


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """`sum_b |accuracy_b - confidence_b| n_b / N` (Guo et al., ICML 2017,
    https://arxiv.org/abs/1706.04599)."""
    r = reliability(logits, labels, bins)
    full = r.count > 0
    gaps = np.abs(r.accuracy[full] - r.confidence[full])
    return float((gaps * r.count[full]).sum() / len(labels))


def overthinking(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How often the last exit is not needed, or does harm (Kaya, Hong, Dumitras, ICML 2019,
    https://arxiv.org/abs/1810.07052).

    Args:
      predictions: `[N, E]`.
      labels: `[N]`.

    Returns:
      `wasteful`: fraction of samples for which the last exit and an earlier one are correct.
      `destructive`: fraction for which the last exit is wrong and an earlier one is correct.
    """
    correct = predictions == labels[:, None]
    earlier = correct[:, :-1].any(1)
    return {
        "wasteful": float((earlier & correct[:, -1]).mean()),
        "destructive": float((earlier & ~correct[:, -1]).mean()),
    }


def first_correct(correct: np.ndarray) -> np.ndarray:
    """The oracle: the first correct exit of each sample, or the first exit if none is correct.

    It knows the labels, so it is a bound and not a policy. A sample without a correct exit is wrong
    wherever it leaves, so it leaves where that is cheapest.

    Args:
      correct: `[N, E]`, whether the answer at each exit is correct.

    Returns:
      `[N]` int exits.
    """
    return np.asarray(correct, bool).argmax(1)  # of a row of False: 0


def oracle_accuracy(correct: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """The highest accuracy that any choice of exits reaches at a mean cost of at most `budget`.

    Exact: all samples leave at the first exit, and the rest of the budget moves samples to their
    first correct exit, the cheapest moves first. Every move gains one sample, so no other order
    gains more.

    Args:
      correct: `[N, E]`, whether the answer at each exit is correct.
      cost: `[E]`, cumulative and increasing.
      budget: in the unit of `cost`.

    Raises:
      ValueError: if the budget is below the cost of leaving at the first exit, or the arrays do not
        fit.
    """
    correct, cost = np.asarray(correct, bool), np.asarray(cost, np.float64)
    if correct.ndim != 2 or not len(correct) or cost.shape != correct.shape[1:]:
        raise ValueError(f"correct {correct.shape}, cost {cost.shape}; give [N, E] and [E].")
    cost = check_costs(cost, len(cost))
    # The same slack for rounding as in the search for thresholds, which this bounds.
    budget = budget * (1 + 1e-9)
    if not budget >= cost[0]:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the first exit costs {cost[0]:.4g} already; "
            "give at least that."
        )
    extra = np.sort(cost[first_correct(correct[correct.any(1)])] - cost[0])
    total = len(correct) * cost[0] + np.cumsum(extra)
    return float((total <= len(correct) * budget).sum() / len(correct))


def random_at_equal_rates(correct: np.ndarray, fractions: np.ndarray) -> float:
    """Expected accuracy if exits are drawn at random at the given rates: `sum_e f_e acc_e`.

    A policy is informed by its samples only if it is more accurate, at equal mean cost.

    Args:
      correct: `[N, E]`, whether the answer at each exit is correct.
      fractions: `[E]`, with sum 1, as `Outcome.exit_fractions`.

    Raises:
      ValueError: if the fractions do not fit or do not add up to 1.
    """
    f = np.asarray(fractions, np.float64)
    if f.shape != np.shape(correct)[1:] or not (f >= 0).all() or not abs(f.sum() - 1) < 1e-6:
        raise ValueError(
            f"fractions {f.tolist()} for correct {np.shape(correct)}; give one for each exit, with "
            "sum 1."
        )
    return float(f @ np.asarray(correct, np.float64).mean(0))


def exit_fractions_by_class(
    exits: np.ndarray, labels: np.ndarray, classes: int, num_exits: int
) -> np.ndarray:
    """The distribution over exits of the samples of each class.

    Args:
      exits: `[N]` int, 0-based.
      labels: `[N]` int.
      classes: C.
      num_exits: E.

    Returns:
      `[C, E]`; a row adds up to 1, and is NaN for a class without samples.

    Raises:
      ValueError: if there are not as many exits as labels, or one is out of range.
    """
    e, y = np.asarray(exits, np.int64), np.asarray(labels, np.int64)
    if e.ndim != 1 or e.shape != y.shape:
        raise ValueError(f"exits {e.shape}, labels {y.shape}; give [N] and [N].")
    for name, values, bound in (("exits", e, num_exits), ("labels", y, classes)):
        if ((values < 0) | (values >= bound)).any():
            raise ValueError(
                f"{name} from {values.min()} to {values.max()}; give 0 to {bound - 1}."
            )
    counts = np.bincount(y * num_exits + e, minlength=classes * num_exits)
    counts = counts.reshape(classes, num_exits)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def agreement_matrix(values: np.ndarray) -> np.ndarray:
    """The fraction of samples on which two policies agree, for each pair of P policies, `[P, P]`.

    Args:
      values: `[P, N]`, exits or predictions.

    Raises:
      ValueError: if the shape is another, or there are no samples.
    """
    v = np.asarray(values)
    if v.ndim != 2 or not v.size:
        raise ValueError(f"values {v.shape}; give [policies, samples].")
    return np.stack([(v == row).mean(1) for row in v])


def curve_at(
    costs: ArrayLike,
    accuracies: ArrayLike,
    at: ArrayLike,
) -> np.ndarray:
    """The accuracy of a cost curve at other costs, by linear interpolation between its points.

    It brings curves of several seeds, whose points have different costs, to one grid. Beyond the
    most expensive point the accuracy is constant: a larger budget need not be spent. Of points of
    equal cost the best counts.

    Args:
      costs: `[K]`, in any order.
      accuracies: `[K]`.
      at: costs, of any shape.

    Returns:
      Accuracies of the shape of `at`.

    Raises:
      ValueError: if a cost is below the cheapest point, where there is no curve, or the arrays do
        not fit.
    """
    x, y = _curve(costs, accuracies)
    at = np.asarray(at, np.float64)
    if not (at >= x[0]).all():
        raise ValueError(
            f"the curve at a cost of {at.min():.4g}; its cheapest point costs {x[0]:.4g}; "
            "start there or above."
        )
    x, position = np.unique(x, return_inverse=True)
    best = np.full(len(x), -np.inf)
    np.maximum.at(best, position, y)
    return np.interp(at, x, best)


def area_under_curve(
    costs: ArrayLike,
    accuracies: ArrayLike,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """Mean accuracy over a range of costs: the area by the trapezoidal rule, divided by its width.

    Curves are comparable over a common range only; the default is the whole range of the curve.

    Args:
      costs: `[K]`, in any order.
      accuracies: `[K]`.
      low: where the range begins; the cheapest point by default.
      high: where it ends; the most expensive point by default; beyond it accuracy is constant.

    Raises:
      ValueError: if the range begins below the cheapest point or ends before it begins, or the
        arrays do not fit.
    """
    x, y = _curve(costs, accuracies)
    ends = np.array([x[0] if low is None else low, x[-1] if high is None else high], np.float64)
    if not ends[0] <= ends[1]:
        raise ValueError(f"a range from {ends[0]:.4g} to {ends[1]:.4g}; give low <= high.")
    values = curve_at(x, y, ends)
    if ends[0] == ends[1]:
        return float(values[0])
    inside = (x >= ends[0]) & (x <= ends[1])
    x = np.concatenate([ends[:1], x[inside], ends[1:]])
    y = np.concatenate([values[:1], y[inside], values[1:]])
    return float(np.trapezoid(y, x) / (ends[1] - ends[0]))


def _curve(costs: ArrayLike, accuracies: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies in float64, in order of cost."""
    x, y = np.asarray(costs, np.float64), np.asarray(accuracies, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"costs {x.shape}, accuracies {y.shape}; give [K] of both.")
    order = np.argsort(x, kind="stable")
    return x[order], y[order]
