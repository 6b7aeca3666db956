"""A learned scheduler: better where agreement tells more, no worse where confidence tells all."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from eejax import max_prob, with_temperatures
from eejax.evaluation.routing import score
from eejax.policies.scheduler import Parameters, fit, scheduler
from eejax.selection.thresholds import evaluate, for_budget
from eejax.trace import Trace, recorded

EXITS, CLASSES = 4, 10
COST = np.array([0.25, 0.5, 0.75, 1.0])


def agreement(seed, count):
    """Confidence is noise; but correct exits agree, and wrong ones seldom do."""
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    correct = random.uniform(size=(count, 1)) < [0.5, 0.6, 0.7, 0.8]
    wrong = (labels[:, None] + random.integers(1, CLASSES, size=(count, EXITS))) % CLASSES
    said = np.where(correct, labels[:, None], wrong)
    logits = 0.3 * random.normal(size=(count, EXITS, CLASSES))
    logits += np.eye(CLASSES)[said] * random.uniform(2, 6, size=(count, EXITS, 1))
    return recorded(logits, labels)


def evidence(seed, count):
    """Evidence adds up and the softmax is the true posterior: what went before tells nothing."""
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    seen = random.normal(size=(count, EXITS, CLASSES))
    seen += 0.8 * np.eye(CLASSES)[labels][:, None]
    return recorded(0.8 * np.cumsum(seen, 1), labels)


@functools.cache
def fitted(make):
    return fit(make(0, 1000), COST)


def accuracy(policy, make, budget):
    """Thresholds from a second split, accuracy from a third."""
    choosing, testing = score(policy, make(1, 1000)), make(2, 4000)
    labels = make(1, 1000).labels
    choice = for_budget(choosing.scores, choosing.predictions == labels[:, None], COST, budget)
    scored = score(policy, testing)
    correct = scored.predictions == testing.labels[:, None]
    result = evaluate(scored.scores, correct, COST, choice.thresholds)
    assert abs(result.mean_cost - budget) < 0.03
    return result.accuracy


@pytest.mark.parametrize(("budget", "better"), [(0.5, 0.03), (0.65, 0.05), (0.8, 0.03)])
def test_agreement_is_learned_where_it_tells_more_than_confidence(budget, better):
    learned = accuracy(scheduler(fitted(agreement)), agreement, budget)
    assert learned > accuracy(max_prob, agreement, budget) + better


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_little_is_lost_where_confidence_tells_all(budget):
    learned = accuracy(scheduler(fitted(evidence)), evidence, budget)
    assert learned > accuracy(max_prob, evidence, budget) - 0.012


def test_it_starts_as_the_largest_probability():
    trace = evidence(3, 1000)
    start = score(scheduler(fit(trace, COST, steps=0)), trace).scores
    order = np.argsort(score(max_prob, trace).scores, axis=0, kind="stable")
    assert (np.diff(np.take_along_axis(start, order, 0), axis=0) >= 0).all()


def test_fitting_is_deterministic_and_the_unit_of_the_cost_does_not_matter():
    again = fit(agreement(0, 1000), 1e6 * COST)
    for result, expected in zip(again, fitted(agreement), strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_answers_are_the_heads_own():
    trace = agreement(4, 1000)
    np.testing.assert_array_equal(score(scheduler(fitted(agreement)), trace).logits, trace.logits)


def test_extreme_logits_have_finite_scores_and_nan_never_fires():
    extremes = [0, 1, -1, 104, 1e4, -1e4, 1e38, -3e38]
    logits = np.random.default_rng(7).choice(extremes, (1000, EXITS, CLASSES))
    trace = recorded(logits, np.zeros(1000))
    assert np.isfinite(score(scheduler(fitted(agreement)), trace).scores).all()
    # A split like that can be fitted, too.
    assert all(np.isfinite(p).all() for p in fit(trace, COST))
    trace.logits[7, 0, 1] = np.nan
    assert np.isnan(score(scheduler(fitted(agreement)), trace).scores[7, 0])


def test_temperatures_compose():
    trace, temperatures = agreement(5, 1000), (1.0, 2.0, 0.5, 4.0)
    policy = scheduler(fitted(agreement))
    divided = recorded(trace.logits / np.array(temperatures, np.float32)[:, None], trace.labels)
    np.testing.assert_allclose(
        score(with_temperatures(policy, temperatures), trace).scores,
        score(policy, divided).scores,
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_does_not_fit_is_refused():
    trace = agreement(6, 1000)
    for cost in (COST[:3], COST[::-1], COST - 0.25):
        with pytest.raises(ValueError, match="give 4 cumulative costs"):
            fit(trace, cost)
    with pytest.raises(ValueError, match="an empty trace"):
        fit(Trace(*(x[:0] for x in trace)), COST)
    with pytest.raises(ValueError, match="logits with NaN or infinity"):
        fit(trace._replace(logits=np.full_like(trace.logits, np.nan)), COST)
    with pytest.raises(ValueError, match=r"give \[E, 6\], \[E, 5\] and \[E, 5\]"):
        scheduler(Parameters(np.zeros((3, 5)), np.zeros((3, 5)), np.ones((3, 5))))
    three = scheduler(Parameters(*(p[:3] for p in fitted(agreement))))
    with pytest.raises(ValueError, match="a scheduler of 3 exits, and exit 4"):
        score(three, trace)
