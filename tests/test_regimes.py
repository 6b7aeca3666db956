"""The table of regimes: what each moves, its formula, and its training of a network of one exit."""

import importlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from small_training import (
    CLASSES,
    IMAGES,
    KEY,
    LABELS,
    NETWORK,
    ONE_EXIT,
    OPTIONS,
    ORDER,
    PLAIN,
    SMOOTHING,
    START,
    STEPS,
    assert_close,
    begun,
    changed,
    make_steps,
    network_of,
    noise,
    optimiser,
    take,
)

from eejax import gates, training
from eejax.compiling import compiler_options
from eejax.training import REGIMES, cross_entropies
from eejax.training.regimes.distilled import temperature


@pytest.mark.parametrize("name", REGIMES)
def test_a_regime_names_its_paper_runs_and_trains_the_gate_as_it_says(name):
    module = importlib.import_module(f"eejax.training.regimes.{name}")
    assert module.REGIME is REGIMES[name]
    assert "https://" in (module.__doc__ or "")
    phases, network = REGIMES[name].phases(OPTIONS), network_of(name)
    # Without decay and momentum, what has no gradient keeps its bits.
    steps, start = make_steps(phases, network, lambda count: optax.sgd(0.1)), begun(name, network)
    state, metrics = take(steps, 0, STEPS, start)
    assert int(metrics.first_bad) == -1
    moved = changed(start.params["heads"], state.params["heads"])
    gate = {path: m for path, m in moved.items() if "gate" in path and not path.startswith("[2]")}
    assert gate
    assert set(gate.values()) == {REGIMES[name].trains_gate}
    assert all(m for path, m in moved.items() if "gate" not in path)
    assert all(changed(start.params["stages"], state.params["stages"]).values())
    assert all(changed(start.batch_stats, state.batch_stats).values())


def formula(name, logits, gate, targets):
    """The losses `[B]`, written down once more."""
    weights, cost_weight, cost = OPTIONS[:3]
    each = weights[:, None] * cross_entropies(logits, targets)
    joint = each.sum(0)
    if name == "joint":
        return joint
    if name in ("distilled", "self_distilled"):
        return distilled(name, logits, each)
    pi = jnp.exp(gates.log_exit_distribution(gate))
    literal = -(targets * gates.mixed_log_probabilities(logits, gate)).sum(-1)
    value = {
        "soft_literal": literal,
        "soft_auxiliary": literal + joint,
        "soft_mixture": (pi * weights[:, None] * cross_entropies(logits, targets)).sum(0),
    }[name]
    return value + cost_weight * (pi * cost[:, None]).sum(0)


def by_hand(network, losses, count):
    """Parameters and statistics after `count` steps of a loop without phases."""
    tx = optimiser(STEPS)

    def step(state, key, rows):
        images = noise(jax.random.fold_in(key, state.step), IMAGES[rows])
        targets = optax.smooth_labels(jax.nn.one_hot(LABELS[rows], CLASSES), SMOOTHING)

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, stats = network.apply_all(variables, images, train=True)
            return losses(outputs.logits, outputs.gate, targets).mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return training.TrainState(state.step + 1, params, stats, opt_state)

    compiled = jax.jit(step, compiler_options=compiler_options())
    state = START[network]
    for i in range(count):
        state = compiled(state, KEY, ORDER[i])
    return state


def distilled(name, logits, each):
    """Both distillations, from the weighted cross-entropies `[E, B]`; teacher without gradient."""
    teacher = lax.stop_gradient(logits[-1:])
    weights = OPTIONS.exit_weights[:-1, None]
    if name == "self_distilled":
        student, target = jax.nn.log_softmax(logits[:-1] / 3), jax.nn.softmax(teacher / 3)
        divergence = (target * (jnp.log(target) - student)).sum(-1)
        return each[-1] + 0.9 * each[:-1].sum(0) + 0.1 * 9 * (weights * divergence).sum(0)
    t = temperature(teacher[0])
    student, target = jax.nn.log_softmax(logits[:-1] / t), jax.nn.softmax(teacher / t)
    soft = -(target * student).sum(-1)
    return 0.5 * each.sum(0) + 0.5 * t**2 * (weights * soft).sum(0)


OF_OUTPUTS = ("joint", "distilled", "self_distilled", "soft_literal", "soft_auxiliary")
OF_OUTPUTS += ("soft_mixture",)  # tests/test_soft_regimes.py has the other soft ones


@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_ten_steps_are_those_of_the_formula(name):
    state, _ = take(make_steps(REGIMES[name].phases(OPTIONS)), 0, STEPS)
    expected = by_hand(NETWORK, lambda *outputs: formula(name, *outputs), STEPS)
    assert_close((state.params, state.batch_stats), (expected.params, expected.batch_stats))


@pytest.fixture(scope="module")
def ordinary():
    """The plain network's parameters after ordinary training."""

    def losses(logits, gate, targets):
        del gate
        return optax.softmax_cross_entropy(logits[0], targets)

    return by_hand(PLAIN, losses, STEPS).params


# With one exit, the mixed prediction and the exit's own count the same cross-entropy twice.
TWICE = [f"soft_{n}" for n in ("auxiliary", "annealed", "straight_through", "distilled", "budget")]


@pytest.mark.parametrize("name", [n for n in REGIMES if n not in TWICE])
def test_one_exit_is_ordinary_training(name, ordinary):
    steps = make_steps(REGIMES[name].phases(ONE_EXIT), PLAIN)
    state, _ = take(steps, 0, STEPS, begun(name, PLAIN))
    assert_close(state.params, ordinary)
