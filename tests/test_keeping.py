"""A network with only some of its exits: outputs, statistics, structure, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import EarlyExitNetwork, ExitOutput, Module
from eejax.inference import compaction
from eejax.network import keep_variables


def _stage_init(key, features):
    kernel = toys.integers(key, features.shape[-1], toys.WIDTH)
    return {"params": {"kernel": kernel}, "batch_stats": {"mean": jnp.zeros(toys.WIDTH)}}


def _stage(variables, features, *, train, key=None):
    x = jnp.clip(features @ variables["params"]["kernel"], -8, 8)
    before = variables["batch_stats"]["mean"]
    after = (before + x.mean(0)) / 2 if train else before
    return x + before[None], {"mean": after}


def _head_init(key, features, memory):
    del memory
    return {"params": {"kernel": toys.integers(key, features.shape[-1], toys.CLASSES)}}


def _head(variables, features, memory, *, train, key=None):
    del memory, train
    logits = features @ variables["params"]["kernel"]
    return ExitOutput(logits, logits[:, 0], ()), {}


@functools.cache
def whole_numbers():
    """Five exits of equal modules, exact and without memory, and variables."""
    stages, heads = (Module(_stage_init, _stage),) * 5, (Module(_head_init, _head),) * 5
    network = EarlyExitNetwork(stages, heads)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, toys.INPUTS)))
    means = jax.tree.map(lambda x: x + 1, variables["batch_stats"])
    return network, {**variables, "batch_stats": means}


@pytest.mark.parametrize("exits", [(0,), (4,), (2, 3), (0, 3, 4), (0, 1, 2, 3, 4), (1, 3)])
def test_kept_exits_say_what_they_said_in_the_whole_network(exits):
    network, variables = whole_numbers()
    images = jnp.asarray(toys.some_images(0, 6))
    every, _ = jax.jit(network.apply_all)(variables, images)
    kept = network.keeping(exits)
    own = keep_variables(variables, exits)
    outputs, _ = jax.jit(kept.apply_all)(own, images)
    assert kept.num_exits == len(exits)
    np.testing.assert_array_equal(outputs.logits, every.logits[np.array(exits)])
    np.testing.assert_array_equal(outputs.gate, every.gate[np.array(exits)])
    # What the kept network starts from by itself has the same structure and shapes.
    fresh = jax.eval_shape(kept.init, jax.random.key(1), images)
    shapes = keep_variables(jax.eval_shape(lambda: variables), exits)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), fresh, shapes)
    if len(exits) == 5:
        assert kept == network


def test_modules_of_a_kept_network_are_the_same_or_equal():
    """By which `loop` sees that stages can share a program, and `jit` that it knows a network."""
    network, _ = whole_numbers()
    kept = network.keeping([0, 2, 4])
    assert kept.stages[0] is network.stages[0]
    assert compaction.runs(kept) == [(0, 1), (1, 3)]
    assert kept == network.keeping([0, 2, 4]) != network.keeping([0, 2, 3])


def test_a_truncated_network_trains_every_stage_and_updates_its_statistics():
    network, variables = whole_numbers()
    images = jnp.asarray(toys.some_images(0, 8))
    kept, own = network.keeping([2]), keep_variables(variables, [2])
    # From scratch: the merged stages do not start from the same numbers.
    fresh = jax.jit(kept.init)(jax.random.key(0), images)
    _, second, third = (stage["kernel"] for stage in fresh["params"]["stages"][0])
    assert (second != third).any()

    def loss(params):
        outputs, stats = kept.apply_all({**own, "params": params}, images, train=True)
        return -jax.nn.log_softmax(outputs.logits[0])[:, 0].mean(), stats

    gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(own["params"])
    for stage in gradients["stages"][0]:
        assert np.abs(stage["kernel"]).max() > 0
    _, whole = jax.jit(functools.partial(network.apply_all, train=True))(variables, images)
    expected = keep_variables({"batch_stats": whole}, [2])["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, stats, expected)
    for stage in stats["stages"][0]:
        assert (stage["mean"] != 1).any()


def test_a_head_is_not_kept_without_the_memory_that_it_reads():
    network = toys.shared_network(4)
    variables, images = toys.variables(network), jnp.asarray(toys.some_images(0, 3))

    def run(exits):
        kept = network.keeping(exits)
        return jax.jit(kept.apply_all)(keep_variables(variables, exits), images)[0]

    # Exits from the first on lose nothing.
    every = jax.jit(network.apply_all)(variables, images)[0]
    np.testing.assert_array_equal(run([0, 1]).logits, every.logits[:2])
    with pytest.raises(ValueError, match="the head before it is dropped; keep every exit up to"):
        run([0, 2])
    with pytest.raises(ValueError, match="takes or hands on memory"):
        jax.eval_shape(network.keeping([0, 3]).init, jax.random.key(0), images)

    def hands_on(variables, features, memory, *, train, key=None):
        output, stats = _head(variables, features, memory, train=train)
        return output._replace(memory=output.logits), stats

    plain, variables = whole_numbers()
    cascade = EarlyExitNetwork(plain.stages, (Module(_head_init, hands_on),) * 5)
    with pytest.raises(ValueError, match="takes or hands on memory"):
        cascade.keeping([4]).apply_all(keep_variables(variables, [4]), images)


@pytest.mark.parametrize("exits", [[], [-1, 2], [1, 1], [2, 0], [0, 5]])
def test_only_exits_that_are_there_and_in_order_can_be_kept(exits):
    network, variables = whole_numbers()
    for keep in (network.keeping, functools.partial(keep_variables, variables)):
        with pytest.raises(ValueError, match="give at least one, increasing, 0 to 4"):
            keep(exits)
