"""Inference under a deadline: always an answer, and the one that the time allowed.

Stage times are put in by hand: that a real clock keeps a deadline is for the benchmark to show.
"""

from __future__ import annotations

import numpy as np
import pytest
import toys

from eejax import anytime
from eejax.evaluation.routing import route, score
from eejax.runtime.recent import RECENT
from eejax.trace import collect

EXITS, BATCH = 4, 6
POLICY = toys.POLICIES["running sum, temperatures"]
THRESHOLDS = [3.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def predict():
    network = toys.shared_network(EXITS)
    return anytime(
        network, POLICY, toys.variables(network, 3), toys.some_images(0, BATCH), measure=3
    )


@pytest.fixture(scope="module")
def scored():
    network = toys.shared_network(EXITS)
    images = toys.some_images(4, 60)
    trace = collect(network, toys.variables(network, 3), images, np.zeros(60, int))
    return images, score(POLICY, trace)


def slow(predict, *seconds):
    """As if each stage had taken so long once, and the rest of a call nothing."""
    predict.times.forget()
    predict.times.seconds[:EXITS, -1] = seconds


@pytest.mark.parametrize("size", [1, 5, BATCH])
def test_without_a_deadline_it_is_the_reference(predict, scored, size):
    images, trace = scored
    routed = route(trace, THRESHOLDS)
    assert len(set(routed.exits.tolist())) > 2
    for start in range(0, 60 - size + 1, size):
        found = predict(THRESHOLDS, images[start : start + size], np.inf)
        np.testing.assert_array_equal(found.exits, routed.exits[start : start + size])
        np.testing.assert_array_equal(found.logits, routed.logits[start : start + size])
        np.testing.assert_array_equal(found.labels, found.logits.argmax(-1))


@pytest.mark.parametrize("reached", range(EXITS))
def test_the_answer_is_that_of_the_last_exit_that_there_is_time_for(predict, scored, reached):
    """A stage that would need an hour is not begun within a minute."""
    images, trace = scored
    exits = np.minimum(route(trace, THRESHOLDS).exits, reached)
    for start in range(0, 60, BATCH):
        slow(predict, *[3600.0 if e > reached else 0.0 for e in range(EXITS)])
        found = predict(THRESHOLDS, images[start : start + BATCH], 60_000.0)
        np.testing.assert_array_equal(found.exits, exits[start : start + BATCH])
        rows = np.arange(start, start + BATCH)
        np.testing.assert_array_equal(found.logits, trace.logits[rows, found.exits])


def test_there_is_an_answer_even_when_time_is_out(predict, scored):
    images, trace = scored
    slow(predict, 3600.0, 3600.0, 3600.0, 3600.0)
    found = predict([np.inf] * 3, images[:3], 1e-6)
    assert found.exits.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(found.logits, trace.logits[:3, 0])


def test_what_a_call_takes_besides_counts(predict, scored):
    images, _ = scored
    slow(predict, 0.0, 0.0, 0.0, 0.0)
    predict.times.seconds[EXITS, -1] = 3600.0
    assert (predict.times.needed == 3600.0).all()
    assert predict([np.inf] * 3, images[:1], 60_000.0).exits.tolist() == [0]


def test_it_goes_on_measuring(predict, scored):
    images, _ = scored
    slow(predict, 3600.0, 3600.0, 3600.0, 3600.0)
    for _ in range(predict.times.seconds.shape[1]):
        predict([np.inf] * 3, images[:1], np.inf)
    assert (predict.times.needed > 0).all()
    assert (predict.times.needed < 3600).all()


@pytest.mark.parametrize(
    ("thresholds", "images", "milliseconds", "message"),
    [
        ([0, 0], 1, 1.0, "2 thresholds for 4 exits"),
        ([0, 0, 0], 0, 1.0, "0 images; give 1 to 6"),
        ([0, 0, 0], 7, 1.0, "7 images; give 1 to 6"),
        ([0, 0, 0], 1, 0.0, "deadline of 0.0 ms"),
        ([0, 0, 0], 1, np.nan, "deadline of nan ms"),
    ],
)
def test_what_does_not_fit_is_refused(predict, thresholds, images, milliseconds, message):
    with pytest.raises(ValueError, match=message):
        predict(thresholds, toys.some_images(0, images), milliseconds)


def test_no_images_to_compile_for_are_refused():
    network = toys.shared_network(EXITS)
    with pytest.raises(ValueError, match="no images"):
        anytime(network, POLICY, toys.variables(network), toys.some_images(0, 0))


def test_a_slow_moment_does_not_lock_a_stage_out(predict, scored):
    images, _ = scored
    predict.times.forget()
    predict.times.seconds[:EXITS] = 1e-6
    predict.times.seconds[1, -1] = 3600.0
    never = [np.inf] * (EXITS - 1)
    exits = [int(predict(never, images[:1], 60_000.0).exits[0]) for _ in range(RECENT + 1)]
    assert exits[0] == 0
    assert exits[-1] == EXITS - 1
