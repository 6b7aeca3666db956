"""Metrics, by hand on tables small enough to check by eye."""

from __future__ import annotations

import numpy as np
import pytest

from eejax import Routed, metrics


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
            [0, 1, 0],  # right early and last: wasteful
            [1, 0, 0],  # the same
            [1, 1, 0],  # needed the last
            [0, 1, 1],  # was right: destructive
            [1, 1, 1],  # never right
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
