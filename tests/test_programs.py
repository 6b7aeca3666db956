"""What is compiled: once for a shape, for every platform, and in bfloat16 too."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import (
    anytime,
    compact,
    cond,
    full,
    gate,
    host,
    loop,
    predictor,
    rebatched,
    stack,
    stream,
)
from eejax.inference import dispatch, streaming
from eejax.inference.compaction import Buffer
from eejax.inference.step import Samples, bind_exits

EXITS = 4
LIMITS = ([1.0, 2.0, 0.0], [np.inf] * 3, [-np.inf] * 3)


@contextlib.contextmanager
def compilations():
    """Counts them, in a list that grows."""
    seen = []

    def listen(event, seconds, **_):
        del seconds
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)  # pyright: ignore
    try:
        yield seen
        jax.jit(lambda x: x * 3 + len(seen))(1)
        assert seen  # or else the listener hears nothing
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)  # pyright: ignore


def served(kind, dtype=jnp.float32):
    """A strategy as `predict(thresholds, images)`, for at most 16 images."""
    network = toys.shared_network(EXITS, dtype=dtype)
    variables = toys.variables(network, 1)
    if kind == "host":
        return host(network, gate, variables, tiles=(8, 2), max_batch=16)
    if kind == "anytime":
        predict = anytime(network, gate, variables, toys.some_images(0, 16), measure=1)
        return lambda thresholds, images: predict(thresholds, images, np.inf)
    run = stream(network, gate, variables, chunk=16, tiles=(8, 2))
    return lambda thresholds, images: next(run(thresholds, [images]))


@pytest.mark.parametrize("kind", ["stream", "anytime"])
def test_nothing_is_compiled_for_new_sizes_or_thresholds(kind):
    predict = served(kind)
    for count in (1, 2, 4, 8, 16):
        for limits in LIMITS:
            predict(limits, toys.some_images(0, count))
    with compilations() as seen:
        for count in range(1, 17):
            for limits in LIMITS:
                predict(limits, toys.some_images(1, count))
        assert not seen


def test_the_host_compiles_once_for_each_tile_and_shape_of_buffer():
    predict = served("host")
    calls = [
        (limits, toys.some_images(seed, count))
        for count in range(1, 17)
        for limits in LIMITS
        for seed in range(3)
    ]
    with compilations() as seen:
        for call in calls:
            predict(*call)
        tiles, shapes, programs = 2, 4, 2  # buffers of 2, 4, 8, 16 rows; a step and its buffers
        others = 8  # arrays that are put on the device
        assert len(seen) <= EXITS * tiles * shapes * programs + others
        seen.clear()
        for call in calls:
            predict(*call)
        assert not seen


@pytest.mark.parametrize("kind", ["host", "stream", "anytime"])
def test_bfloat16_is_carried(kind):
    """Small integers are exact in bfloat16 too."""
    predict = served(kind, jnp.bfloat16)
    network = toys.shared_network(EXITS, dtype=jnp.bfloat16)
    images = toys.some_images(7, 13)
    routed = toys.reference("gate", network, 1, [1.0, 2.0, 0.0], images)
    assert len(set(routed.exits.tolist())) > 2
    toys.assert_answers(predict([1.0, 2.0, 0.0], images), routed)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_programs_of_a_stream_and_of_the_host_lower_for_other_devices(platform):
    network = toys.shared_network(EXITS)
    variables = toys.variables(network, 1)
    images, indices = jnp.asarray(toys.some_images(0, 16)), jnp.arange(16, dtype=jnp.int32)
    samples = Samples(images, (), (), indices)
    tiles, thresholds = (8, 2), jnp.zeros(EXITS - 1)
    exits = bind_exits(network, gate, variables, thresholds)
    queues = streaming._empty_queues(exits, tiles, samples)

    def feed(queues, chunk, thresholds, flush):
        exits = bind_exits(network, gate, variables, thresholds)
        return streaming._feed(exits, tiles, queues, chunk, flush)

    args = (queues, Buffer(samples, jnp.array([16], jnp.int32)), thresholds, True)
    assert jax.jit(feed).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    step, begin = dispatch._programs(exits[0], jax.devices()[0], 8)
    args = (begin(samples), Buffer(samples, jnp.int32(16)), jnp.int32(0), thresholds)
    assert step.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_a_stream_through_a_predictor_compiles_nothing_between_batches():
    predict = served("host")
    run = rebatched(predict, batch=16)
    batches = [toys.some_images(seed, 7) for seed in range(16)]  # seven full batches
    list(run(LIMITS[0], batches))
    with compilations() as seen:
        found = list(run(LIMITS[0], batches))
        assert [len(p.labels) for p in found] == [7] * 16
        assert not seen


def test_policies_are_given_the_exit_as_a_number_but_in_loop():
    """A list cannot be indexed by a traced one."""
    gains = [1.0, -1.0, 2.0, 1.0]

    def step(output, state, e):
        return output.logits, output.gate * gains[e], state

    policy = toys.policy_of(lambda batch_size: (), step)
    network = toys.shared_network(EXITS)
    variables = toys.variables(network, 1)
    images, limits = toys.some_images(2, 9), [1.0, 1.0, 0.0]
    whole = predictor(network, policy, variables, full)(limits, images)
    assert len(set(whole.exits.tolist())) > 2
    others = [predictor(network, policy, variables, e)(limits, images) for e in (cond, compact)]
    others.append(host(network, policy, variables, tiles=(4,))(limits, images))
    others.append(anytime(network, policy, variables, images, measure=1)(limits, images, np.inf))
    others.append(next(stream(network, policy, variables, chunk=8)(limits, [images])))
    for found in others:
        jax.tree.map(np.testing.assert_array_equal, found, whole)
    with pytest.raises(jax.errors.TracerIntegerConversionError):
        predictor(network, policy, stack(network, variables), loop)(limits, images)
