"""Soft gates, against the paper's recursion in a plain loop in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eejax import gates as soft


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recursion(gates, last, each):
    """`r_e = g_e each_e + (1 - g_e) r_{e+1}` from the last exit backwards."""
    result = last
    for e in reversed(range(len(gates) - 1)):
        g = sigmoid(gates[e])
        g = g[:, None] if np.ndim(each[e]) == 2 else g
        result = g * each[e] + (1 - g) * result
    return result


def drawn(seed, exits, batch=7, classes=4, scale=3.0):
    random = np.random.default_rng(seed)
    gates = scale * random.normal(size=(exits, batch))
    return gates, scale * random.normal(size=(exits, batch, classes))


def f32(x):
    return jnp.asarray(x, jnp.float32)


depths = pytest.mark.parametrize("exits", [1, 2, 5])


@depths
def test_the_mixed_prediction_is_the_papers_recursion(exits):
    gates, logits = drawn(exits, exits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.exp(soft.mixed_log_probabilities(f32(logits), f32(gates)))
    np.testing.assert_allclose(mixed, recursion(gates, p[-1], p), rtol=2e-5)
    np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-5)


@depths
def test_the_expected_cost_is_the_papers_recursion(exits):
    gates, _ = drawn(exits, exits)
    cost = np.cumsum(np.arange(1.0, exits + 1))
    expected = recursion(gates, np.full(gates.shape[1], cost[-1]), cost)
    # Costs come as NumPy's float64 from `Costs.fractions`, or as arrays on the device.
    for kind in (np.asarray, f32):
        np.testing.assert_allclose(soft.expected_cost(f32(gates), kind(cost)), expected, rtol=2e-6)


@given(seed=st.integers(0, 2**20), exits=st.integers(1, 6), scale=st.floats(0.1, 100))
def test_the_exit_distribution_sums_to_one(seed, exits, scale):
    gates, _ = drawn(seed, exits, batch=9, scale=scale)
    log_pi = jax.jit(soft.log_exit_distribution)(f32(gates))
    assert log_pi.shape == (exits, 9)
    assert (log_pi <= 0).all()
    np.testing.assert_allclose(np.exp(log_pi).sum(0), 1, rtol=1e-5)
    expected = [sigmoid(gates[e]) * np.prod(1 - sigmoid(gates[:e]), 0) for e in range(exits - 1)]
    expected.append(np.prod(1 - sigmoid(gates[:-1]), 0))
    np.testing.assert_allclose(np.exp(log_pi), expected, atol=1e-6)


def test_the_last_exits_gate_is_not_read():
    gates, _ = drawn(0, 3)
    other = gates.copy()
    other[-1] = 40
    np.testing.assert_array_equal(
        soft.log_exit_distribution(f32(gates)), soft.log_exit_distribution(f32(other))
    )
    slope = jax.grad(lambda g: soft.expected_cost(g, jnp.arange(3.0)).sum())(f32(gates))
    assert (slope[-1] == 0).all()
    assert (slope[:-1] != 0).all()


COST = np.array([0.2, 0.6, 1.0])


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def total_with_slopes(gates, logits):
    log_f = soft.mixed_log_probabilities(logits, gates)
    assert log_f.dtype == jnp.float32
    cost = soft.expected_cost(gates, COST)
    return log_f.sum() + cost.sum(), (soft.log_exit_distribution(gates), cost)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (1, -1, 1), (-1, 1, -1)])
def test_far_gates_are_finite_with_finite_gradients(kind, signs):
    gates = (50 * jnp.array(signs, jnp.float32)[:, None] * jnp.ones((1, 2))).astype(kind)
    logits = (30 * jax.random.normal(jax.random.key(0), (3, 2, 4))).astype(kind)
    (value, (log_pi, cost)), slopes = total_with_slopes(gates, logits)
    assert np.isfinite(value)
    assert all(np.isfinite(np.float32(s)).all() for s in slopes)
    assert np.isfinite(log_pi).all()
    first = signs.index(1) if 1 in signs[:-1] else 2
    np.testing.assert_allclose(cost, COST[first], rtol=1e-6)


def test_bfloat16_inputs_are_computed_in_float32():
    gates, logits = drawn(4, 4, scale=2.0)
    rounded = (jnp.asarray(logits, jnp.bfloat16), jnp.asarray(gates, jnp.bfloat16))
    np.testing.assert_array_equal(
        soft.mixed_log_probabilities(*rounded),
        soft.mixed_log_probabilities(*(x.astype(jnp.float32) for x in rounded)),
    )


def collapse(gates):
    mean = soft.mean_exit_distribution(gates)
    return mean, soft.normalised_entropy(mean)


def test_collapse_tells_one_exit_from_many():
    even = jnp.array([[np.log(1 / 3)] * 5, [np.log(1 / 2)] * 5, [np.log(1)] * 5])
    # Gates of log odds: g_1 = 1/4, g_2 = 1/3 leave a quarter, a quarter and a half.
    mean, spread = collapse(even.astype(jnp.float32))
    np.testing.assert_allclose(mean, [0.25, 0.25, 0.5], rtol=1e-5)
    by_hand = (0.5 * np.log(4) + 0.5 * np.log(2)) / np.log(3)
    np.testing.assert_allclose(spread, by_hand, rtol=1e-5)
    for gates, where in (([50, 0, 0], 0), ([-50, 50, 0], 1), ([-50, -50, 0], 2)):
        mean, spread = collapse(jnp.array(gates, jnp.float32)[:, None] * jnp.ones((1, 4)))
        assert mean.argmax() == where
        assert 0 <= spread < 1e-6
    # Samples that are each certain, but of different exits, are no collapse.
    mean, spread = collapse(jnp.array([[50.0, -50.0], [0, 0]]))
    np.testing.assert_allclose(mean, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(spread, 1, rtol=1e-6)


def test_collapse_of_a_single_exit_is_finite_with_gradients():
    mean, spread = collapse(jnp.zeros((1, 4)))
    assert mean.tolist() == [1]
    assert spread == 0
    slope = jax.grad(lambda g: collapse(g)[1])(jnp.full((3, 2), 200.0))
    assert jnp.isfinite(slope).all()


def test_shapes_that_do_not_fit_are_caught():
    with pytest.raises(AssertionError):
        soft.log_exit_distribution(jnp.zeros(3))
    with pytest.raises(AssertionError):
        soft.mixed_log_probabilities(jnp.zeros((3, 4)), jnp.zeros((3, 4)))
