"""Whether a difference in accuracy is more than chance: the paired bootstrap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Accuracy of one scheme minus that of another, as fractions: 0.01 is one point.

    Attributes:
      mean: over seeds and samples.
      low: lower end of the interval.
      high: upper end of the interval.
      p: two-sided p-value of "no difference"; not corrected for several comparisons.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    seed: int,
    draws: int = 20_000,
    level: float = 0.95,
    comparisons: int = 1,
) -> Difference:
    """Difference in accuracy of two schemes on the same test samples over the same training seeds.

    Each draw resamples the test samples and, independently, the seeds, with replacement. A drawn
    sample brings the answers of both schemes for every seed, a drawn seed those for every sample.
    The interval lies between quantiles of the draws, and p is twice the smaller share of draws on
    one side of zero.

    A single seed is not resampled: the interval is then about these two trained networks, on new
    samples. Resampling S seeds sees only (S - 1) / S of the variance between them, two thirds for
    three, and three seeds say little about the next one. Where a seed moves the difference as a
    whole, the interval is too narrow; where seeds move single samples only, resampling both ways
    counts that noise more than once and the interval is too wide (Owen, Annals of Applied
    Statistics 2007, https://doi.org/10.1214/07-AOAS122). Report the difference of each seed beside
    it.

    Args:
      correct_a: `[S, N]`, whether the first scheme is correct, by training seed and test sample.
      correct_b: `[S, N]`, the same for the second scheme, on the same samples and seeds.
      seed: of the resampling.
      draws: of the bootstrap; p is never below 2 / (draws + 1).
      level: of the interval.
      comparisons: how many intervals have to hold together at that level; each has the level
        `1 - (1 - level) / comparisons` (Bonferroni).

    Returns:
      `a - b`; exchanging the schemes gives the negative, whatever the seed.

    Raises:
      ValueError: if the arrays do not fit, the level is outside (0, 1), or the draws are too few
        for it.
    """
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"correct_a {a.shape}, correct_b {b.shape}; give [seeds, samples] of both."
        )
    if not 0 < level < 1 or comparisons < 1:
        raise ValueError(
            f"a level of {level} for {comparisons} comparisons; give one in (0, 1), and at least 1."
        )
    tail = (1 - level) / comparisons / 2
    if draws * tail < 1:
        raise ValueError(
            f"{draws} draws leave none beyond an interval with {tail:.2g} on each side; give at "
            f"least {int(np.ceil(1 / tail))}."
        )
    d = a.astype(np.int64) - b
    # The draws are for the difference whose first nonzero entry is positive.
    sign = int(d.flat[(d != 0).argmax()]) or 1
    sums = sign * _resampled(sign * d, np.random.default_rng(seed), draws)
    low, high = np.quantile(sums, [tail, 1 - tail]) / d.size
    beyond = min((sums <= 0).sum(), (sums >= 0).sum())
    p = min(1.0, 2 * (int(beyond) + 1) / (draws + 1))
    return Difference(float(d.mean()), float(low), float(high), p)


def _resampled(d: np.ndarray, random: np.random.Generator, draws: int) -> np.ndarray:
    """`[draws]` int, sums of `d` `[S, N]` over samples and seeds drawn with replacement.

    Once the seeds are drawn, a sample adds a whole number in [-S, S]. So instead of indices, the
    counts of these few numbers are drawn, for all draws at once that drew the seeds equally often.
    """
    seeds, samples = d.shape
    patterns, counts = np.unique(d, axis=1, return_counts=True)
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    weights, repeats = np.unique(drawn, axis=0, return_counts=True)
    values = np.arange(-seeds, seeds + 1)
    sums = []
    for weight, repeat in zip(weights, repeats, strict=True):
        count = np.bincount(weight @ patterns + seeds, counts, len(values))
        nonzero = np.flatnonzero(count)
        draw = random.multinomial(samples, count[nonzero] / samples, repeat)
        sums.append(draw @ values[nonzero])
    return np.concatenate(sums)
