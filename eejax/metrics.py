"""What a trace and a routing are worth: accuracy, cost, calibration, overthinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eejax.routing import Routed


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
    right = logits.argmax(-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            np.bincount(index, confidence, bins) / count,
            np.bincount(index, right, bins) / count,
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
    right = predictions == labels[:, None]
    earlier = right[:, :-1].any(1)
    return {
        "wasteful": float((earlier & right[:, -1]).mean()),
        "destructive": float((earlier & ~right[:, -1]).mean()),
    }


def area_under_curve(costs: Sequence[float], accuracies: Sequence[float]) -> float:
    """Mean accuracy over a cost curve's range: its area by trapezes, divided by its width."""
    order = np.argsort(costs, kind="stable")
    x, y = np.asarray(costs, np.float64)[order], np.asarray(accuracies, np.float64)[order]
    width = x[-1] - x[0]
    return float(np.trapezoid(y, x) / width) if width > 0 else float(y.max())
