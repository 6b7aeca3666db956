"""Differences in accuracy: against a bootstrap by indices, and over many draws of the truth."""

from __future__ import annotations

import numpy as np
import pytest

from eejax.evaluation.significance import paired_bootstrap


def answers(seed, seeds, samples, gain=0.2):
    """Two schemes, correct where a sample is easy enough; most samples are so for both."""
    random = np.random.default_rng(seed)
    easy = random.normal(size=samples)
    a, b = random.normal(scale=0.5, size=(2, seeds, samples))
    return easy + a + gain > -1, easy + b > -1


def by_indices(correct_a, correct_b, seed, draws):
    """The bootstrap as it is defined: which samples and which seeds, drawn for every draw."""
    random = np.random.default_rng(seed)
    seeds, samples = correct_a.shape
    d = correct_a.astype(float) - correct_b
    means = []
    for _ in range(draws):
        rows = random.integers(0, seeds, seeds)
        means.append(d[rows][:, random.integers(0, samples, samples)].mean())
    return np.array(means)


@pytest.mark.parametrize("seeds", [1, 2, 3, 7])
def test_the_distribution_is_that_of_resampled_indices(seeds):
    a, b = answers(seeds, seeds, 1000)
    slow = by_indices(a, b, 0, 4000)
    for level in (0.5, 0.8, 0.95):
        fast = paired_bootstrap(a, b, 1, level=level)
        ends = np.quantile(slow, [(1 - level) / 2, (1 + level) / 2])
        # Some Monte-Carlo errors of a quantile from 4,000 draws.
        np.testing.assert_allclose([fast.low, fast.high], ends, atol=0.15 * slow.std())
    assert fast.mean == pytest.approx(a.mean() - b.mean())
    assert fast.p == pytest.approx(2 * min((slow <= 0).mean(), (slow >= 0).mean()), abs=0.03)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Two trained networks on new samples: 300 test sets, one correct 5 % more often."""
    both, only_a, only_b = 0.7, 0.15, 0.1
    held, significant = 0, 0
    for seed in range(300):
        kinds = np.random.default_rng(seed).choice(4, 500, p=[both, only_a, only_b, 0.05])
        result = paired_bootstrap(kinds[None] < 2, (kinds[None] % 2) == 0, seed, draws=2000)
        held += result.low <= only_a - only_b <= result.high
        significant += result.p <= 0.05
        # The p-value and the interval tell the same, but for draws at the very border.
        assert (result.p <= 0.05) == (result.low > 0 or result.high < 0) or (
            abs(result.p - 0.05) < 0.01
        )
    assert 0.91 <= held / 300 <= 0.98  # 0.95, three standard errors either way
    assert 0.6 <= significant / 300 <= 0.95


def test_a_seed_that_moves_everything_widens_the_interval():
    """Each seed's networks differ by a great deal, and the samples not at all."""
    correct_b = np.ones((3, 400), bool)
    correct_a = np.repeat([[True], [True], [False]], 400, 1)
    result = paired_bootstrap(correct_a, correct_b, 0)
    assert result[:3] == (pytest.approx(-1 / 3), -1, 0)
    # No difference is drawn where only the first two seeds are, with probability (2 / 3)^3.
    assert result.p == pytest.approx(2 * 8 / 27, abs=0.02)
    alone = paired_bootstrap(correct_a[:1], correct_b[:1], 0)
    assert alone == (0, 0, 0, 1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_schemes_do_not_differ(seeds):
    a, _ = answers(0, seeds, 200)
    assert paired_bootstrap(a, a, 0) == (0, 0, 0, 1)


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_exchanging_the_schemes_gives_the_negative(gain):
    a, b = answers(4, 3, 500, gain)
    one, other = paired_bootstrap(a, b, 0), paired_bootstrap(b, a, 0)
    expected = (-other.mean, -other.high, -other.low, other.p)
    np.testing.assert_allclose(one, expected, atol=1e-12)


def test_a_large_difference_and_its_smallest_p_value():
    a, b = answers(0, 3, 2000, gain=1.0)
    result = paired_bootstrap(a, b, 0, draws=999)
    assert 0 < result.low < result.mean < result.high
    assert result.p == 2 / 1000
    assert paired_bootstrap(a, b, 0, draws=999) == result


def test_intervals_that_hold_together_are_wider():
    a, b = answers(0, 3, 500)
    one, ten = (paired_bootstrap(a, b, 0, comparisons=m) for m in (1, 10))
    assert ten.low < one.low < one.high < ten.high
    assert (ten.mean, ten.p) == (one.mean, one.p)
    alone = paired_bootstrap(a, b, 0, level=0.995)
    np.testing.assert_allclose(ten, alone)


def test_what_cannot_be_compared_is_refused():
    a, b = answers(0, 3, 50)
    with pytest.raises(ValueError, match=r"correct_a \(3, 50\), correct_b \(2, 50\)"):
        paired_bootstrap(a, b[:2], 0)
    with pytest.raises(ValueError, match=r"give \[seeds, samples\] of both"):
        paired_bootstrap(a[0], b[0], 0)
    with pytest.raises(ValueError, match="a level of 95 for 1 comparisons"):
        paired_bootstrap(a, b, 0, level=95)
    with pytest.raises(ValueError, match=r"a level of 0\.95 for 0 comparisons"):
        paired_bootstrap(a, b, 0, comparisons=0)
    with pytest.raises(ValueError, match=r"100 draws leave none.* at least 400"):
        paired_bootstrap(a, b, 0, draws=100, comparisons=10)
