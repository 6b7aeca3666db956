"""The predictor: batches of any size from a bounded number of programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.core import Tracer

from eejax import compact, compiling, cond, full, gate, predictor

EXECUTORS = {"full": full, "cond": cond, "compact": compact}


@pytest.fixture(scope="module")
def counted():
    """A predictor over `compact`, variables, and the batch sizes its executor was traced for."""
    network = toys.shared_network(3)
    traced = []

    def executor(network, policy, variables, thresholds, images, count=None):
        traced.append(images.shape[0])
        return compact(network, policy, variables, thresholds, images, count)

    predict = predictor(network, gate, toys.variables(network, 2), executor, max_batch=32)
    for size in (1, 2, 4, 8, 16, 32):  # every program there can be
        predict([1.0, 1.0], toys.some_images(0, size))
    return predict, traced


def test_a_predictor_compiles_nothing_for_a_new_size_or_new_thresholds(counted):
    predict, traced = counted
    images = toys.some_images(6, 300)
    everything = predict([1.0, 0.0], images)
    assert len(set(everything.exits.tolist())) == 3
    compiled = []

    def listen(event, seconds, **_):
        del seconds
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)  # pyright: ignore
    try:
        for size in range(1, 301):
            prediction = predict([1.0, 0.0], images[:size])
            jax.tree.map(
                lambda some, every, size=size: np.testing.assert_array_equal(some, every[:size]),
                prediction,
                everything,
            )
            predict(np.array([size, -size]), images[:3])
        assert not compiled
        jax.jit(lambda x: x + 1)(1)
        assert compiled  # or else the listener hears nothing
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)  # pyright: ignore
    assert traced == [1, 2, 4, 8, 16, 32]


def test_a_predictor_takes_arrays_of_either_kind(counted):
    predict, traced = counted
    images = toys.some_images(6, 41)
    kinds = [
        predict(thresholds, pictures)
        for thresholds in ([1.0, 0.5], np.array([1, 0.5]), jnp.array([1, 0.5]))
        for pictures in (images, jnp.asarray(images))
    ]
    # A constant of JAX has a weak type, which is another program to `jit`.
    same = predict(jnp.full(2, 1.0), images)
    np.testing.assert_array_equal(same.exits, predict([1.0, 1.0], images).exits)
    for other in kinds[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, kinds[0])
    assert traced == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_predictor_answers_as_the_reference(name):
    network = toys.shared_network(3)
    variables = toys.variables(network, 1)
    images = toys.some_images(8, 61)
    predict = predictor(
        network, toys.POLICIES["running sum"], variables, EXECUTORS[name], max_batch=16
    )
    routed = toys.reference("running sum", network, 1, [2, 1], images)
    assert len(set(routed.exits.tolist())) == 3
    toys.assert_answers(predict([2, 1], images), routed)


def test_warming_up_compiles_what_later_calls_need():
    """And large variables are arguments of the programs, small ones are constants in them."""
    network = toys.shared_network(3)
    traced = []

    def executor(network, policy, variables, thresholds, images, count=None):
        kernel = variables["params"]["heads"][0]["gate"]
        traced.append((images.shape[0], isinstance(kernel, Tracer)))
        return full(network, policy, variables, thresholds, images, count)

    variables = toys.variables(network, 2)
    predict = predictor(network, gate, variables, executor, max_batch=8)
    predict.warm_up(toys.some_images(0, 1)[0], (1, 3, 50))
    assert traced == [(1, False), (4, False), (8, False), (2, False)]
    images = toys.some_images(1, 50)
    small = predict([1, 1], images)
    assert len(traced) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "CONSTANT_BYTES", 0)
        predict = predictor(network, gate, variables, executor, max_batch=8)
    large = predict([1, 1], images)
    assert traced[4:] == [(8, True), (2, True)]
    jax.tree.map(np.testing.assert_array_equal, large, small)
    predict([0, 0], images)
    assert len(traced) == 6


def test_a_network_of_one_exit_needs_no_thresholds():
    network = toys.shared_network(1)
    predict = predictor(network, gate, toys.variables(network), compact)
    prediction = predict([], toys.some_images(0, 5))
    assert prediction.exits.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([1, 2, 3], "3 thresholds for 5 exits; give 4, one for each exit but the last"),
        (jnp.zeros(5), "5 thresholds for 5 exits; give 4"),
        (jnp.zeros((4, 1)), r"thresholds \(4, 1\) for 5 exits; give 4"),
        ([0, np.nan, 0, 0], "NaN"),
        (jnp.full(4, np.nan), "NaN"),
    ],
)
def test_a_predictor_refuses_thresholds_that_do_not_fit(thresholds, message):
    network = toys.shared_network(5)
    with pytest.raises(ValueError, match=message):
        predictor(network, gate, {}, full)(thresholds, toys.some_images(0, 2))


def test_a_predictor_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="no images; give at least one"):
        predictor(toys.shared_network(2), gate, {}, full)([0], toys.some_images(0, 0))


@pytest.mark.parametrize("size", [0, -4, 3, 96])
def test_a_predictor_refuses_a_size_that_is_no_power_of_two(size):
    with pytest.raises(ValueError, match=f"max_batch is {size}; give a power of two"):
        predictor(toys.shared_network(2), gate, {}, full, max_batch=size)
