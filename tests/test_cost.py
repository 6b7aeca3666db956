"""Costs, against counts by hand."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import Costs, EarlyExitNetwork, ExitOutput, Module, cost, normalise, xla_macs
from eejax.backbone import from_linen
from eejax.network import keep_variables


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
    counted = xla_macs(network, *shapes(network, batch))
    first = 6 * 6 * 4 * (9 * 3 + 1)  # products; bias and relu are two halves
    second = 4 * 4 * 5 * (9 * 4 + 1)
    np.testing.assert_array_equal(counted.stages, [first, second])
    heads = [head_by_hand(6 * 6 * 4, 7), head_by_hand(4 * 4 * 5, 9)]
    np.testing.assert_array_equal(counted.heads, heads)
    assert counted.stages.dtype == counted.heads.dtype == np.float64


def test_a_convolutions_padding_is_not_counted():
    network = two_exits("SAME")
    counted = xla_macs(network, *shapes(network, 2))
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
    more = xla_macs(reading, variables, raw).stages - xla_macs(network, variables, images).stages
    # A conversion, a subtraction and a product an element, of which XLA counts the last two or all.
    assert more[1] == 0
    assert more[0] in (8 * 8 * 3 * 2 / 2, 8 * 8 * 3 * 3 / 2)


def test_leaving_pays_for_every_head_on_the_way():
    costs = Costs(np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 37.0]))
    np.testing.assert_array_equal(costs.cumulative, [11, 33, 100])
    np.testing.assert_array_equal(costs.fractions, [0.11, 0.33, 1])


def test_exits_that_are_not_kept_cost_nothing():
    """By hand; as XLA counts the kept network; and in the program that is compiled of it."""
    costs = Costs(np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 2.0, 37.0, 3.0]))
    kept = costs.keeping([1, 3])
    np.testing.assert_array_equal(kept.stages, [30, 70])
    np.testing.assert_array_equal(kept.heads, [2, 3])
    np.testing.assert_array_equal(costs.keeping([0, 2]).cumulative, [11, 98])
    with pytest.raises(ValueError, match="increasing, 0 to 3"):
        costs.keeping([3, 1])

    stage, heads = from_linen(Convolved(4, "SAME")), map(DenseHead, (40, 50, 60))
    network = EarlyExitNetwork((stage,) * 3, tuple(map(from_linen, heads)))
    variables, images = shapes(network, 2)
    whole, flops = xla_macs(network, variables, images), {}
    for exits in ([0, 1, 2], [0, 2], [2], [0]):
        one, own = network.keeping(exits), keep_variables(variables, exits)
        counted, expected = xla_macs(one, own, images), whole.keeping(exits)
        np.testing.assert_allclose(counted.stages, expected.stages, rtol=1e-6)
        np.testing.assert_array_equal(counted.heads, expected.heads)
        program = jax.jit(lambda v, x, one=one: one.apply_all(v, x)[0].logits)
        analysis = program.lower(own, images).compile().cost_analysis()
        assert analysis is not None
        flops[tuple(exits)] = analysis["flops"] / 2 / 2
    # An optimised program may compute a head's input twice rather than store it.
    slack = 8 * 8 * 4
    assert flops[0, 1, 2] - flops[0, 2] == pytest.approx(whole.heads[1], abs=slack)
    assert flops[0, 2] - flops[2,] == pytest.approx(whole.heads[0], abs=slack)
    assert flops[0,] < flops[2,] / 2


def test_networks_with_memory_and_nested_features_are_counted_without_being_run():
    ran = []
    network = toys.network(3, lambda e, x: jax.debug.callback(lambda _: ran.append(1), x[0, 0]))
    images = jax.ShapeDtypeStruct((2, toys.INPUTS), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    costs = xla_macs(network, variables, images)
    jax.effects_barrier()
    assert not ran
    assert (costs.stages >= toys.INPUTS * toys.WIDTH).all()
    assert (costs.heads >= toys.WIDTH * (toys.CLASSES + 1)).all()
    assert costs.heads[1] > costs.heads[0]  # it reads the memory of the first


def plain(apply):
    """A network of one stage without parameters, and a head that only shapes its answer."""

    def head(variables, features, memory, *, train, key=None):
        del variables, memory, train
        return ExitOutput(features.reshape(len(features), -1), jnp.zeros(len(features)), ()), {}

    stage = Module(lambda key, x: {}, lambda variables, x, *, train, key=None: (apply(x), {}))
    return EarlyExitNetwork((stage,), (Module(lambda *_: {}, head),))


def counted(apply, *shape):
    network = plain(apply)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    costs = cost.macs(network, variables, images)
    assert costs.heads.tolist() == [0]
    return costs.stages[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_count_padding_and_leave_out_what_is_elementwise(batch):
    network = two_exits("SAME")
    variables, images = shapes(network, batch)
    costs = cost.macs(network, variables, images)
    assert costs.stages.tolist() == [64 * 9 * 3 * 4, 64 * 9 * 4 * 5]
    assert costs.heads.tolist() == [64 * 4 * 7 + 70, 64 * 5 * 9 + 90]


def test_groups_strides_and_dilation_are_counted_by_what_is_multiplied():
    def convolve(x, groups, **options):
        kernel = jnp.ones((3, 3, 8 // groups, 16))
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            options.pop("window_strides", (1, 1)),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            **options,
        )

    assert counted(lambda x: convolve(x, 1), 2, 4, 6, 8) == 24 * 9 * 8 * 16
    assert counted(lambda x: convolve(x, 4), 2, 4, 6, 8) == 24 * 9 * 2 * 16
    assert counted(lambda x: convolve(x, 8), 2, 4, 6, 8) == 24 * 9 * 16
    assert counted(lambda x: convolve(x, 1, window_strides=(2, 2)), 2, 4, 6, 8) == 6 * 9 * 8 * 16
    assert counted(lambda x: convolve(x, 1, rhs_dilation=(2, 2)), 2, 4, 6, 8) == 24 * 9 * 8 * 16


def test_loops_branches_and_functions_inside_are_counted():
    square = jnp.ones((5, 5))

    def loop(x):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ square), None), x, length=7)[0]

    def branch(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ square @ square, lambda x: x @ square, x)

    assert counted(loop, 3, 5) == 7 * 25
    assert counted(branch, 3, 5) == 2 * 25
    assert counted(jax.jit(lambda x: x @ square), 3, 5) == 25
    assert counted(jax.checkpoint(lambda x: x @ square), 3, 5) == 25
    # Batched products: three heads of scores between 4 tokens.
    tokens = (2, 4, 3, 6)
    assert counted(lambda x: jnp.einsum("bqhd,bkhd->bhqk", x, x), *tokens) == 3 * 4 * 4 * 6
