"""What a trace and a routing are worth: accuracy, cost, calibration, overthinking, and what the
oracle, chance and other policies make of the same trace."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from eejax.evaluation.routing import Routed


class Reliability(NamedTuple):
    """Confidence against accuracy in equal bins of confidence; each field is `[bins]`.

    Attributes:
      confidence: mean of the bin, NaN where it is empty.
      accuracy: fraction right, NaN where the bin is empty.
      count: samples in the bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


class Outcome(NamedTuple):
    """What a routing came to.

    Attributes:
      accuracy: fraction right.
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
      cumulative_cost: `[E]`, the cost of leaving at each exit, heads on the way counted.
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
    """Confidence against accuracy of one exit, or of a routed answer.

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
    """`sum_b |accuracy_b - confidence_b| n_b / N` (Guo et al., ICML 2017)."""
    r = reliability(logits, labels, bins)
    full = r.count > 0
    gaps = np.abs(r.accuracy[full] - r.confidence[full])
    return float((gaps * r.count[full]).sum() / len(labels))


def overthinking(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How often the last exit was not needed, or did harm (Kaya, Hong, Dumitras, ICML 2019,
    https://arxiv.org/abs/1810.07052).

    Args:
      predictions: `[N, E]`.
      labels: `[N]`.

    Returns:
      `wasteful`: fraction of samples that the last exit gets right and an earlier one did too.
      `destructive`: fraction that the last exit gets wrong and an earlier one got right.
    """
    correct = predictions == labels[:, None]
    earlier = correct[:, :-1].any(1)
    return {
        "wasteful": float((earlier & correct[:, -1]).mean()),
        "destructive": float((earlier & ~correct[:, -1]).mean()),
    }


def first_correct(correct: np.ndarray) -> np.ndarray:
    """The oracle: the first exit that gets each sample right; the first, where none does.

    It knows the labels, so it is a bound and no policy. A sample that no exit gets right is wrong
    wherever it leaves, and leaves where that is cheapest.

    Args:
      correct: `[N, E]`, whether the answer at each exit is right.

    Returns:
      `[N]` int exits.
    """
    return np.asarray(correct, bool).argmax(1)  # of a row of False: 0


def oracle_accuracy(correct: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """The highest accuracy that any choice of exits reaches at a mean cost of at most `budget`.

    Exact: all leave at the first exit, and what the budget still pays for sends samples on to the
    first exit that gets them right, the cheapest of these moves first. Each is worth one sample, so
    no other order buys more.

    Args:
      correct: `[N, E]`, whether the answer at each exit is right.
      cost: `[E]`, cumulative and increasing.
      budget: in the unit of `cost`.

    Raises:
      ValueError: a budget under the cost of leaving at the first exit, or arrays that do not fit.
    """
    correct, cost = np.asarray(correct, bool), np.asarray(cost, np.float64)
    if correct.ndim != 2 or not len(correct) or cost.shape != correct.shape[1:]:
        raise ValueError(f"correct {correct.shape}, cost {cost.shape}; give [N, E] and [E].")
    if not (np.diff(cost) >= 0).all() or not (cost > 0).all():
        raise ValueError(f"costs {cost.tolist()}; give cumulative costs, positive and increasing.")
    # The same slack for rounding as in the search for thresholds, which this is a bound for.
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
    """Expected accuracy where exits are drawn at random at the given rates: `sum_e f_e acc_e`.

    What a policy must beat to know anything of its samples, at equal mean cost.

    Args:
      correct: `[N, E]`, whether the answer at each exit is right.
      fractions: `[E]`, adding up to 1, as `Outcome.exit_fractions`.

    Raises:
      ValueError: fractions that do not fit or do not add up to 1.
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
    """Where the samples of each class leave.

    Args:
      exits: `[N]` int, 0-based.
      labels: `[N]` int.
      classes: C.
      num_exits: E.

    Returns:
      `[C, E]`, rows that add up to 1, or NaN for a class of which there is no sample.

    Raises:
      ValueError: not as many exits as labels, or one out of range.
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


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Fraction of samples of which two policies say the same.

    Args:
      a: `[N]`, exits or answers.
      b: `[N]`, the same of another policy.

    Raises:
      ValueError: not as many of both, or none.
    """
    if np.ndim(a) != 1 or np.shape(a) != np.shape(b) or not len(a):
        raise ValueError(f"values {np.shape(a)} and {np.shape(b)}; give [N] of both.")
    return float((np.asarray(a) == np.asarray(b)).mean())


def agreement_matrix(values: np.ndarray) -> np.ndarray:
    """`agreement` of each of P policies with each other, `[P, P]`.

    Args:
      values: `[P, N]`, exits or answers.

    Raises:
      ValueError: another shape, or no samples.
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
    """A cost curve's accuracy at other costs, on straight lines between its points.

    So curves of several seeds, whose points lie at different costs, come to one grid. Beyond the
    dearest point the accuracy stays: a larger budget need not be spent. Of points of equal cost the
    best counts.

    Args:
      costs: `[K]`, in any order.
      accuracies: `[K]`.
      at: costs, of any shape.

    Returns:
      Accuracies of the shape of `at`.

    Raises:
      ValueError: a cost below the cheapest point, where there is no curve; arrays that do not fit.
    """
    x, y = _curve(costs, accuracies)
    wanted = np.asarray(at, np.float64)
    if not (wanted >= x[0]).all():
        raise ValueError(
            f"the curve at a cost of {wanted.min():.4g}; its cheapest point costs {x[0]:.4g}; "
            "start there or above."
        )
    x, position = np.unique(x, return_inverse=True)
    best = np.full(len(x), -np.inf)
    np.maximum.at(best, position, y)
    return np.interp(wanted, x, best)


def area_under_curve(
    costs: ArrayLike,
    accuracies: ArrayLike,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """Mean accuracy over a range of costs: the area by trapezes, divided by its width.

    Curves are comparable over a common range only; each curve's own is the default.

    Args:
      costs: `[K]`, in any order.
      accuracies: `[K]`.
      low: where the range begins; the cheapest point by default.
      high: where it ends; the dearest point by default, beyond which the accuracy stays.

    Raises:
      ValueError: a range that begins below the cheapest point or ends before it begins; arrays that
        do not fit.
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
