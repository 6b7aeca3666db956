"""Metrics, by hand on tables small enough to check by eye."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eejax import Routed
from eejax.evaluation import metrics


def logits_of(probabilities):
    """Logits of two classes with the given probability of class 1."""
    p = np.array(probabilities)
    return np.log(np.stack([1 - p, p], -1)).astype(np.float32)


def test_the_outcome_of_a_routing():
    logits = np.eye(3)[[0, 1, 2, 2]]
    routed = Routed(np.array([0, 2, 2, 0]), logits)
    result = metrics.outcome(routed, np.array([0, 1, 0, 2]), np.array([1.0, 3.0, 10.0]))
    assert result.accuracy == 0.75
    assert result.mean_cost == 5.5
    assert result.exit_fractions.tolist() == [0.5, 0.0, 0.5]


def test_softmax_of_large_logits():
    p = metrics.softmax(np.array([[1e4, 0.0], [-1e4, -1e4], [3.0, 3.0 + np.log(3)]]))
    np.testing.assert_allclose(p, [[1, 0], [0.5, 0.5], [0.25, 0.75]])
    assert p.dtype == np.float64


def test_reliability_and_calibration_error_by_hand():
    # Confidences .6 .62 | .7 | .95 .99 1.0; ten bins. Right: yes no | no | yes yes no.
    logits = logits_of([0.6, 0.62, 0.7, 0.95, 0.99, 0.5])
    logits[-1] = [0, 1000]  # a confidence of exactly 1
    labels = np.array([1, 0, 0, 1, 1, 0])
    table = metrics.reliability(logits, labels, bins=10)
    assert table.count.tolist() == [0, 0, 0, 0, 0, 0, 2, 1, 0, 3]
    np.testing.assert_allclose(table.accuracy[[6, 7, 9]], [0.5, 0, 2 / 3])
    np.testing.assert_allclose(table.confidence[[6, 7, 9]], [0.61, 0.7, 2.94 / 3], rtol=1e-6)
    error = metrics.expected_calibration_error(logits, labels, bins=10)
    by_hand = (2 * abs(0.5 - 0.61) + 0.7 + 3 * abs(2 / 3 - 2.94 / 3)) / 6
    assert error == pytest.approx(by_hand, rel=1e-6)


def test_empty_bins_hold_nan_and_warn_of_nothing():
    table = metrics.reliability(logits_of([0.9]), np.array([1]))
    assert len(table.count) == 15
    assert np.isnan(table.accuracy[table.count == 0]).all()
    assert np.isnan(table.confidence[table.count == 0]).all()
    assert np.isfinite(table.accuracy[table.count > 0]).all()
    assert metrics.expected_calibration_error(logits_of([0.9]), np.array([1])) == pytest.approx(0.1)


def test_a_calibrated_answer_has_little_calibration_error():
    random = np.random.default_rng(0)
    p = random.uniform(size=40_000)
    labels = (random.uniform(size=p.shape) < p).astype(int)
    logits = logits_of(np.clip(p, 1e-6, 1 - 1e-6))
    assert metrics.expected_calibration_error(logits, labels) < 0.01
    assert metrics.expected_calibration_error(4 * logits, labels) > 0.1


def test_overthinking_by_hand():
    labels = np.zeros(6, int)
    predictions = np.array(
        [
            [0, 1, 0],  # correct early and last: wasteful
            [1, 0, 0],  # the same
            [1, 1, 0],  # needed the last
            [0, 1, 1],  # was correct: destructive
            [1, 1, 1],  # never correct
            [0, 0, 0],  # wasteful
        ]
    )
    result = metrics.overthinking(predictions, labels)
    assert result == {"wasteful": pytest.approx(0.5), "destructive": pytest.approx(1 / 6)}
    alone = metrics.overthinking(predictions[:, -1:], labels)
    assert alone == {"wasteful": 0, "destructive": 0}


def test_the_area_is_the_mean_accuracy_over_the_range_of_costs():
    assert metrics.area_under_curve([1, 2, 4], [0.5, 0.7, 0.9]) == pytest.approx(2.2 / 3)
    shuffled = metrics.area_under_curve([4, 1, 2], [0.9, 0.5, 0.7])
    assert shuffled == pytest.approx(2.2 / 3)
    assert metrics.area_under_curve([3], [0.8]) == 0.8
    assert metrics.area_under_curve([3, 3], [0.8, 0.6]) == 0.8


def test_the_area_over_a_common_range():
    costs, accuracies = [1, 2, 4], [0.5, 0.7, 0.9]
    area = metrics.area_under_curve
    assert area(costs, accuracies, 1, 4) == pytest.approx(area(costs, accuracies))
    assert area(costs, accuracies, 1.5, 3) == pytest.approx((0.65 / 2 + 0.75) / 1.5)
    # Beyond the dearest point it stays.
    assert area(costs, accuracies, high=6) == pytest.approx((2.2 + 2 * 0.9) / 5)
    assert area(costs, accuracies, 3, 3) == pytest.approx(0.8)
    assert area(costs, accuracies, 5, 7) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"cost of 0\.5; its cheapest point costs 1"):
        area(costs, accuracies, low=0.5)
    with pytest.raises(ValueError, match="range from 3 to 2"):
        area(costs, accuracies, 3, 2)


def test_a_curve_on_a_grid_of_costs():
    at = metrics.curve_at([4, 1, 2], [0.9, 0.5, 0.7], [[1, 1.5], [3, 9]])
    np.testing.assert_allclose(at, [[0.5, 0.6], [0.8, 0.9]])
    # Of points of equal cost the best counts, in whatever order they come.
    for accuracies in ([0.5, 0.8, 0.6], [0.5, 0.6, 0.8]):
        np.testing.assert_allclose(metrics.curve_at([1, 2, 2], accuracies, [2, 1.5]), [0.8, 0.65])
    with pytest.raises(ValueError, match="start there or above"):
        metrics.curve_at([1, 2], [0.5, 0.7], [1.0, 0.99])
    with pytest.raises(ValueError, match="start there or above"):
        metrics.curve_at([1, 2], [0.5, 0.7], np.nan)
    with pytest.raises(ValueError, match=r"give \[K\] of both"):
        metrics.curve_at([1, 2], [0.5], 1)


@given(seed=st.integers(0, 2**20), count=st.integers(1, 5), exits=st.integers(1, 3))
def test_the_oracle_is_the_best_of_all_choices_of_exits(seed, count, exits):
    random = np.random.default_rng(seed)
    correct = random.random((count, exits)) < 0.5
    cost = np.cumsum(random.integers(1, 4, exits)).astype(float)
    budget = random.uniform(cost[0], cost[-1] + 1)
    best = 0.0
    for choice in itertools.product(range(exits), repeat=count):
        if cost[list(choice)].mean() <= budget:
            best = max(best, correct[range(count), choice].mean())
    assert metrics.oracle_accuracy(correct, cost, budget) == pytest.approx(best)


def test_the_oracle_at_the_ends_of_its_budget():
    correct = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    cost = np.array([0.1, 0.2, 0.7])
    assert metrics.first_correct(correct).tolist() == [0, 1, 2, 0]
    mean = cost[metrics.first_correct(correct)].mean()
    assert metrics.oracle_accuracy(correct, cost, cost[0]) == 0.25
    assert metrics.oracle_accuracy(correct, cost, mean) == 0.75
    assert metrics.oracle_accuracy(correct, cost, mean - 1e-6) == 0.5
    assert metrics.oracle_accuracy(correct, cost, 10.0) == 0.75
    with pytest.raises(ValueError, match=r"first exit costs 0\.1 already"):
        metrics.oracle_accuracy(correct, cost, 0.09)
    with pytest.raises(ValueError, match="positive and increasing"):
        metrics.oracle_accuracy(correct, cost[::-1], 1.0)
    with pytest.raises(ValueError, match=r"give \[N, E\] and \[E\]"):
        metrics.oracle_accuracy(correct, cost[:2], 1.0)


def test_exits_at_random_at_equal_rates():
    random = np.random.default_rng(3)
    correct = random.random((500, 3)) < [0.4, 0.6, 0.9]
    fractions = np.array([0.5, 0.2, 0.3])
    expected = metrics.random_at_equal_rates(correct, fractions)
    drawn = random.choice(3, (2000, 500), p=fractions)
    assert expected == pytest.approx(correct[np.arange(500), drawn].mean(), abs=0.002)
    assert metrics.random_at_equal_rates(correct, np.array([0, 0, 1])) == correct[:, 2].mean()
    for wrong in ([0.5, 0.5], [0.5, 0.2, 0.2], [1.5, -0.5, 0]):
        with pytest.raises(ValueError, match="with sum 1"):
            metrics.random_at_equal_rates(correct, np.array(wrong))


def test_where_the_samples_of_each_class_leave():
    exits, labels = np.array([0, 0, 1, 2, 2]), np.array([0, 0, 0, 2, 2])
    table = metrics.exit_fractions_by_class(exits, labels, 4, 3)
    np.testing.assert_allclose(table[[0, 2]], [[2 / 3, 1 / 3, 0], [0, 0, 1]])
    assert table.shape == (4, 3)
    assert np.isnan(table[[1, 3]]).all()
    with pytest.raises(ValueError, match="labels from 0 to 2; give 0 to 1"):
        metrics.exit_fractions_by_class(exits, labels, 2, 3)
    with pytest.raises(ValueError, match="exits from 0 to 2; give 0 to 1"):
        metrics.exit_fractions_by_class(exits, labels, 3, 2)
    with pytest.raises(ValueError, match=r"exits \(4,\), labels \(5,\)"):
        metrics.exit_fractions_by_class(exits[1:], labels, 3, 3)


def test_how_often_policies_agree():
    values = np.array([[0, 1, 2, 0], [0, 1, 0, 0], [2, 2, 2, 2]])
    matrix = metrics.agreement_matrix(values)
    np.testing.assert_array_equal(matrix, [[1, 0.75, 0.25], [0.75, 1, 0], [0.25, 0, 1]])
    with pytest.raises(ValueError, match=r"give \[policies, samples\]"):
        metrics.agreement_matrix(values[0])
