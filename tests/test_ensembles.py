"""Ensembles of the exits so far: their formulas in float64, what is fitted, how they compose."""

from __future__ import annotations

import numpy as np
import pytest

from eejax import margin, max_prob, policies, with_temperatures
from eejax.evaluation.metrics import softmax
from eejax.evaluation.routing import score
from eejax.policies.ensembles import fit_ztw, mean_of_experts, product_of_experts, vote, ztw
from eejax.trace import Trace, recorded

EXITS, CLASSES = 4, 5


def a_trace(seed, count=40, scale=3.0):
    random = np.random.default_rng(seed)
    logits = scale * random.normal(size=(count, EXITS, CLASSES))
    return recorded(logits, random.integers(CLASSES, size=count))


def log_softmax(logits):
    z = np.float64(logits)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def running_mean(values):
    return np.cumsum(values, 1) / np.arange(1, EXITS + 1)[:, None]


def nll(policy, trace):
    """`[E]`."""
    log_q = log_softmax(score(policy, trace).logits)
    return -np.take_along_axis(log_q, trace.labels[:, None, None], -1)[..., 0].mean(0)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mean_of_experts_is_the_mean_of_the_probabilities(seed):
    trace = a_trace(seed)
    scored = score(mean_of_experts(CLASSES), trace)
    expected = running_mean(softmax(trace.logits))
    np.testing.assert_allclose(scored.logits, np.log(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scored.scores, -np.log1p(-expected.max(-1)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_product_of_experts_is_the_sum_of_the_log_probabilities(seed):
    trace = a_trace(seed)
    scored = score(product_of_experts(CLASSES, margin), trace)
    expected = np.cumsum(log_softmax(trace.logits), 1)
    np.testing.assert_allclose(scored.logits, expected, rtol=1e-4, atol=1e-5)
    second, first = np.sort(softmax(expected), -1)[..., -2:].transpose(2, 0, 1)
    np.testing.assert_allclose(scored.scores, -np.log1p(second - first), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("make", [mean_of_experts, product_of_experts])
def test_sure_ensembles_do_not_tie(make):
    """Every probability is 1.0 in float32."""
    logits = np.zeros((50, 2, CLASSES))
    logits[..., 1] = np.linspace(20, 80, 50)[:, None]
    scores = score(make(CLASSES), recorded(logits, np.ones(50))).scores
    assert (np.diff(scores, axis=0) > 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_vote_is_never_outweighed_and_ties_go_to_the_mean_probability(scale):
    trace = a_trace(2, 400, scale)
    scored = score(vote(CLASSES), trace)
    votes = np.cumsum(np.eye(CLASSES)[trace.logits.argmax(-1)], 1)
    np.testing.assert_array_equal(scored.scores, votes.max(-1))
    leading = np.where(
        votes == votes.max(-1, keepdims=True), running_mean(softmax(trace.logits)), -1
    )
    ordered = np.sort(leading, -1)
    clear = ordered[..., -1] - ordered[..., -2] > 1e-5
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(scored.predictions[clear], leading.argmax(-1)[clear])
    split = (votes == votes.max(-1, keepdims=True)).sum(-1) > 1
    assert (split & clear).sum() > 50 or scale > 1


def test_ztw_is_its_formula_and_reads_no_later_exit():
    trace, random = a_trace(3), np.random.default_rng(3)
    w, b = random.normal(size=(EXITS, EXITS)), random.normal(size=(EXITS, CLASSES))
    log_p = log_softmax(trace.logits)
    expected = np.stack(
        [
            np.tensordot(log_p[:, : e + 1], np.exp(w[e, : e + 1]), (1, 0)) / (e + 1)
            for e in range(4)
        ],
        1,
    )
    above = np.triu(np.full((EXITS, EXITS), 1000.0), 1)
    for weights in (w, np.tril(w) + above):
        answers = score(ztw(weights, b), trace).logits
        np.testing.assert_allclose(answers, log_softmax(expected + b), rtol=1e-4, atol=1e-4)


def test_ztw_of_zeros_is_the_geometric_mean():
    trace = a_trace(4)
    plain = score(ztw(np.zeros((EXITS, EXITS)), np.zeros((EXITS, CLASSES))), trace)
    product = score(product_of_experts(CLASSES), trace).logits
    geometric = log_softmax(product / np.arange(1, EXITS + 1)[:, None])
    np.testing.assert_allclose(plain.logits, geometric, rtol=1e-4, atol=1e-5)


def evidence(seed, count):
    """Overconfident exits that each see something of their own, and say one class too often."""
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    logits = random.normal(size=(count, EXITS, CLASSES))
    logits += np.eye(CLASSES)[labels][:, None] * np.array([0.5, 1.5, 1.0, 2.0])[:, None]
    logits[..., 0] += 1
    return recorded(2.5 * logits, labels)


def test_fitted_ensembles_are_likelier_on_the_fitting_trace_and_on_a_fresh_one():
    fitting, fresh = evidence(0, 1000), evidence(1, 1000)
    weights, biases = fit_ztw(fitting)
    assert weights.shape == (EXITS, EXITS)
    assert biases.shape == (EXITS, CLASSES)
    again = fit_ztw(fitting)
    np.testing.assert_array_equal(weights, again[0])
    np.testing.assert_array_equal(biases, again[1])
    plain = ztw(0 * weights, 0 * biases)
    for trace in (fitting, fresh):
        assert (nll(ztw(weights, biases), trace) < nll(plain, trace) - 0.02).all()
    # The bias undoes what every exit says too often.
    assert (biases[:, 0] < biases[:, 1:].min(1) - 0.3).all()
    # The second exit of the first two, and the last of all, know most.
    assert weights[1, 1] > weights[1, 0] + 0.5
    assert weights[3].argmax() == 3


def test_no_exit_is_fitted_worse_than_the_start():
    """Few steps of a fast optimiser, on few samples whose geometric mean is hardly to be beaten."""
    trace = a_trace(5, scale=8.0)
    for steps in (0, 3):
        weights, biases = fit_ztw(trace, steps)
        start = nll(ztw(0 * weights, 0 * biases), trace)
        assert (nll(ztw(weights, biases), trace) <= start + 1e-6).all()


def test_an_ensemble_may_be_scored_by_a_policy_that_remembers():
    """Patience over the mean: how long the ensemble has not changed its mind."""
    trace = a_trace(6)
    mean = score(mean_of_experts(CLASSES), trace)
    both = score(mean_of_experts(CLASSES, policies.patience), trace)
    alone = score(policies.patience, recorded(mean.logits, trace.labels))
    np.testing.assert_array_equal(both.scores, alone.scores)
    np.testing.assert_array_equal(both.logits, mean.logits)


@pytest.mark.parametrize("make", [vote, mean_of_experts, product_of_experts])
def test_temperatures_go_before_the_ensemble(make):
    trace, temperatures = a_trace(7), (0.5, 1.0, 2.0, 4.0)
    warm = score(with_temperatures(make(CLASSES), temperatures), trace)
    divided = trace.logits / np.array(temperatures, np.float32)[:, None]
    expected = score(make(CLASSES), recorded(divided, trace.labels))
    np.testing.assert_allclose(warm.logits, expected.logits, rtol=1e-6)
    np.testing.assert_allclose(warm.scores, expected.scores, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    trace = a_trace(8)
    for policy in (vote(4), mean_of_experts(4), product_of_experts(4)):
        with pytest.raises(ValueError, match="4 classes, and logits of 5; give 5"):
            score(policy, trace)
    with pytest.raises(ValueError, match=r"give \[E, E\] and \[E, C\]"):
        ztw(np.zeros((3, 2)), np.zeros((3, CLASSES)))
    with pytest.raises(ValueError, match="weights for 3 exits, and exit 4"):
        score(ztw(np.zeros((3, 3)), np.zeros((3, CLASSES))), trace)
    with pytest.raises(ValueError, match="give finite logits"):
        fit_ztw(trace._replace(logits=np.full_like(trace.logits, np.inf)))
    with pytest.raises(ValueError, match="an empty trace"):
        fit_ztw(Trace(*(x[:0] for x in trace)))


def test_the_confidence_is_the_answers_own():
    trace = a_trace(9)
    for make in (mean_of_experts, product_of_experts):
        scored = score(make(CLASSES), trace)
        again = score(max_prob, recorded(scored.logits, trace.labels))
        np.testing.assert_allclose(scored.scores, again.scores, rtol=1e-6)
