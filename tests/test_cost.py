"""Costs, against counts by hand."""

from __future__ import annotations

import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import Costs, EarlyExitNetwork, ExitOutput, cost, macs, normalise
from eejax.adapters import from_linen


class Convolved(nn.Module):
    features: int
    padding: str

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.Conv(self.features, (3, 3), padding=self.padding)(x))


class DenseHead(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, features, memory, train):
        x = features.reshape(len(features), -1)
        logits = nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))
        return ExitOutput(logits, jnp.zeros(len(logits)), ())


def two_exits(padding):
    return EarlyExitNetwork(
        (from_linen(Convolved(4, padding)), from_linen(Convolved(5, padding))),
        (from_linen(DenseHead(7)), from_linen(DenseHead(9))),
    )


def shapes(network, batch, size=8):
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), images), images


def head_by_hand(inputs, hidden):
    products = inputs * hidden + hidden * 10
    elementwise = hidden + hidden + 10  # two biases and a relu
    return products + elementwise / 2


@pytest.mark.parametrize("batch", [1, 6])
def test_counts_by_hand_of_dense_and_valid_convolution(batch):
    """Exact: the multiply-accumulates, and half of one for each elementwise operation."""
    network = two_exits("VALID")
    counted = macs(network, *shapes(network, batch))
    first = 6 * 6 * 4 * (9 * 3 + 1)  # products; bias and relu are two halves
    second = 4 * 4 * 5 * (9 * 4 + 1)
    np.testing.assert_array_equal(counted.stages, [first, second])
    heads = [head_by_hand(6 * 6 * 4, 7), head_by_hand(4 * 4 * 5, 9)]
    np.testing.assert_array_equal(counted.heads, heads)
    assert counted.stages.dtype == counted.heads.dtype == np.float64


def test_a_convolutions_padding_is_not_counted():
    network = two_exits("SAME")
    counted = macs(network, *shapes(network, 2))
    # Along one axis of 8 the taps of a kernel of 3 that fall inside: 3 each, less one at each end.
    taps = (3 * 8 - 2) ** 2
    by_hand = taps * 3 * 4 + 8 * 8 * 4
    padded = 64 * 9 * 3 * 4 + 8 * 8 * 4
    assert counted.stages[0] == by_hand < padded


def test_what_reads_raw_images_costs_too():
    network = two_exits("VALID")
    reading = network.reading(normalise((1.0,) * 3, (2.0,) * 3))
    variables, images = shapes(network, 2)
    raw = jax.ShapeDtypeStruct(images.shape, jnp.uint8)
    more = macs(reading, variables, raw).stages - macs(network, variables, images).stages
    # A conversion, a subtraction and a product an element, of which XLA counts the last two or all.
    assert more[1] == 0
    assert more[0] in (8 * 8 * 3 * 2 / 2, 8 * 8 * 3 * 3 / 2)


def test_leaving_pays_for_every_head_on_the_way():
    costs = Costs(np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 37.0]))
    np.testing.assert_array_equal(costs.cumulative, [11, 33, 100])
    np.testing.assert_array_equal(costs.fractions, [0.11, 0.33, 1])


def test_networks_with_memory_and_nested_features_are_counted_without_being_run():
    ran = []
    network = toys.network(3, lambda e, x: jax.debug.callback(lambda _: ran.append(1), x[0, 0]))
    images = jax.ShapeDtypeStruct((2, toys.INPUTS), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    costs = macs(network, variables, images)
    jax.effects_barrier()
    assert not ran
    assert (costs.stages >= toys.INPUTS * toys.WIDTH).all()
    assert (costs.heads >= toys.WIDTH * (toys.CLASSES + 1)).all()
    assert costs.heads[1] > costs.heads[0]  # it reads the memory of the first


def test_stages_are_timed_each_with_its_head():
    """A stage with fifty times the work takes longer."""

    class Heavy(nn.Module):
        turns: int

        @nn.compact
        def __call__(self, x, train):
            kernel = self.param("kernel", nn.initializers.orthogonal(), (64, 64))
            for _ in range(self.turns):
                x = jnp.sin(x @ kernel)
            return x

    head = from_linen(DenseHead(4))
    network = EarlyExitNetwork(
        (from_linen(Heavy(1)), from_linen(Heavy(50)), from_linen(Heavy(1))), (head, head, head)
    )
    images = jnp.ones((256, 64))
    variables = jax.jit(network.init)(jax.random.key(0), images)
    seconds = cost.stage_seconds(network, variables, images, repeats=5)
    assert seconds.shape == (3,)
    assert (seconds > 0).all()
    assert seconds[1] > 2 * max(seconds[0], seconds[2])


@pytest.mark.parametrize("burst", [0.0, 0.1])
def test_paired_runs_are_interleaved_and_warmed_up(burst, monkeypatch):
    monkeypatch.setattr(cost, "BURST_SECONDS", burst)
    order = []

    def call(name, pause):
        def run():
            order.append(name)
            time.sleep(pause)
            return jnp.zeros(1)

        return run

    times = cost.paired_seconds([call("a", 0.04), call("b", 0.2)], repeats=3, warmup=1)
    rounds = "".join(order)
    assert rounds.startswith("aabb")  # a first call, and one that says how long it takes
    # A short call is repeated in a row, after one that is not timed.
    assert re.fullmatch("ab" * 3 if burst == 0 else "(a{2,3}b){3}", rounds[4:])
    assert times.shape == (2, 3)
    assert (times[0] >= 0.04).all()
    assert (times[1] >= 0.2).all()
    assert (times[0] < times[1]).all()
