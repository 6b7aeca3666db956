"""Optimal stopping, against a dynamic program over all histories of a small problem."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_scheduler import COST, accuracy, agreement, evidence

from eejax import max_prob
from eejax.evaluation.routing import first_exit, score
from eejax.network import ExitOutput
from eejax.policies.optimal_stopping import PRICES, OptimalStoppingParams, fit, optimal_stopping
from eejax.policies.statistics import of_trace
from eejax.trace import Trace, recorded

# Each exit sees one more signal, which is the label in three of four cases; its logits are the log
# of the true odds. The second signal alone never changes the answer for the better.
EXITS, TRUTH = 4, 0.75
HISTORIES = list(itertools.product((1, -1), repeat=EXITS))
PRICE_OF_EACH = np.array([0.1, 0.3, 0.45, 1.0])


def probability(signals, label):
    return np.prod([TRUTH if s == label else 1 - TRUTH for s in signals])


def posterior(signals):
    a, b = probability(signals, 1), probability(signals, -1)
    return max(a, b) / (a + b)


@functools.cache
def gain(signals, price):
    """What going on gains over leaving after these signals, and the value of the better one."""
    here = posterior(signals) - price * PRICE_OF_EACH[len(signals) - 1]
    if len(signals) == EXITS:
        return -np.inf, here
    total = probability(signals, 1) + probability(signals, -1)
    onward = 0.0
    for s in (1, -1):
        after = (*signals, s)
        share = (probability(after, 1) + probability(after, -1)) / total
        onward += share * gain(after, price)[1]
    return onward - here, max(onward, here)


@functools.cache
def every_history():
    """A trace that holds every history and label as often as is likely: 10,240 samples."""
    logits, labels = [], []
    for signals, label in itertools.product(HISTORIES, (1, -1)):
        times = round(probability(signals, label) * 4**EXITS)
        evidence_ = np.log(TRUTH / (1 - TRUTH)) * np.cumsum(signals)
        logits += [np.stack([evidence_, 0 * evidence_], -1)] * times
        labels += [0 if label == 1 else 1] * times
    return recorded(np.repeat(logits, 20, 0), np.repeat(labels, 20))


@functools.cache
def fitted():
    return fit(every_history(), PRICE_OF_EACH)


@functools.cache
def scored():
    return score(optimal_stopping(fitted()), every_history())


def root(signals):
    """The price at which going on gains nothing, by bisection: the gain falls with the price."""
    low, high = -2.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(signals, middle)[0] > 0 else (low, middle)
    return low


def test_the_score_is_the_price_at_which_the_dynamic_program_is_indifferent():
    trace = every_history()
    signs = np.sign(np.diff(np.pad(trace.logits[..., 0], [(0, 0), (1, 0)]), axis=1)).astype(int)
    for row in np.unique(signs, axis=0):
        n = (signs == row).all(1).argmax()
        for e in range(EXITS - 1):
            exact = root(tuple(row[: e + 1].tolist()))
            # Between prices of the grid the gain is not straight; below it, the slope is a guess.
            if exact > 0:
                assert -scored().scores[n, e] == pytest.approx(exact, rel=0.04, abs=0.004)
            else:
                assert -scored().scores[n, e] < 0.004


@pytest.mark.parametrize("price", [*PRICES[1:-2:3], 0.05, 0.12, 0.2, 0.3, 0.5, 1.1])
def test_one_threshold_for_all_exits_earns_what_the_dynamic_program_does(price):
    trace = every_history()
    exits = first_exit(scored().scores, np.full(EXITS - 1, -price, np.float32))
    correct = (trace.logits.argmax(-1) == trace.labels[:, None])[np.arange(len(exits)), exits]
    best = (gain((1,), float(price))[1] + gain((-1,), float(price))[1]) / 2
    earned = correct.mean() - price * PRICE_OF_EACH[exits].mean()
    assert best - 2e-3 < earned < best + 1e-3


def test_it_looks_further_than_the_next_exit():
    """The second signal gains nothing by itself, and is worth its price for the third."""
    assert posterior((1,)) == pytest.approx((posterior((1, 1)) * 10 + posterior((1, -1)) * 6) / 16)
    assert gain((1,), 0.2)[0] > 0
    assert (scored().scores[:, 0] < -0.2).all()


@pytest.mark.parametrize(("budget", "better"), [(0.5, 0.04), (0.65, 0.06)])
def test_agreement_is_learned_where_it_tells_more_than_confidence(budget, better):
    learned = accuracy(optimal_stopping(fit(agreement(0, 1000), COST)), agreement, budget)
    assert learned > accuracy(max_prob, agreement, budget) + better


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_little_is_lost_where_confidence_tells_all(budget):
    learned = accuracy(optimal_stopping(fit(evidence(0, 1000), COST)), evidence, budget)
    assert learned > accuracy(max_prob, evidence, budget) - 0.005


def test_the_unit_of_the_cost_does_not_matter_and_answers_are_the_heads_own():
    trace = agreement(3, 500)
    for a, b in zip(fit(trace, COST), fit(trace, 1e6 * COST), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    policy = optimal_stopping(fit(trace, COST))
    np.testing.assert_array_equal(score(policy, trace).logits, trace.logits)


def test_gains_that_do_not_fall_give_finite_scores_in_the_order_of_the_gain():
    """Regressions may cross; and a score never ties where the gain differs."""
    weights = np.zeros((1, 4, 9), np.float32)
    weights[0, :, 1], weights[0, :, 0] = 1, [0.5, -0.2, 0.4, 0.1]
    zeros, ones = np.zeros((1, 8)), np.ones((1, 8))
    policy = optimal_stopping(
        OptimalStoppingParams(weights, zeros, ones, np.array([0, 0.1, 0.5, 2]), np.array([0.3]))
    )
    nats = np.expm1(np.linspace(0.6, 3, 61))
    logits = np.stack([np.log(np.expm1(nats)), np.zeros(61)], -1).astype(np.float32)
    output = ExitOutput(jnp.asarray(logits), jnp.zeros(61), ())
    scores = np.asarray(policy.step(output, policy.init(61), 0)[1])
    # The gain is the first statistic, so the score falls with it, at most by 1 / 0.3.
    assert (np.diff(scores) < 0).all()
    assert (np.diff(scores) >= -np.diff(np.log1p(nats)) / 0.3 - 1e-4).all()


def test_the_number_of_an_exit_may_be_traced():
    trace = agreement(4, 20)
    policy = optimal_stopping(fit(agreement(0, 500), COST))

    @jax.jit
    def step(logits, state, e):
        return policy.step(ExitOutput(logits, logits[:, 0], ()), state, e)

    state, expected = policy.init(20), score(policy, trace).scores
    for e in range(4):
        _, certainty, state = step(jnp.asarray(trace.logits[:, e]), state, jnp.int32(e))
        np.testing.assert_allclose(certainty, expected[:, e], rtol=1e-4, atol=1e-4)


def test_extreme_logits_have_finite_scores_and_nan_never_fires():
    extremes = [0, 1, -1, 104, 1e4, -1e4, 1e38, -3e38]
    logits = np.random.default_rng(7).choice(extremes, (1000, 4, 10))
    trace = recorded(logits, np.zeros(1000))
    policy = optimal_stopping(fit(agreement(0, 500), COST))
    assert np.isfinite(score(policy, trace).scores).all()
    # A split like that can be fitted, too, and one in which every answer is correct.
    assert all(np.isfinite(p).all() for p in fit(trace, COST))
    sure = recorded(np.tile(np.eye(10)[:1] * 9, (50, 4, 1)), np.zeros(50))
    assert all(np.isfinite(p).all() for p in fit(sure, [1, 1, 1, 1]))
    trace.logits[7, 0, 1] = np.nan
    assert np.isnan(score(policy, trace).scores[7, 0])


def test_what_does_not_fit_is_refused():
    trace, params = agreement(6, 100), fit(agreement(6, 100), COST)
    with pytest.raises(ValueError, match="give 4 cumulative costs"):
        fit(trace, COST[:3])
    with pytest.raises(ValueError, match="an empty trace"):
        fit(Trace(*(x[:0] for x in trace)), COST)
    with pytest.raises(ValueError, match="logits with NaN or infinity"):
        fit(trace._replace(logits=np.full_like(trace.logits, np.nan)), COST)
    with pytest.raises(ValueError, match=r"steps \(4,\); give \[E, K, 9\], \[E, 8\]"):
        optimal_stopping(params._replace(mean=params.mean[:, :3]))
    with pytest.raises(ValueError, match="give increasing prices and positive steps"):
        optimal_stopping(params._replace(prices=params.prices[::-1]))
    three = optimal_stopping(
        params._replace(
            **{name: getattr(params, name)[:3] for name in ("weights", "mean", "std", "steps")}
        )
    )
    with pytest.raises(ValueError, match="over 3 exits, and exit 4"):
        score(three, trace)


def test_statistics_tell_agreement_with_the_exits_before():
    said = np.array([[0, 0, 1, 0]])
    values = of_trace(recorded(5 * np.eye(2)[said], [0]))
    np.testing.assert_array_equal(values[:, 0, 3], [0, 1, 0, 0])
    np.testing.assert_allclose(values[:, 0, 4], [1, 1, 1 / 3, 3 / 4], rtol=1e-6)
