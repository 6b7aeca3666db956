"""The losses, against plain formulas, and who gets a gradient from each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax.network import ExitOutput
from eejax.training import RegimeOptions, cross_entropies
from eejax.training.regimes import joint, soft_auxiliary, soft_literal, soft_mixture

REGIMES = {
    "joint": joint,
    "soft_literal": soft_literal,
    "soft_auxiliary": soft_auxiliary,
    "soft_mixture": soft_mixture,
}
LOSSES = tuple(REGIMES)
COST = np.array([0.2, 0.6, 1.0])
EXITS, BATCH, CLASSES = 3, 5, 4


def drawn(seed=0, smoothing=0.2):
    """Logits, gates, smoothed targets and weights, in float64."""
    random = np.random.default_rng(seed)
    targets = np.eye(CLASSES)[random.integers(0, CLASSES, BATCH)]
    return (
        2 * random.normal(size=(EXITS, BATCH, CLASSES)),
        2 * random.normal(size=(EXITS, BATCH)),
        (1 - smoothing) * targets + smoothing / CLASSES,
        np.array([0.3, 0.5, 1.0]),
    )


def probabilities(logits):
    p = np.exp(logits)
    return p / p.sum(-1, keepdims=True)


def exit_distribution(gates):
    g = 1 / (1 + np.exp(-gates))
    g[-1] = 1
    return np.stack([g[e] * np.prod(1 - g[:e], 0) for e in range(EXITS)])


def f32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def value_of(name, logits, gates, targets, weights, *, cost_weight=0.0):
    """The regime's loss of each sample."""
    options = RegimeOptions(weights, cost_weight, jnp.asarray(COST[: len(logits)], jnp.float32))
    return REGIMES[name].losses(ExitOutput(logits, gates, ()), targets, options)


def plain(name, logits, gates, targets, weights):
    p, pi = probabilities(logits), exit_distribution(gates)
    entropies = -(targets * np.log(p)).sum(-1)
    mixed = (pi[..., None] * p).sum(0)
    literal = -(targets * np.log(mixed)).sum(-1)
    joint = (weights[:, None] * entropies).sum(0)
    return {
        "joint": joint,
        "soft_literal": literal,
        "soft_auxiliary": literal + joint,
        "soft_mixture": (pi * weights[:, None] * entropies).sum(0),
    }[name]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_their_formulas(loss, smoothing):
    inputs = drawn(1, smoothing)
    value = jax.jit(functools.partial(value_of, loss))(*f32(*inputs))
    assert value.shape == (BATCH,)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, plain(loss, *inputs), rtol=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_train_the_gate_add_the_price_of_the_expected_cost(loss):
    inputs = drawn(8)
    free, priced = (value_of(loss, *f32(*inputs), cost_weight=weight) for weight in (0.0, 0.5))
    expected = 0.5 * (exit_distribution(inputs[1]) * COST[:, None]).sum(0) * (loss != "joint")
    np.testing.assert_allclose(priced - free, expected, atol=2e-6)


def test_each_exit_has_its_cross_entropy():
    logits, _, targets, _ = drawn(2)
    expected = -(targets * np.log(probabilities(logits))).sum(-1)
    value = cross_entropies(*f32(logits, targets))
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert value.shape == (EXITS, BATCH)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_formula(loss):
    """By central differences in float64 of the plain formula."""
    logits, gates, targets, weights = drawn(3)

    def total(logits, gates):
        return plain(loss, logits, gates.copy(), targets, weights).sum()

    slopes = jax.jit(
        jax.grad(lambda z, g: value_of(loss, z, g, *f32(targets, weights)).sum(), argnums=(0, 1))
    )(*f32(logits, gates))
    step = 1e-5
    for which, slope in enumerate(slopes):
        expected = np.zeros(slope.shape)
        for index in np.ndindex(*slope.shape):
            change = np.zeros(slope.shape)
            change[index] = step
            up = [logits, gates]
            down = [logits, gates]
            up[which], down[which] = up[which] + change, down[which] - change
            expected[index] = (total(*up) - total(*down)) / (2 * step)
        np.testing.assert_allclose(slope, expected, atol=2e-5)


def head_gradients(loss, gates):
    """The size of the gradient that each exit's logits get, `[E]`."""
    logits, _, targets, weights = drawn(4)
    targets, weights = f32(targets, weights)
    gates = jnp.asarray(gates, jnp.float32)[:, None] * jnp.ones((1, BATCH))

    def total(logits):
        return value_of(loss, logits, gates, targets, weights).sum()

    slope = jax.jit(jax.grad(total))(*f32(logits))
    return np.abs(slope).max((1, 2))


def test_the_literal_loss_starves_exits_that_are_hardly_taken_and_the_auxiliary_does_not():
    gates = [-20.0, 20.0, 0.0]  # nearly all leave at the second exit
    literal = head_gradients("soft_literal", gates)
    assert literal[1] > 0.1
    assert literal[[0, 2]].max() < 1e-6
    assert head_gradients("soft_mixture", gates)[[0, 2]].max() < 1e-6
    assert head_gradients("soft_auxiliary", gates).min() > 0.05


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_soft_losses_train_the_gates(loss):
    logits, gates, targets, weights = f32(*drawn(5))
    slope = jax.jit(jax.grad(lambda g: value_of(loss, logits, g, targets, weights).sum()))(gates)
    assert (slope[-1] == 0).all()  # the last exit takes all that is left
    assert bool((slope[:-1] != 0).all()) == (loss != "joint")


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_finite_in_bfloat16_at_extremes(loss):
    logits, gates, targets, weights = drawn(6)
    gates = jnp.asarray(np.sign(gates) * 50, jnp.bfloat16)
    logits = jnp.asarray(logits * 40, jnp.bfloat16)
    targets, weights = f32(targets, weights)

    def total(logits, gates):
        return value_of(loss, logits, gates, targets, weights).sum()

    value, slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(logits, gates)
    assert value.dtype == jnp.float32
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(s).all() for s in slopes)


@pytest.mark.parametrize("loss", LOSSES)
def test_with_one_exit_every_loss_is_cross_entropy(loss):
    logits, gates, targets, _ = f32(*drawn(7))
    value = value_of(loss, logits[:1], gates[:1], targets, jnp.ones(1))
    expected = cross_entropies(logits[:1], targets)[0]
    factor = 2 if loss == "soft_auxiliary" else 1
    np.testing.assert_allclose(value, factor * expected, rtol=1e-6)
