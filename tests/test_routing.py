"""The reference router, against a loop over samples, and the recording of traces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from eejax import collect, for_budget, gate, max_prob, recorded, route, score
from eejax.evaluation import metrics
from eejax.evaluation.routing import Scored
from eejax.policies.base import check_thresholds
from eejax.trace import read_trace, save_trace


def one_by_one(scored, thresholds):
    """Exits and answers, a sample and an exit at a time."""
    exits, answers = [], []
    for n in range(len(scored.scores)):
        e = 0
        while e < len(thresholds) and not scored.scores[n, e] >= thresholds[e]:
            e += 1
        exits.append(e)
        answers.append(scored.logits[n, e])
    return exits, answers


@given(seed=st.integers(0, 2**20), exits=st.integers(1, 6), count=st.integers(1, 40))
def test_routing_is_the_loop_over_samples(seed, exits, count):
    random = np.random.default_rng(seed)
    special = [-np.inf, np.inf, *range(-3, 4)]
    scores = random.choice([*range(-3, 4), np.nan], (count, exits)).astype(np.float32)
    scored = Scored(random.normal(size=(count, exits, 3)).astype(np.float32), scores)
    thresholds = random.choice(special, exits - 1)
    routed = route(scored, thresholds)
    expected_exits, expected_logits = one_by_one(scored, thresholds)
    np.testing.assert_array_equal(routed.exits, expected_exits)
    np.testing.assert_array_equal(routed.logits, expected_logits)


def test_a_score_equal_to_the_threshold_stops():
    scored = Scored(np.zeros((1, 2, 2)), np.array([[0.1, 0.0]], np.float32))
    assert route(scored, [0.1]).exits.tolist() == [0]
    assert route(scored, [np.nextafter(np.float32(0.1), np.float32(1))]).exits.tolist() == [1]


def test_infinite_thresholds_switch_an_exit_off_or_always_on():
    scored = Scored(np.zeros((3, 4, 2)), np.full((3, 4), 3e38, np.float32))
    assert route(scored, [np.inf, np.inf, np.inf]).exits.tolist() == [3] * 3
    assert route(scored, [np.inf, -np.inf, np.inf]).exits.tolist() == [1] * 3


@pytest.mark.parametrize("kind", [list, tuple, np.array, jnp.array, iter])
def test_thresholds_of_every_kind_become_float32(kind):
    values = check_thresholds(kind([0.5, 1.5]), 3)
    assert values.dtype == np.float32
    assert values.tolist() == [0.5, 1.5]


def test_thresholds_that_do_not_fit_are_refused():
    scored = Scored(np.zeros((2, 5, 3)), np.zeros((2, 5), np.float32))
    message = "3 thresholds for 5 exits; give 4, one for each exit but the last."
    with pytest.raises(ValueError, match=message):
        route(scored, [1, 2, 3])
    with pytest.raises(ValueError, match="hold a NaN"):
        route(scored, [1, 2, np.nan, 3])


def test_scoring_carries_the_state_from_exit_to_exit():
    gates = np.random.default_rng(0).integers(-3, 4, (7, 4)).astype(np.float32)
    logits = np.random.default_rng(1).integers(-3, 4, (7, 4, toys.CLASSES)).astype(np.float32)
    trace = recorded(logits, np.zeros(7), gates)
    scored = score(toys.POLICIES["running sum"], trace)
    np.testing.assert_array_equal(scored.scores, gates.cumsum(1))
    np.testing.assert_array_equal(scored.logits, logits.cumsum(1))
    np.testing.assert_array_equal(scored.predictions, logits.cumsum(1).argmax(-1))
    np.testing.assert_array_equal(score(gate, trace).scores, gates)


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (8, 4), (3, 500), (1, 1)])
def test_a_trace_is_what_the_whole_network_says(count, batch):
    network = toys.shared_network(3)
    variables = toys.variables(network, 1)
    images = toys.some_images(0, count)
    labels = np.arange(count)
    trace = collect(network, variables, images, labels, batch=batch)
    outputs, _ = jax.jit(network.apply_all)(variables, images)
    np.testing.assert_array_equal(trace.logits, outputs.logits.swapaxes(0, 1))
    np.testing.assert_array_equal(trace.gates, outputs.gate.swapaxes(0, 1))
    np.testing.assert_array_equal(trace.labels, labels)
    assert trace.logits.shape == (count, 3, toys.CLASSES)
    assert (trace.logits.dtype, trace.gates.dtype) == (np.float32, np.float32)
    assert trace.labels.dtype == np.int32


def test_one_program_records_every_split():
    """Traced once for a batch size: not for the padded last batch, nor for another split."""
    traced = []
    network = toys.network(2, lambda e, x: traced.append(x.shape[0]))
    variables = toys.variables(toys.shared_network(2))
    for count in (10, 3, 8):
        collect(network, variables, toys.some_images(0, count), np.zeros(count), batch=4)
    assert traced == [4, 4]  # one trace, of two stages


def test_recording_reads_raw_images_and_forgets_the_memories():
    network = toys.shared_network(2).reading(lambda x: x.astype(jnp.float32) - 2)
    variables = toys.variables(toys.shared_network(2))
    raw = np.random.default_rng(0).integers(0, 5, (6, toys.INPUTS)).astype(np.uint8)
    trace = collect(network, variables, raw, np.zeros(6), batch=4)
    plain = collect(
        toys.shared_network(2), variables, raw.astype(np.float32) - 2, np.zeros(6), batch=4
    )
    np.testing.assert_array_equal(trace.logits, plain.logits)


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2), (2, 3)])
def test_splits_that_are_empty_or_do_not_match_are_refused(images, labels):
    network = toys.shared_network(2)
    message = f"{images} images and {labels} labels; give as many of both"
    with pytest.raises(ValueError, match=message):
        collect(network, {}, toys.some_images(0, images), np.zeros(labels))


def foreign(samples=60, exits=3, classes=4):
    """Arrays as another framework hands them over; later exits are better."""
    random = np.random.default_rng(5)
    labels = random.integers(0, classes, samples)
    signal = np.eye(classes)[labels][:, None] * np.arange(1, exits + 1)[:, None]
    return random.normal(size=(samples, exits, classes)) + signal, labels


def test_a_saved_trace_is_read_back(tmp_path):
    logits, labels = foreign()
    trace = recorded(
        logits, labels, logits[:, :, 0], ids=2**64 - 1 - np.arange(60, dtype=np.uint64)
    )
    path = tmp_path / "trace without a suffix"
    save_trace(path, trace)
    for before, after in zip(trace, read_trace(path), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_a_trace_of_another_framework_goes_all_the_way(tmp_path, kind):
    logits, labels = foreign()
    logits, path = logits.astype(kind), tmp_path / "trace.npz"
    np.savez_compressed(path, logits=logits, labels=labels.astype(np.int64), epoch=3)
    trace = read_trace(str(path))
    np.testing.assert_array_equal(trace.logits, logits.astype(np.float32))
    assert not trace.gates.any()
    np.testing.assert_array_equal(trace.ids, recorded(logits, labels).ids)

    scored, cost = score(max_prob, trace), np.array([0.25, 0.5, 1.0])
    correct = scored.predictions == labels[:, None]
    choice = for_budget(scored.scores, correct, cost, 0.625)
    result = metrics.outcome(route(scored, choice.thresholds), trace.labels, cost)
    assert (result.accuracy, result.mean_cost) == pytest.approx((choice.accuracy, choice.mean_cost))
    assert result.mean_cost <= 0.625
    chance = metrics.random_at_equal_rates(correct, result.exit_fractions)
    assert chance < result.accuracy <= metrics.oracle_accuracy(correct, cost, 0.625)


def test_files_that_are_no_traces_are_refused(tmp_path):
    logits, labels = foreign()
    path = tmp_path / "trace.npz"

    def refused(message, **arrays):
        if arrays:
            np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            read_trace(path)

    refused("holds .'y', 'logits'., but no labels", y=labels, logits=logits)
    refused("but no logits and no labels", y=labels)
    refused(r"trace.npz: logits of shape \(60, 4\)", logits=logits[:, 0], labels=labels)
    refused(r"trace.npz: labels of shape \(59,\)", logits=logits, labels=labels[1:])
    refused(r"gates of shape \(60,\)", logits=logits, labels=labels, gates=labels)
    refused(r"ids of shape \(3,\)", logits=logits, labels=labels, ids=labels[:3])
    unreadable = "cannot be read as an .npz of plain arrays"
    refused(unreadable, logits=logits, labels=labels.astype(object))  # pickled
    np.savez_compressed(path, logits=logits, labels=labels)
    whole = path.read_bytes()
    for content in (b"", b"not a trace", whole[:2000], whole[:60] + b"\xff" * 40 + whole[100:]):
        path.write_bytes(content)
        refused(unreadable)
    with path.open("wb") as file:
        np.save(file, logits)
    refused(unreadable)
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.npz")
