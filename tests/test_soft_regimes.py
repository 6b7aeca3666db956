"""Soft gates that are annealed, hard, distilled, floored or held at a budget, and joint gates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_training import CLASSES, IMAGES, KEY, LABELS, Block, changed

from eejax import gates, training
from eejax.backbone import cut
from eejax.models.heads import Head
from eejax.network import ExitOutput
from eejax.training import REGIMES, Batch, RegimeOptions, cross_entropies
from eejax.training.regimes import (
    distilled,
    joint_gates,
    soft_annealed,
    soft_budget,
    soft_distilled,
    soft_floor,
    soft_mixture,
    soft_straight_through,
)

COST = jnp.array([0.2, 0.5, 1.0])
OPTIONS = RegimeOptions(jnp.array([0.5, 1.0, 2.0]), 0.3, COST, 0.6)
NETWORK = cut([Block(), Block(), Block()], (1, 2), lambda e: Head(CLASSES, gate="evidence"))
VARIABLES = jax.jit(NETWORK.init)(KEY, IMAGES[:1])
BATCH = Batch(IMAGES, LABELS, jax.nn.one_hot(LABELS, CLASSES))


def drawn(seed=0, batch=40):
    """Outputs of three exits and targets."""
    random = np.random.default_rng(seed)
    logits = jnp.asarray(2 * random.normal(size=(3, batch, CLASSES)), jnp.float32)
    gate = jnp.asarray(2 * random.normal(size=(3, batch)), jnp.float32)
    labels = jnp.asarray(random.integers(CLASSES, size=batch))
    return ExitOutput(logits, gate, ()), jax.nn.one_hot(labels, CLASSES)


def slope(losses, outputs, *more):
    """The gradient of the mean loss, of logits and gates."""

    def mean(logits, gate):
        return losses(ExitOutput(logits, gate, ()), *more).mean()

    return jax.jit(jax.grad(mean, argnums=(0, 1)))(outputs.logits, outputs.gate)


def mixed(outputs, targets):
    return -(targets * gates.mixed_log_probabilities(outputs.logits, outputs.gate)).sum(-1)


def own(outputs, targets):
    return (OPTIONS.exit_weights[:, None] * cross_entropies(outputs.logits, targets)).sum(0)


def test_annealing_follows_the_progress():
    values = [float(soft_annealed.temperature(jnp.float32(t))) for t in (0, 1 / 3, 2 / 3, 1)]
    np.testing.assert_allclose(values, [2, 1, 0.5, 0.25], rtol=1e-5)
    ramp = [float(soft_annealed.warm_up(jnp.float32(t))) for t in (0, 0.15, 0.3, 0.9)]
    np.testing.assert_allclose(ramp, [0, 0.5, 1, 1], rtol=1e-5)
    outputs, targets = drawn()
    for t, tau, price in ((0.0, 2.0, 0.0), (1 / 3, 1.0, 0.3), (2 / 3, 0.5, 0.3)):
        softened = outputs._replace(gate=outputs.gate / tau)
        expected = mixed(softened, targets) + own(outputs, targets)
        expected += price * gates.expected_cost(softened.gate, COST)
        found = soft_annealed.losses(outputs, targets, OPTIONS, jnp.float32(t))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_phase_hands_its_progress_to_the_losses():
    (phase,) = REGIMES["soft_annealed"].phases(OPTIONS)
    loss = jax.jit(lambda t: phase.loss(NETWORK, VARIABLES, BATCH, KEY, t)[0])
    outputs, _ = NETWORK.apply_all(VARIABLES, IMAGES, train=True, key=KEY)
    for t in (0.0, 0.2, 0.9):
        expected = soft_annealed.losses(outputs, BATCH.targets, OPTIONS, jnp.float32(t)).mean()
        assert float(loss(jnp.float32(t))) == pytest.approx(float(expected), rel=1e-5)


def test_straight_through_is_hard_forwards_and_soft_backwards():
    outputs, targets = drawn()
    hard = np.zeros((3, 40))
    first = np.asarray(outputs.gate >= 0)
    for n in range(40):
        hard[0 if first[0, n] else 1 if first[1, n] else 2, n] = 1
    np.testing.assert_allclose(gates.straight_through(outputs.gate), hard, atol=1e-6)
    each = cross_entropies(outputs.logits, targets)
    expected = (hard * (each + 0.3 * COST[:, None])).sum(0) + own(outputs, targets)
    found = soft_straight_through.losses(outputs, targets, OPTIONS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    def soft(outputs):
        pi = jnp.exp(gates.log_exit_distribution(outputs.gate))
        return (pi * (each + 0.3 * COST[:, None])).sum(0)

    _, expected = slope(soft, outputs)
    to_logits, found = slope(soft_straight_through.losses, outputs, targets, OPTIONS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert (found[:2] != 0).all()
    # A head has the gradient of the samples that take it, and of its own loss.
    alone, _ = slope(lambda outputs: each_of(outputs, targets, hard), outputs)
    np.testing.assert_allclose(to_logits, alone, rtol=1e-4, atol=1e-7)


def each_of(outputs, targets, hard):
    weights = jnp.asarray(hard, jnp.float32) + OPTIONS.exit_weights[:, None]
    return (weights * cross_entropies(outputs.logits, targets)).sum(0)


def test_soft_distillation_is_the_sum_of_both():
    outputs, targets = drawn()
    expected = mixed(outputs, targets) + distilled.losses(outputs, targets, OPTIONS)
    expected += 0.3 * gates.expected_cost(outputs.gate, COST)
    found = soft_distilled.losses(outputs, targets, OPTIONS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_floor_teaches_a_head_that_no_sample_takes():
    outputs, targets = drawn()
    shut = outputs._replace(gate=jnp.full((3, 40), 40.0))  # everything leaves at once
    without, _ = slope(soft_mixture.losses, shut, targets, OPTIONS)
    assert jnp.abs(without[1:]).max() < 1e-12
    logits, _ = slope(soft_floor.losses, shut, targets, OPTIONS)
    each, _ = slope(own, shut, targets)
    shares = [1 - 0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3]
    for e in range(3):
        np.testing.assert_allclose(logits[e], shares[e] * each[e], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("bias", [-8.0, 0.0, 3.0])
def test_the_offset_meets_the_budget_whatever_the_gates(budget, bias):
    outputs, _ = drawn(3)
    gate = outputs.gate + bias
    offset = gates.offset_for_cost(gate, COST, budget)
    assert float(gates.expected_cost(gate + offset, COST).mean()) == pytest.approx(budget, abs=1e-4)
    assert (jax.grad(lambda g: gates.offset_for_cost(g, COST, budget))(gate) == 0).all()


def test_a_budget_that_cannot_be_met_is_met_as_nearly_as_can_be():
    outputs, _ = drawn(3)
    for budget, nearest in ((0.05, 0.2), (1.5, 1.0)):
        offset = gates.offset_for_cost(outputs.gate, COST, budget)
        cost = gates.expected_cost(outputs.gate + offset, COST).mean()
        assert float(cost) == pytest.approx(nearest, abs=1e-3)


def test_the_price_of_the_budget_leaves_no_gradient_that_moves_all_gates_alike():
    outputs, targets = drawn(1)
    # The later the exit, the better, so that the budget binds.
    better = outputs.logits + jnp.array([0.0, 2, 6])[:, None, None] * targets[None]
    met = soft_budget.at_budget(outputs._replace(logits=better), OPTIONS)
    _, gate = slope(soft_budget.losses, met, targets, OPTIONS)
    assert jnp.abs(gate).max() > 1e-3
    assert abs(float(gate.sum())) < 1e-5
    price = float(soft_budget.price(met, targets, COST))
    assert price > 0.1

    def gained(offset):
        shifted = met._replace(gate=met.gate + offset)
        return mixed(shifted, targets).mean(), gates.expected_cost(shifted.gate, COST).mean()

    (a, b), (c, d) = gained(-0.05), gained(0.05)
    assert price == pytest.approx(float((c - a) / (b - d)), rel=0.01)


def test_gates_at_a_budget_learn_whom_to_let_go():
    """Half of the samples are answered by the first exit already: they are to leave there."""
    easy = np.arange(40) < 20
    targets = jax.nn.one_hot(jnp.zeros(40, jnp.int32), CLASSES)
    first = np.where(easy[:, None], [6.0, 0, 0], [0.0, 0, 0])
    last = np.tile([6.0, 0, 0], (40, 1))
    logits = jnp.asarray(np.stack([first, last]), jnp.float32)
    options = RegimeOptions(jnp.ones(2), 0.0, jnp.array([0.2, 1.0]), 0.6)

    def step(gate, _):
        def loss(gate):
            outputs = soft_budget.at_budget(ExitOutput(logits, gate, ()), options)
            return soft_budget.losses(outputs, targets, options).mean()

        return gate - 20 * jax.grad(loss)(gate), None

    start = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40)), jnp.float32)
    gate, _ = jax.lax.scan(step, start, length=200)
    met = soft_budget.at_budget(ExitOutput(logits, gate, ()), options).gate
    assert float(gates.expected_cost(met, options.cumulative_cost).mean()) == pytest.approx(
        0.6, abs=1e-3
    )
    leaves = jax.nn.sigmoid(met[0])
    assert leaves[easy].mean() > 0.9
    assert leaves[~easy].mean() < 0.1


def test_the_metrics_of_a_budget_are_of_gates_that_meet_it():
    (phase,) = REGIMES["soft_budget"].phases(OPTIONS)
    _, aux = jax.jit(lambda: phase.loss(NETWORK, VARIABLES, BATCH, KEY, jnp.float32(0)))()
    mean = gates.mean_exit_distribution(aux.outputs.gate)
    assert float((mean * COST).sum()) == pytest.approx(OPTIONS.budget, abs=1e-4)


def test_joint_gates_learn_the_best_exit_and_heads_where_the_gates_send_them():
    outputs, targets = drawn(2)
    each = np.asarray(cross_entropies(outputs.logits, targets))
    best = (each + 0.3 * np.asarray(COST)[:, None]).argmin(0)
    assert len(set(best.tolist())) == 3
    np.testing.assert_array_equal(joint_gates.best_exit(jnp.asarray(each), OPTIONS), best)
    logits, gate = slope(joint_gates.losses, outputs, targets, OPTIONS)

    pi = jnp.exp(gates.log_exit_distribution(outputs.gate))

    def of_gates(outputs):
        log_pi = gates.log_exit_distribution(outputs.gate)
        return -log_pi[best, jnp.arange(40)]

    def of_heads(outputs):
        weights = 3 * pi * OPTIONS.exit_weights[:, None]
        return (weights * cross_entropies(outputs.logits, targets)).sum(0)

    np.testing.assert_allclose(gate, slope(of_gates, outputs)[1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(logits, slope(of_heads, outputs)[0], rtol=1e-4, atol=1e-7)


def test_the_second_phase_of_joint_gates_moves_heads_and_gates_alone():
    _, phase = REGIMES["joint_gates"].phases(OPTIONS)
    step = jax.jit(training.make_train_step(NETWORK, optax.sgd(0.1), phase, classes=CLASSES))
    start = training.init_state(NETWORK, optax.sgd(0.1), KEY, IMAGES[:1])
    state, _ = step(start, IMAGES, LABELS, KEY)
    moved = changed((start.params, start.batch_stats), (state.params, state.batch_stats))
    for path, m in moved.items():
        # The last head's gate is not read.
        assert m == ("'heads'" in path and not ("[2]" in path and "gate" in path)), path


def test_a_gate_on_evidence_moves_nothing_but_itself():
    """Its loss alone, without those of the exits, has no gradient into heads and stages."""

    def loss(params):
        outputs, _ = NETWORK.apply_all({**VARIABLES, "params": params}, IMAGES, train=True)
        return gates.expected_cost(outputs.gate, COST).mean()

    for path, g in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(VARIABLES["params"])):
        name = jax.tree_util.keystr(path)
        assert bool((g != 0).any()) == ("gate" in name and "[2]" not in name), name
