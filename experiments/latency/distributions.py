"""Distributions of exits: the share of the images that leaves at each exit, and how to impose it.

A distribution is `trained` (a run's thresholds, or the rates given for a random network), `first`,
`last`, `uniform`, or the share of each exit as numbers with commas between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NAMED = ("trained", "first", "last", "uniform")


def exit_rates(name: str, exits: int, trained: Sequence[float] | None = None) -> tuple[float, ...]:
    """The share of the images that leaves at each exit, `[E]`.

    Args:
      name: a distribution.
      exits: E.
      trained: the rates of `trained`. Default: 0.4 0.25 0.15 0.2 for four exits, else each exit
        0.6 of the one before.

    Raises:
      ValueError: if `name` is no distribution, if it has not E rates, or if they are negative or do
        not add up to 1.
    """
    if name == "first":
        return (1.0, *[0.0] * (exits - 1))
    if name == "last":
        return (*[0.0] * (exits - 1), 1.0)
    if name == "uniform":
        return (1 / exits,) * exits
    if name == "trained" and trained is None:
        if exits == 4:
            return (0.4, 0.25, 0.15, 0.2)
        falling = [0.6**e for e in range(exits)]
        return tuple(f / sum(falling) for f in falling)
    try:
        rates = tuple(trained or ()) if name == "trained" else tuple(map(float, name.split(",")))
    except ValueError:
        raise ValueError(
            f"distributions: {name!r} is none; give {', '.join(NAMED)}, or the share of each exit "
            "as numbers with commas between them."
        ) from None
    if len(rates) != exits:
        raise ValueError(f"rates {name!r}: {len(rates)} for {exits} exits; give one for each.")
    if not all(r >= 0 for r in rates) or not math.isclose(sum(rates), 1, abs_tol=1e-6):
        raise ValueError(
            f"rates {name!r} add up to {sum(rates):g}; give shares of at least 0 that add up to 1."
        )
    return rates


def exit_counts(rates: Sequence[float], count: int) -> np.ndarray:
    """Rates `[E]` as whole numbers `[E]` that add up to `count`; largest remainders round up."""
    exact = np.asarray(rates) * count
    # Rounded first, since 0.3 * 10 must not count as a little under 3.
    whole = np.floor(np.round(exact, 6)).astype(int)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: count - whole.sum()]] += 1
    return whole


def imposed_thresholds(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Thresholds `[E - 1]` with which `counts[e]` of these samples leave at exit e.

    A threshold lies half-way between two scores, where another program's rounding does not reach
    it. Of samples with equal scores, all leave or none.

    Args:
      scores: `[N, E]`.
      counts: `[E]`, adding up to N.
    """
    thresholds = np.full(scores.shape[1] - 1, np.inf, np.float32)
    active = np.asarray(scores, np.float32)
    for e, count in enumerate(counts[:-1]):
        # A score that is NaN never reaches a threshold.
        falling = np.sort(np.nan_to_num(active[:, e], nan=-np.inf))[::-1]
        if count >= len(falling):
            thresholds[e] = -np.inf
        elif count:
            low, high = falling[count], falling[count - 1]
            middle = np.float32((float(low) + float(high)) / 2)
            thresholds[e] = middle if middle > low else high
        active = active[~(active[:, e] >= thresholds[e])]
    return thresholds
