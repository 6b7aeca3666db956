"""p-values and intervals: against slow references, and valid over thousands of draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from eejax.selection import bounds
from eejax.selection.bounds import betting, conformal, fixed_sequence, hoeffding_bentkus, interval

DRAWS = 4000

# Sampler of losses in [0, 1], and their mean.
DISTRIBUTIONS = {
    "rare errors": (lambda r, shape: (r.random(shape) < 0.05).astype(float), 0.05),
    "errors": (lambda r, shape: (r.random(shape) < 0.3).astype(float), 0.3),
    "three values": (lambda r, shape: r.choice([0.0, 0.25, 1.0], shape, p=[0.6, 0.3, 0.1]), 0.175),
    "uniform": (lambda r, shape: r.random(shape), 0.5),
    "costs close together": (lambda r, shape: r.beta(40, 60, shape), 0.4),
    "mostly large": (lambda r, shape: 1 - 0.2 * (r.random(shape) < 0.05), 0.99),
}

METHODS = {
    "betting": betting,
    "hoeffding_bentkus": lambda losses, risk: hoeffding_bentkus(
        losses.mean(-1), losses.shape[-1], risk
    ),
}


def at_most(rate, draws=DRAWS):
    """The most of `draws` that an event of that probability reaches, but for one time in 1000."""
    return stats.binom.ppf(0.999, draws, rate) / draws


def slow_hoeffding_bentkus(mean, n, risk):
    if mean >= risk:
        divergence = 0.0
    else:
        divergence = (1 - mean) * math.log((1 - mean) / (1 - risk))
        divergence += mean * math.log(mean / risk) if mean > 0 else 0.0
    most = math.ceil(round(n * mean, 6))
    tail = sum(math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(most + 1))
    return min(1.0, math.exp(-n * divergence), math.e * tail)


def slow_betting(losses, risk, delta):
    capital = largest = 1.0
    mean, variance = 0.5, 0.25
    for i, loss in enumerate(losses):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)))
        capital *= 1 + bet * (risk - loss)
        largest = max(largest, capital)
        seen = losses[: i + 1]
        means = [(0.5 + sum(seen[: j + 1])) / (j + 2) for j in range(i + 1)]
        mean = means[-1]
        squares = sum((x - m) ** 2 for x, m in zip(seen, means, strict=True))
        variance = (0.25 + squares) / (i + 2)
    assert 0 < mean < 1
    return 1 / largest


@pytest.mark.parametrize("n", [1, 7, 50, 300])
def test_hoeffding_bentkus_is_the_formula(n):
    # Sums that are whole numbers, where a rounding error would count one loss too many, and others.
    means = np.concatenate([np.arange(n + 1) / n, np.random.default_rng(n).random(20)])
    for risk in (0.03, 0.1, 0.7):
        slow = [slow_hoeffding_bentkus(float(m), n, risk) for m in means]
        np.testing.assert_allclose(hoeffding_bentkus(means, n, risk), slow, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("seed", [0, 1])
def test_betting_is_the_game(seed):
    random = np.random.default_rng(seed)
    losses = np.stack([random.random((2, 40)) * 0.3, random.random((2, 40)) < 0.1]).astype(float)
    for risk, delta in [(0.2, 0.1), (0.5, 0.01)]:
        slow = [[slow_betting(list(map(float, x)), risk, delta) for x in two] for two in losses]
        np.testing.assert_allclose(betting(losses, risk, delta), slow, rtol=1e-10)
    assert betting(losses[0, 0], 0.5) < 1e-2, "and the capital does grow"


def test_betting_does_not_overflow():
    p = betting(np.zeros(200_000), 0.9)
    assert 0 <= p < 1e-300


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_p_values_at_the_boundary_are_small_only_so_often(name, method):
    draw, mean = DISTRIBUTIONS[name]
    losses = draw(np.random.default_rng(3), (DRAWS, 120))
    p = METHODS[method](losses, mean)
    for level in (0.01, 0.05, 0.1, 0.3):
        assert (p <= level).mean() <= at_most(level)


def test_a_p_value_that_is_too_small_is_found_out():
    """The normal approximation, the usual shortcut, does not pass where losses are rare."""
    losses = DISTRIBUTIONS["rare errors"][0](np.random.default_rng(3), (DRAWS, 120))
    error = losses.std(-1) / math.sqrt(losses.shape[-1])
    with np.errstate(divide="ignore"):
        p = stats.norm.cdf((losses.mean(-1) - 0.05) / error)
    assert (p <= 0.05).mean() > at_most(0.05)


def test_means_well_below_the_limit_are_found():
    random = np.random.default_rng(4)
    errors = (random.random((200, 500)) < 0.1).astype(float)
    assert (betting(errors, 0.15) <= 0.1).mean() > 0.9
    assert (METHODS["hoeffding_bentkus"](errors, 0.15) <= 0.1).mean() > 0.9
    # Only one of the two sees that these losses are all close to their mean.
    costs = random.beta(40, 60, (200, 200))
    assert (betting(costs, 0.43) <= 0.1).mean() > 0.9
    assert (METHODS["hoeffding_bentkus"](costs, 0.43) <= 0.1).mean() < 0.1


def test_fixed_sequence_stops_at_the_first_that_is_not_rejected():
    p = np.array([[0.01, 0.1, 0.2, 0.0], [0.11, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(fixed_sequence(p, 0.1), [2, 0, 4])


def test_conformal_counts_what_was_lost_before_and_the_new_sample():
    # Sample 1 loses at candidate 1 alone, and is charged for it ever after.
    losses = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0.5, 0, 0], [0, 0.5, 0, 1]])
    # (0 + 1) / 5, (1 + 1) / 5, (1.5 + 1) / 5, (2.5 + 1) / 5
    assert [int(conformal(losses, r)) for r in (0.19, 0.2, 0.39, 0.4, 0.5, 0.69, 0.7)] == [
        *(0, 1, 1, 2, 3, 3, 4),
    ]
    np.testing.assert_array_equal(conformal(np.stack([losses, 0 * losses]), 0.4), [2, 4])


def true_risk(counts, risks):
    """`[draws]`, of the last candidate that passed; where none did nothing is lost."""
    return np.where(counts > 0, risks[np.maximum(counts - 1, 0)], 0.0)


def assert_on_average(risks, limit):
    assert risks.mean() <= limit + 3.1 * risks.std() / math.sqrt(len(risks))


def test_conformal_needs_its_one_more_sample():
    """A loss that grows along a fine path: what is kept is tight, and without the 1 broken."""
    random = np.random.default_rng(7)
    risks, n, limit = np.arange(100) / 100, 20, 0.1
    losses = random.random((1000, 1, n)) < risks[:, None]
    kept = true_risk(conformal(losses, limit), risks)
    assert_on_average(kept, limit)
    assert kept.mean() > 0.08
    without = (losses.sum(-1) / n <= limit).sum(-1)
    with pytest.raises(AssertionError):
        assert_on_average(true_risk(without, risks), limit)


def test_conformal_needs_its_running_maximum():
    """A loss that does not grow: of many candidates, all too bold, some look good by chance."""
    random = np.random.default_rng(8)
    risks, n, limit = np.append(0.0, np.full(40, 0.13)), 50, 0.1
    losses = random.random((1000, 41, n)) < risks[:, None]
    assert_on_average(true_risk(conformal(losses, limit), risks), limit)
    passed = (losses.sum(-1) + 1) / (n + 1) <= limit
    boldest = 41 - passed[:, ::-1].argmax(1)
    with pytest.raises(AssertionError):
        assert_on_average(true_risk(boldest, risks), limit)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_intervals_hold_the_mean(name):
    draw, mean = DISTRIBUTIONS[name]
    losses = draw(np.random.default_rng(5), (1000, 150))
    low, high = interval(losses, 0.8)
    assert ((low <= losses.mean(-1)) & (losses.mean(-1) <= high)).all()
    assert (mean < low).mean() <= at_most(0.1, 1000)
    assert (mean > high).mean() <= at_most(0.1, 1000)


def test_an_interval_is_where_betting_does_not_reject():
    losses = np.random.default_rng(6).beta(2, 3, 200)
    low, high = (float(limit) for limit in interval(losses, 0.9))
    assert betting(losses, high + 1e-6, 0.05) <= 0.05 < betting(losses, high - 1e-6, 0.05)
    assert betting(1 - losses, 1 - low + 1e-6, 0.05) <= 0.05
    assert betting(1 - losses, 1 - low - 1e-6, 0.05) > 0.05
    assert 0 < high - low < 0.1
    wide_low, wide_high = interval(losses, 0.99)
    assert wide_low < low < high < wide_high
    assert interval(np.array([0.5]), 0.9) == (0.0, 1.0), "one sample says next to nothing"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: betting([0.5, 1.5], 0.1), r"losses from 0.5 to 1.5; give numbers in \[0, 1\]"),
        (lambda: betting([0.5, np.nan], 0.1), "losses from nan to nan; give"),
        (lambda: betting(np.zeros((3, 0)), 0.1), r"losses of shape \(3, 0\); give .* at least one"),
        (lambda: betting([0.5], 1.0), "a risk of 1.0; give a number between 0 and 1"),
        (lambda: betting([0.5], 0.1, 0.0), "a delta of 0.0; give a number between 0 and 1"),
        (lambda: hoeffding_bentkus(-0.1, 10, 0.1), "mean losses from -0.1 to -0.1; give"),
        (lambda: hoeffding_bentkus(0.1, 0, 0.1), "0 samples; give at least one"),
        (lambda: hoeffding_bentkus(0.1, 10, 0.0), "a risk of 0.0; give"),
        (lambda: interval([0.1, 0.2], 90), "a confidence of 90; give a number between 0 and 1"),
        (lambda: fixed_sequence(np.zeros(3), 1.5), "a delta of 1.5; give"),
        (lambda: conformal(np.zeros((2, 3)), 0.0), "a risk of 0.0; give"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_binomial_p_value_is_valid_and_certifies_more_for_losses_of_0_and_1():
    """At 2,000 samples: falsely as often as delta says at most, truly more often than others."""
    n, risk, delta = 2000, 0.05, 0.1
    counts = np.arange(n + 1)
    losses = (np.arange(n) < counts[:220, None]).astype(np.float64)
    exact = bounds.binomial(losses, risk)
    assert (exact <= bounds.hoeffding_bentkus(losses.mean(-1), n, risk) * (1 + 1e-9)).all()
    certified = counts[:220][exact <= delta].max()
    # The chance of a false certificate at the limit itself, and of a true one below it.
    assert 0.08 < stats.binom.cdf(certified, n, risk) <= delta
    assert stats.binom.cdf(certified, n, 0.04) > 0.8
    other = bounds.hoeffding_bentkus(losses.mean(-1), n, risk)
    assert stats.binom.cdf(counts[:220][other <= delta].max(), n, 0.04) < 0.7


def test_the_binomial_p_value_is_refused_for_other_losses():
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        bounds.binomial(np.array([0.0, 0.5, 1.0]), 0.1)
