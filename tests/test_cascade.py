"""A cascade is a network like any other: its answers, costs and executors."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import (
    EarlyExitNetwork,
    ExitOutput,
    cascade,
    cascade_variables,
    compact,
    cond,
    geometric,
    keep_variables,
    max_prob,
    predictor,
    xla_macs,
)
from eejax import trace as eejax_trace
from eejax.backbone import from_linen
from eejax.evaluation import routing

SEED = 4


@functools.cache
def members():
    """The heads of the second read each other's memory."""
    return tuple(toys.shared_network(exits) for exits in (1, 2, 1))


@functools.cache
def built():
    """The cascade of the toys, and variables of each of them."""
    network = cascade(members())
    made = jax.jit(network.init)(jax.random.key(SEED), jnp.zeros((1, toys.INPUTS)))
    return network, [of_member(made, i) for i in range(3)]


def of_member(variables, i):
    return {collection: tree["heads"][i] for collection, tree in variables.items()}


class Widened(nn.Module):
    """A stage with running statistics."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(self.width)(x))
        return nn.relu(x)


class Classified(nn.Module):
    """A head without memory."""

    @nn.compact
    def __call__(self, features, memory, train):
        logits = nn.Dense(toys.CLASSES)(features)
        return ExitOutput(logits, jnp.ones(len(logits)), ())


def linen_network(*widths):
    head = from_linen(Classified())
    return EarlyExitNetwork(tuple(from_linen(Widened(w)) for w in widths), (head,) * len(widths))


def test_each_exit_is_a_member_run_as_a_plain_network():
    """Of a member with early exits the last one answers."""
    network, own = built()
    images = jnp.asarray(toys.some_images(SEED, 13))
    outputs, _ = jax.jit(network.apply_all)(cascade_variables(own), images)
    assert outputs.memory == ((), (), ())

    @jax.jit
    def alone(own, images):
        return [m.apply_plain(v, images) for m, v in zip(members(), own, strict=True)]

    np.testing.assert_array_equal(outputs.logits, alone(own, images))
    assert len(np.unique(outputs.logits, axis=0)) == 3


def test_it_is_trained_like_its_members_one_by_one():
    """The same structure of variables, the last exit's answers, and everyone's own statistics."""
    plain = [linen_network(4), linen_network(5, 6)]
    network, images = cascade(plain), jnp.asarray(toys.some_images(SEED, 8))
    variables = jax.jit(network.init)(jax.random.key(0), images)
    own = [of_member(variables, i) for i in range(2)]
    shapes = [jax.eval_shape(m.init, jax.random.key(0), images) for m in plain]
    assert jax.tree.structure(own) == jax.tree.structure(shapes)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), own, shapes)
    assert jax.tree.structure(cascade_variables(own)) == jax.tree.structure(variables)

    @jax.jit
    def train(variables, own, images):
        each = [m.apply_all(v, images, train=True) for m, v in zip(plain, own, strict=True)]
        return network.apply_all(variables, images, train=True), each

    (outputs, stats), each = train(variables, own, images)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for i, (alone, moved) in enumerate(each):
        close(outputs.logits[i], alone.logits[-1])
        close(outputs.gate[i], alone.gate[-1])
        jax.tree.map(close, stats["heads"][i], moved)
    pairs = zip(jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"]), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_leaving_costs_every_member_so_far_and_no_early_head():
    plain = [linen_network(4), linen_network(5, 6), linen_network(7, 8, 9)]
    network, image = cascade(plain), jax.ShapeDtypeStruct((1, toys.INPUTS), jnp.float32)
    costs = xla_macs(network, jax.eval_shape(network.init, jax.random.key(0), image), image)
    alone = []
    for member in plain:
        variables = jax.eval_shape(member.init, jax.random.key(0), image)
        whole = xla_macs(member, variables, image)
        alone.append(whole.stages.sum() + whole.heads[-1])
    np.testing.assert_array_equal(costs.stages, 0)
    np.testing.assert_allclose(costs.heads, alone, rtol=1e-6)
    np.testing.assert_allclose(costs.cumulative, np.cumsum(alone), rtol=1e-6)


@pytest.mark.parametrize("executor", [cond, compact])
def test_executors_agree_with_the_reference(executor):
    network, own = built()
    variables, images = cascade_variables(own), toys.some_images(SEED, 13)
    trace = eejax_trace.collect(network, variables, images, np.zeros(13, int), batch=13)
    scored = routing.score(max_prob, trace)
    cost = np.array([1.0, 2.0, 4.0])
    agrees = scored.predictions == scored.predictions[:, -1:]
    limits = geometric(scored.scores, agrees, cost, 2.0, tolerance=0.1).thresholds
    routed = routing.route(scored, limits)
    assert np.bincount(routed.exits).tolist() == [6, 4, 3]
    toys.assert_answers(predictor(network, max_prob, variables, executor)(limits, images), routed)


def test_a_member_is_run_only_for_those_whom_the_others_left():
    counted = [toys.Rows(1) for _ in range(3)]
    network = cascade([toys.network(1, rows.watch) for rows in counted])
    variables = cascade_variables([built()[1][0]] * 3)  # three equal ones, held to more and more
    images, limits = jnp.asarray(toys.some_images(SEED, 12)), jnp.array([4.0, 2.0])
    run = jax.jit(functools.partial(compact, network, max_prob, tiles=(1,)))
    exits = np.asarray(run(variables, limits, images).exits)
    left = [int((exits >= e).sum()) for e in range(3)]
    assert 12 == left[0] > left[1] > left[2] > 0
    assert [rows.read() for rows in counted] == [[n] for n in left]


def test_members_can_be_left_out():
    """Nothing is shared and nothing handed on, so what is kept does not change."""
    network, own = built()
    variables, images = cascade_variables(own), jnp.asarray(toys.some_images(SEED, 5))

    @jax.jit
    def kept_and_whole(variables, images):
        some, its = network.keeping([0, 2]), keep_variables(variables, [0, 2])
        return some.apply_all(its, images)[0].logits, network.apply_all(variables, images)[0].logits

    kept, whole = kept_and_whole(variables, images)
    np.testing.assert_array_equal(kept, whole[jnp.array([0, 2])])


def test_a_cascade_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no networks; give at least one"):
        cascade([])
