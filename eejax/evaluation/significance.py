"""Whether a difference in accuracy is more than chance: paired bootstrap, Holm, intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit


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


class Interval(NamedTuple):
    """A mean over seeds and where the mean over all seeds lies; NaN ends where one seed is all."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    seed: int,
    draws: int = 20_000,
    level: float = 0.95,
    comparisons: int = 1,
) -> Difference:
    """Difference in accuracy of two schemes on the same test samples over the same training seeds.

    Each draw resamples the test samples, and independently of them the seeds, with replacement; a
    sample keeps both schemes' answers of every seed, a seed those of every sample. The interval
    runs between quantiles of the draws, and p is twice the smaller share of draws on one side of
    zero.

    One seed is not resampled: the interval then is about these two trained networks alone, on new
    samples. Of a handful of seeds, resampling S of S sees only (S - 1) / S of the variance between
    them, two thirds for three, and three seeds say little about how far the next one may lie. Where
    seeds as such move the difference, the interval is too narrow; where they move single samples
    only, resampling both ways counts that noise more than once and it is too wide (Owen, Annals of
    Applied Statistics 2007, https://doi.org/10.1214/07-AOAS122). Beside it, give each seed's own
    difference.

    Args:
      correct_a: `[S, N]`, whether the first scheme is right, by training seed and test sample.
      correct_b: `[S, N]`, the same of the second, on the same samples; row s of the same seed.
      seed: of the resampling.
      draws: of the bootstrap; p is never below 2 / (draws + 1).
      level: of the interval.
      comparisons: how many intervals are to hold together at that level; each gets the level
        `1 - (1 - level) / comparisons` (Bonferroni). For p-values there is `holm`.

    Returns:
      `a - b`; exchanging them gives the negative, whatever the seed.

    Raises:
      ValueError: arrays that do not fit, a level outside (0, 1), or too few draws for it.
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
    # The draws are made for the difference that begins with a positive entry.
    sign = int(d.flat[(d != 0).argmax()]) or 1
    sums = sign * _resampled(sign * d, np.random.default_rng(seed), draws)
    low, high = np.quantile(sums, [tail, 1 - tail]) / d.size
    beyond = min((sums <= 0).sum(), (sums >= 0).sum())
    p = min(1.0, 2 * (int(beyond) + 1) / (draws + 1))
    return Difference(float(d.mean()), float(low), float(high), p)


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values that may each be compared with the level of all comparisons together.

    The k-th smallest of m is multiplied by m - k + 1, and is no smaller than those before it (Holm,
    Scandinavian Journal of Statistics 1979, https://www.jstor.org/stable/4615733). Nothing is
    assumed of how the tests depend on each other.

    Args:
      p_values: `[m]`.

    Returns:
      `[m]`, adjusted, in the order given.

    Raises:
      ValueError: not a list of numbers in [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values {p.tolist()}; give a list of numbers in [0, 1].")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def interval_over_seeds(values: ArrayLike) -> Interval:
    """Mean over training seeds with its 95 % interval by Student's t.

    Right for values that are about normal from seed to seed. With three seeds the ends are 2.5
    standard deviations away, with five 1.2.

    Args:
      values: `[S]`, one number a seed.

    Raises:
      ValueError: no values, or not a list of them.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not len(v):
        raise ValueError(f"values {v.shape}; give one number for each of at least one seed.")
    mean = float(v.mean())
    if len(v) == 1:
        return Interval(mean, np.nan, np.nan)
    half = float(stdtrit(len(v) - 1, 0.975) * v.std(ddof=1) / np.sqrt(len(v)))
    return Interval(mean, mean - half, mean + half)


def _resampled(d: np.ndarray, random: np.random.Generator, draws: int) -> np.ndarray:
    """`[draws]` int, sums of `d` `[S, N]` over samples and seeds drawn with replacement.

    With the seeds drawn, a sample adds a whole number in [-S, S]. So no index is drawn, but how
    often each of these few numbers comes, for all draws at once in which the seeds came equally
    often.
    """
    seeds, samples = d.shape
    patterns, times = np.unique(d, axis=1, return_counts=True)
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    weights, repeats = np.unique(drawn, axis=0, return_counts=True)
    values = np.arange(-seeds, seeds + 1)
    sums = []
    for weight, repeat in zip(weights, repeats, strict=True):
        count = np.bincount(weight @ patterns + seeds, times, len(values))
        some = np.flatnonzero(count)
        sums.append(random.multinomial(samples, count[some] / samples, repeat) @ values[some])
    return np.concatenate(sums)
