"""Scores: finite, fine where confidence saturates, and in the order of the usual confidences."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from eejax import entropy, gate, margin, max_prob, policies, with_temperatures
from eejax import trace as eejax_trace
from eejax.evaluation import routing
from eejax.network import ExitOutput
from eejax.policies.confidence import confidence_threshold
from eejax.selection import thresholds

STATELESS = {"max_prob": max_prob, "margin": margin, "entropy": entropy}


def output(logits, gates=None):
    logits = jnp.asarray(logits, jnp.float32)
    return ExitOutput(logits, jnp.zeros(len(logits)) if gates is None else gates, ())


@functools.cache
def compiled(name):
    return jax.jit(STATELESS[name].step, static_argnums=2)


def scores(policy, logits):
    known = [name for name, each in STATELESS.items() if each is policy]
    step = compiled(known[0]) if known else jax.jit(policy.step, static_argnums=2)
    answer, score, state = step(output(logits), policy.init(len(logits)), 0)
    np.testing.assert_array_equal(answer, np.asarray(logits, np.float32))
    assert score.dtype == jnp.float32
    assert score.shape == (len(logits),)
    assert state == ()
    return np.asarray(score)


def random_logits(seed, classes, scale, count=500):
    return (scale * np.random.default_rng(seed).normal(size=(count, classes))).astype(np.float32)


def by_hand(name, logits):
    """The usual confidences, in float64."""
    z = np.float64(logits)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = np.sort(p / p.sum(-1, keepdims=True), -1)[:, ::-1]
    if name == "max_prob":
        return p[:, 0]
    if name == "margin":
        return p[:, 0] - p[:, 1]
    return (p * np.log(p)).sum(-1) / np.log(p.shape[-1])


@given(seed=st.integers(0, 2**20), classes=st.sampled_from([2, 3, 10]), scale=st.floats(0.1, 4))
def test_max_prob_and_margin_are_the_usual_confidences_in_nats(seed, classes, scale):
    logits = random_logits(seed, classes, scale)
    for name in ("max_prob", "margin"):
        confidence = by_hand(name, logits)
        some = confidence < 0.9999  # beyond it the plain formula in float64 has lost the digits
        expected = -np.log1p(-confidence)
        np.testing.assert_allclose(
            scores(STATELESS[name], logits)[some], expected[some], rtol=2e-4, atol=2e-6
        )


@given(seed=st.integers(0, 2**20), classes=st.sampled_from([2, 3, 10]), scale=st.floats(0.01, 30))
def test_entropy_is_the_negative_normalised_entropy(seed, classes, scale):
    logits = random_logits(seed, classes, scale)
    score = scores(entropy, logits)
    assert ((score >= -1) & (score <= 0)).all()
    np.testing.assert_allclose(score, by_hand("entropy", logits), atol=1e-5)


def test_entropy_stays_in_its_range_at_the_ends():
    for classes in (2, 3, 7, 10, 100, 1000):
        uniform, sure = np.zeros(classes), np.eye(1, classes)[0] * 1000
        score = scores(entropy, np.stack([uniform, sure]))
        assert score[0] == pytest.approx(-1, abs=1e-6)
        assert score[1] == 0
        assert (score >= -1).all()


@pytest.mark.parametrize("name", ["max_prob", "margin"])
@pytest.mark.parametrize("classes", [2, 10])
def test_samples_do_not_tie_where_the_probability_is_one(name, classes):
    """Logits 20 to 100 apart: every largest probability is 1.0 in float32, no two scores are equal,
    and the surer sample has the higher one."""
    gaps = np.linspace(20, 100, 400, dtype=np.float32)
    logits = np.zeros((len(gaps), classes), np.float32)
    logits[:, 1] = gaps
    assert (jax.nn.softmax(jnp.asarray(logits)).max(-1) == 1).all()
    assert (np.diff(scores(STATELESS[name], logits)) > 0).all()


@pytest.mark.parametrize("name", STATELESS)
def test_scores_order_samples_as_the_confidence_does(name):
    logits = random_logits(3, 5, 2.0)
    confidence = by_hand(name, logits)
    order = np.argsort(confidence)
    ordered = scores(STATELESS[name], logits)[order]
    clear = np.diff(confidence[order]) > 1e-6
    assert clear.sum() > 400
    assert (np.diff(ordered)[clear] > 0).all()


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("jitted", [False, True])
def test_extreme_logits_have_finite_scores(name, classes, jitted):
    extremes = np.array([0, 1, -1, 88, -88, 104, 1e4, -1e4, 1e38, -1e38, 3e38, -3e38])
    logits = np.stack(np.meshgrid(*[extremes] * classes), -1).reshape(-1, classes)
    policy = STATELESS[name]
    step = jax.jit(policy.step, static_argnums=2) if jitted else policy.step
    _, score, _ = step(output(logits), policy.init(len(logits)), 0)
    assert np.isfinite(score).all()
    # A class that is ruled out altogether, as masked classes are.
    masked = np.concatenate([logits, np.full((len(logits), 1), -np.inf)], -1)
    _, score, _ = step(output(masked), policy.init(len(logits)), 0)
    assert np.isfinite(score).all()


@pytest.mark.parametrize("name", STATELESS)
def test_one_class_is_as_sure_as_can_be(name):
    score = scores(STATELESS[name], np.array([[3.0], [-1.0]]))
    assert (score >= scores(STATELESS[name], np.array([[50.0, 0.0]]))).all()


def test_two_classes_have_margin_and_max_prob_that_agree():
    """With two classes `1 - margin = 2 (1 - max_prob)`, so the scores are `log 2` apart."""
    logits = random_logits(1, 2, 10)
    np.testing.assert_allclose(
        scores(max_prob, logits) - scores(margin, logits), math.log(2), rtol=1e-4
    )


@pytest.mark.parametrize("name", STATELESS)
def test_a_diverged_network_scores_nan_and_so_never_stops_early(name):
    assert np.isnan(scores(STATELESS[name], np.array([[np.nan, 0.0], [1.0, np.nan]]))).all()


@pytest.mark.parametrize("name", ["max_prob", "margin"])
def test_equal_largest_logits(name):
    """Two classes tie at the top: the largest probability is one half, the margin nothing."""
    expected = {"max_prob": math.log(2), "margin": 0.0}[name]
    score = scores(STATELESS[name], np.array([[50.0, 50.0, 0.0], [0.0, 60.0, 60.0]]))
    np.testing.assert_allclose(score, expected, atol=1e-6)


def test_the_gate_scores_with_its_logit():
    gates = jnp.array([-3.0, 0.0, 2.5])
    logits, score, _ = gate.step(output(np.zeros((3, 4)), gates), gate.init(3), 1)
    np.testing.assert_array_equal(score, gates)
    assert logits.shape == (3, 4)


@pytest.mark.parametrize("kind", [tuple, np.array, jnp.array])
def test_temperatures_divide_the_logits_of_their_exit(kind):
    logits = random_logits(2, 4, 3)
    warm = with_temperatures(max_prob, kind([1.0, 2.5]))
    answer, score, _ = warm.step(output(logits), warm.init(len(logits)), 1)
    np.testing.assert_allclose(answer, logits / 2.5, rtol=1e-6)
    np.testing.assert_allclose(score, scores(max_prob, np.asarray(answer)), rtol=1e-6)
    first, _, _ = warm.step(output(logits), (), 0)
    np.testing.assert_array_equal(first, logits)


def test_temperatures_leave_the_state_to_the_policy():
    def step(output, state, e):
        return output.logits, state + output.logits[:, 0], state + e

    inner = toys.policy_of(lambda batch_size: jnp.full(batch_size, 5.0), step)
    warm = with_temperatures(inner, (1.0, 4.0))
    state = warm.init(2)
    _, score, state = warm.step(output([[8.0, 0.0], [4.0, 0.0]]), state, 1)
    assert score.tolist() == [7, 6]
    assert state.tolist() == [6, 6]


@pytest.mark.parametrize("temperatures", [(1.0, 0.0), (1.0, -2.0), (math.nan,)])
def test_temperatures_must_be_positive(temperatures):
    with pytest.raises(ValueError, match="give positive numbers"):
        with_temperatures(max_prob, temperatures)


def test_an_exit_without_a_temperature_is_refused():
    with pytest.raises(ValueError, match="2 temperatures, and exit 3; give one for each"):
        with_temperatures(max_prob, (1.0, 1.0)).step(output(np.zeros((2, 3))), (), 2)


@given(confidence=st.floats(0, 1 - 1e-12))
def test_a_confidence_converts_to_a_threshold(confidence):
    threshold = confidence_threshold(confidence)
    assert threshold >= 0
    assert -math.expm1(-threshold) == pytest.approx(confidence, rel=1e-12, abs=1e-15)


def test_the_ends_of_the_confidence_scale():
    assert confidence_threshold(0) == 0
    assert confidence_threshold(1) == math.inf
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"give one in \[0, 1\]"):
            confidence_threshold(wrong)


def test_a_converted_confidence_stops_the_samples_that_have_it():
    logits = random_logits(9, 6, 2.0)
    for name in ("max_prob", "margin"):
        confidence = by_hand(name, logits)
        for level in (0.3, 0.5, 0.9):
            clear = np.abs(confidence - level) > 1e-4
            stops = scores(STATELESS[name], logits) >= confidence_threshold(level)
            np.testing.assert_array_equal(stops[clear], (confidence >= level)[clear])
            assert 0 < stops.sum() < len(stops)


# Policies that remember, and the baselines.


def test_patience_counts_the_exits_in_a_row_that_gave_the_class_before():
    classes = np.array([[0, 0, 0, 1, 1], [2, 1, 2, 2, 2]])
    trace = eejax_trace.recorded(np.eye(3)[classes], [0, 0])
    scored = routing.score(policies.patience, trace)
    assert scored.scores.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]
    np.testing.assert_array_equal(scored.logits, trace.logits)


def test_a_fixed_exit_is_the_best_single_one_within_the_budget():
    correct = np.random.default_rng(0).uniform(size=(200, 4)) < np.array([0.3, 0.7, 0.6, 0.9])
    trace = eejax_trace.recorded(random_logits(0, 8, 1.0, 200).reshape(200, 4, 2), np.zeros(200))
    scores = routing.score(policies.fixed, trace).scores
    cost = np.array([0.25, 0.5, 0.75, 1.0])
    for budget, best in ((0.3, 0), (0.6, 1), (0.8, 1), (1.0, 3)):
        choice = thresholds.for_budget(scores, correct, cost, budget)
        assert np.isinf(choice.thresholds).all()
        assert choice.mean_cost == cost[best]
        assert choice.accuracy == correct[:, best].mean()


def random_scores(logits, seed, e):
    return np.asarray(jax.jit(policies.random(seed).step)(output(logits), (), np.int32(e))[1])


def test_random_scores_are_uniform_and_say_nothing():
    """20000 samples: a correlation of 0.03 would be four standard deviations."""
    logits = random_logits(4, 3, 2.0, 20000)
    drawn = {(seed, e): random_scores(logits, seed, e) for seed in (0, 1) for e in (0, 1, 2)}
    for score in drawn.values():
        assert score.dtype == np.float32
        assert 0 <= score.min() < 0.001
        assert 0.999 < score.max() < 1
        counts = np.bincount((score * 50).astype(int), minlength=50)
        assert ((counts - 400) ** 2 / 400).sum() < 95  # chi-square of 49: one draw in 10^4 is above
    told = [*drawn.values(), scores(max_prob, logits), logits[:, 0], random_scores(-logits, 0, 0)]
    ranks = np.argsort(np.argsort(told, axis=1), axis=1)
    correlation = np.asarray(np.corrcoef(ranks))[: len(drawn)]
    assert np.abs(correlation[correlation < 0.9999]).max() < 0.03
    assert (correlation > 0.9999).sum() == len(drawn)


def test_random_scores_change_with_any_bit_of_any_logit():
    """Neighbouring numbers, as a saturated network's, and the same ones in another order."""
    base = np.full(4000, 12.0, np.float32)
    near = np.stack([np.nextafter(base, np.inf) + np.arange(4000, dtype="f4") * 1e-5, base], 1)
    a, b = random_scores(near, 3, 0), random_scores(near[:, ::-1], 3, 0)
    distinct = len(np.unique(near[:, 0]))
    assert len(np.unique(a)) > 0.99 * distinct
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.07
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.07


def test_a_random_score_goes_with_its_sample():
    logits = np.round(random_logits(5, 4, 2.0, 64))
    logits[0] = [0.0, -0.0, 1.0, 2.0]
    moved = np.abs(logits[0])[None].repeat(64, 0)  # without the negative zero
    np.testing.assert_array_equal(random_scores(moved, 9, 1), random_scores(logits, 9, 1)[0])
    order = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(
        random_scores(logits[order], 9, 1), random_scores(logits, 9, 1)[order]
    )


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="give a whole number in"):
        policies.random(seed)


@pytest.mark.parametrize("name", toys.POLICIES)
def test_an_exit_that_is_traced_is_the_same_exit(name):
    """In `loop` one program holds every depth."""
    policy, exits = toys.POLICIES[name], 4
    logits = jnp.asarray(toys.some_images(1, exits * 5).reshape(exits, 5, toys.CLASSES))
    known = routing.score(
        policy, eejax_trace.recorded(logits.swapaxes(0, 1), np.zeros(5), np.ones((5, exits)))
    )

    @jax.jit
    def every_exit(logits):
        def step(state, exit_):
            e, z = exit_
            answer, score, state = policy.step(ExitOutput(z, jnp.ones(5), ()), state, e)
            return state, (answer, score)

        return jax.lax.scan(step, policy.init(5), (jnp.arange(exits), logits))[1]

    answers, traced = every_exit(logits)
    np.testing.assert_allclose(answers.swapaxes(0, 1), known.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(traced.T, known.scores, rtol=1e-5, atol=1e-6)
