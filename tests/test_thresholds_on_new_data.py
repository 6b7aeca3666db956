"""What thresholds come to on samples that they were not chosen on."""

from __future__ import annotations

import numpy as np
import pytest

from eejax import for_budget, for_drop
from eejax.selection import smoothing, thresholds
from eejax.selection.frontier import evaluate
from eejax.selection.thresholds import search

COST = np.array([0.3, 0.5, 0.75, 1.0])


def drawn(seed, count):
    """Scores, and the probability of being correct given all of them, `[N, 4]` each."""
    random = np.random.default_rng(seed)
    ease = random.normal(size=(count, 1))
    scores = ease + random.normal(size=(count, 4))
    chance = 1 / (1 + np.exp(-(scores + ease + [-0.2, 0.3, 0.6, 0.8])))
    return scores.astype(np.float32), chance


def outcomes(seed, chance):
    return np.random.default_rng((seed, 1)).uniform(size=chance.shape) < chance


@pytest.fixture(scope="module")
def new():
    return drawn(10_000, 20_000)


def test_the_default_beats_the_search_over_outcomes_on_new_data(new):
    gains = []
    for seed in range(25):
        scores, chance = drawn(seed, 200)
        correct = outcomes(seed, chance)
        smooth, exact = search(scores, correct, COST), search(scores, correct, COST, correct)
        for budget in (0.5, 0.7):
            chosen = [s.for_budget(budget) for s in (smooth, exact)]
            # On the chosen samples it is the other way round.
            assert chosen[0].accuracy <= chosen[1].accuracy
            on_new = [evaluate(new[0], new[1], COST, c.thresholds) for c in chosen]
            gains.append(on_new[0].accuracy - on_new[1].accuracy)
    assert np.mean(gains) > 0.003


def test_choices_say_what_they_come_to_in_outcomes():
    scores, chance = drawn(0, 300)
    correct = outcomes(0, chance)
    for choice in (for_budget(scores, correct, COST, 0.6), for_drop(scores, correct, COST, 0.05)):
        again = evaluate(scores, correct, COST, choice.thresholds)
        assert (choice.accuracy, choice.mean_cost) == (again.accuracy, again.mean_cost)


@pytest.mark.parametrize(("confidence", "fewest", "most"), [(0.9, 0.85, 1.0), (0.5, 0.3, 0.75)])
def test_a_drop_is_kept_as_often_as_it_is_said(new, confidence, fewest, most):
    """On what is expected of new samples, over 60 draws of 500."""
    last, kept, costs = new[1][:, -1].mean(), [], []
    for seed in range(60):
        scores, chance = drawn(seed, 500)
        choice = for_drop(scores, outcomes(seed, chance), COST, 0.02, confidence)
        on_new = evaluate(new[0], new[1], COST, choice.thresholds)
        kept.append(on_new.accuracy >= last - 0.02)
        costs.append(on_new.mean_cost)
    assert fewest <= np.mean(kept) <= most
    assert np.mean(costs) < 0.95


def test_more_confidence_costs_more_and_more_drop_costs_less():
    scores, chance = drawn(1, 1000)
    searched = search(scores, outcomes(1, chance), COST)
    costs = [searched.for_drop(0.02, c).mean_cost for c in (0.5, 0.8, 0.9, 0.99)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    costs = [searched.for_drop(drop).mean_cost for drop in (0.0, 0.01, 0.03, 0.1, 1.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(COST[0])


def test_a_held_out_drop_is_never_above_the_one_that_was_asked_for():
    for seed in range(5):
        scores, chance = drawn(seed, 100)
        correct = outcomes(seed, chance)
        for confidence in (0.5, 0.9):
            choice = for_drop(scores, correct, COST, 0.03, confidence)
            assert choice.accuracy >= correct[:, -1].mean() - 0.03 - 1e-9


def test_early_exits_are_off_where_the_samples_are_too_few_to_tell():
    scores, chance = drawn(0, 20)
    choice = for_drop(scores, outcomes(0, chance), COST, 0.005, 0.99)
    assert choice.thresholds.tolist() == [np.inf] * 3
    assert choice.mean_cost == 1


@pytest.mark.parametrize("confidence", [0.4, 1.0, np.nan])
def test_a_confidence_that_means_nothing_is_refused(confidence):
    scores, chance = drawn(0, 20)
    with pytest.raises(ValueError, match=r"a confidence of .*; give one from 0\.5"):
        for_drop(scores, outcomes(0, chance), COST, 0.01, confidence)


def test_forecasts_cover_what_is_expected_on_new_data(new):
    accuracy, cost = [], []
    for seed in range(20):
        scores, chance = drawn(seed, 200)
        searched = search(scores, outcomes(seed, chance), COST)
        chosen = searched.for_budget(0.6)
        forecast = searched.forecast(lambda s: s.for_budget(0.6), confidence=0.9)
        on_new = evaluate(new[0], new[1], COST, chosen.thresholds)
        accuracy.append(forecast.accuracy[0] <= on_new.accuracy <= forecast.accuracy[1])
        cost.append(forecast.mean_cost[0] <= on_new.mean_cost <= forecast.mean_cost[1])
        width = forecast.accuracy[1] - forecast.accuracy[0]
        assert 0.05 < width < 0.15
        assert forecast.mean_cost[1] - forecast.mean_cost[0] < 0.1
    assert np.mean(accuracy) >= 0.8
    assert np.mean(cost) >= 0.8


def test_a_forecast_judges_no_sample_by_thresholds_that_it_was_chosen_for():
    scores, chance = drawn(0, 103)
    searched = search(scores, outcomes(0, chance), COST)
    seen = []

    def choose(part):
        seen.append({row.tobytes() for row in part.scores})
        return part.for_budget(0.6)

    searched.forecast(choose)
    assert [len(part) for part in seen] == [82, 82, 82, 83, 83]
    assert sum(len(part) for part in seen) == 4 * 103
    with pytest.raises(ValueError, match="one sample cannot be divided"):
        search(scores[:1], np.ones((1, 4), bool), COST).forecast(choose)


def test_fitted_probabilities_are_near_the_true_ones():
    scores, chance = drawn(3, 2000)
    correct = outcomes(3, chance)
    fitted = smoothing.chance(scores, correct)
    assert np.abs(fitted - chance).mean() < 0.12
    assert fitted.min() > 0
    assert fitted.max() < 1
    np.testing.assert_allclose(fitted.mean(0), correct.mean(0), atol=0.02)


def test_a_fit_depends_on_ranks_alone():
    scores, chance = drawn(4, 300)
    correct = outcomes(4, chance)
    fitted = smoothing.chance(scores, correct)
    np.testing.assert_array_equal(smoothing.chance(np.exp(scores.astype(float)), correct), fitted)
    # Equal scores at all exits are equally likely to be correct.
    tied = np.round(scores)
    fitted = smoothing.chance(tied, correct)
    _, which = np.unique(tied, axis=0, return_inverse=True)
    for group in range(which.max() + 1):
        assert np.ptp(fitted[which.ravel() == group], axis=0).max() < 1e-12


@pytest.mark.parametrize("correct", [0.0, 1.0])
def test_a_fit_of_outcomes_that_are_all_equal(correct):
    scores, _ = drawn(5, 50)
    fitted = smoothing.chance(scores, np.full(scores.shape, correct == 1))
    assert np.abs(fitted - correct).max() < 0.05
    same = smoothing.chance(np.ones((50, 2)), np.tile([True, False], (50, 1)))
    assert same[0, 0] > same[0, 1]


def test_scores_of_another_meaning_at_each_exit_are_told_apart():
    """A low score is a good sign at the first exit and a bad one at the second."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(3000, 2))
    chance = 1 / (1 + np.exp(scores * [2, -2]))
    fitted = smoothing.chance(scores, random.uniform(size=(3000, 2)) < chance)
    assert np.abs(fitted - chance).mean() < 0.05
    assert thresholds.search(scores, chance > 0.5, np.array([1.0, 2.0])).given is None
