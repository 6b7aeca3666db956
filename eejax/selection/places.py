"""Where a threshold can lie among held-out scores, and which samples it lets through.

A threshold lies halfway between two held-out scores, away from both, so that rounding in another
compiled program moves no held-out sample. `+inf` lets no sample through, `-inf` all.
"""

from __future__ import annotations

import numpy as np


def centred(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Thresholds that separate the samples in the same way, each halfway between two scores."""
    centred = thresholds.copy()
    active = np.ones(len(scores), bool)
    for e in range(len(thresholds)):
        descending = -np.sort(-scores[active, e])
        centred[e] = between(descending, int((descending >= thresholds[e]).sum()))
        active &= scores[:, e] < thresholds[e]
    return centred


def geometric(scores: np.ndarray, orders: list[np.ndarray], log_q: float) -> np.ndarray:
    """Thresholds with which exit e takes about a share `q^e` of the samples.

    Args:
      scores: `[N, E]`.
      orders: for each exit but the last, the samples from the highest score to the lowest.
      log_q: the logarithm of q.
    """
    n, exits = scores.shape
    power = log_q * np.arange(exits)
    share = np.exp(power - power.max())
    share = share / share.sum()
    thresholds = np.full(exits - 1, np.inf, np.float32)
    active = np.ones(n, bool)
    for e in range(exits - 1):
        order = orders[e]
        descending = scores[order[active[order]], e]
        at = edges(descending)
        thresholds[e] = between(descending, int(at[np.abs(at - share[e] * n).argmin()]))
        active &= scores[:, e] < thresholds[e]
    return thresholds


def edges(descending: np.ndarray) -> np.ndarray:
    """How many samples a threshold can let through: 0, all, and wherever the score changes."""
    n = len(descending)
    inner = np.flatnonzero(np.diff(descending)) + 1
    return np.concatenate([[0], inner, [n] if n else []]).astype(int)


def between(descending: np.ndarray, count: int) -> np.float32:
    """A threshold that lets exactly the first `count` through; `count` is one of `edges`."""
    if count == 0:
        return np.float32(np.inf)
    if count == len(descending):
        return np.float32(-np.inf)
    above, below = np.float32(descending[count - 1]), np.float32(descending[count])
    middle = np.float32((np.float64(above) + np.float64(below)) / 2)
    return middle if middle > below else above
