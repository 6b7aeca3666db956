"""Regimes that cut, scale or freeze: which parameters get which gradient, and in which phase."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_regimes import (
    BATCH,
    CLASSES,
    IMAGES,
    KEY,
    LABELS,
    NETWORK,
    OPTIONS,
    START,
    STEPS,
    assert_close,
    assert_same_bits,
    changed,
    make_steps,
    take,
)

from eejax.network import EarlyExitNetwork, ExitOutput, Module, keep_variables
from eejax.training import REGIMES, Batch, RegimeOptions, TrainState, cross_entropies
from eejax.training.exitwise import apply_exits, scale_gradient
from eejax.training.regimes import distilled, feature_split, sdn

EXITS = NETWORK.num_exits
TARGETS = jax.nn.one_hot(LABELS, CLASSES)[:BATCH]
BATCH_OF = Batch(IMAGES[:BATCH], LABELS[:BATCH], TARGETS)
EQUAL = OPTIONS._replace(exit_weights=jnp.ones(EXITS))


def gradient(name, options=EQUAL, network=NETWORK, variables=None, batch=BATCH_OF):
    """The gradient of the first phase's loss in the parameters."""
    variables = START[NETWORK].variables if variables is None else variables
    phase = REGIMES[name].phases(options)[0]

    def loss(params):
        return phase.loss(network, {**variables, "params": params}, batch, KEY, jnp.float32(0))[0]

    return jax.jit(jax.grad(loss))(variables["params"])


def of_exit(e):
    """The gradient of one exit's cross-entropy, through the whole network below it."""
    return gradient("joint", EQUAL._replace(exit_weights=jnp.eye(EXITS)[e]))


def test_running_exit_by_exit_is_apply_all():
    variables, images = START[NETWORK].variables, IMAGES[:BATCH]
    expected = NETWORK.apply_all(variables, images, train=True, key=KEY)
    assert_close(apply_exits(NETWORK, variables, images, KEY), expected)
    frozen = [False] * EXITS
    outputs, stats = apply_exits(
        NETWORK, variables, images, KEY, train_stages=frozen, train_heads=frozen
    )
    assert_close(outputs, NETWORK.apply_all(variables, images)[0])
    assert_same_bits(stats, variables["batch_stats"])


def test_a_scaled_gradient_leaves_the_features_alone():
    features = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    assert_same_bits(scale_gradient(0.25, features), features)

    def total(x):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(x))

    scaled = jax.grad(lambda x: total(scale_gradient(0.25, x)))(features)
    assert_close(scaled, jax.tree.map(lambda x: jnp.full_like(x, 0.25), features))
    assert scaled["b"].dtype == jnp.bfloat16


def test_gradient_equilibrium_divides_by_the_number_of_exits_above():
    balanced, joint = gradient("gradient_equilibrium"), gradient("joint")
    assert_close(balanced["heads"], joint["heads"])
    for e in range(EXITS):
        expected = jax.tree.map(lambda g, e=e: g / (EXITS - e), joint["stages"][e])
        assert_close(balanced["stages"][e], expected)


def test_local_training_gives_a_stage_the_gradient_of_its_own_exit():
    local = gradient("local")
    for e in range(EXITS):
        alone = of_exit(e)
        assert_close(local["stages"][e], alone["stages"][e])
        assert_close(local["heads"][e], alone["heads"][e])


def with_features(values):
    """Two exits; the features of the first stage are its parameters."""

    def init(key, *inputs):
        del key, inputs
        return {"params": {"w": values}, "batch_stats": {}}

    def first(variables, images, *, train, key=None):
        del images, train, key
        return variables["params"]["w"][None], {}

    def second(variables, features, *, train, key=None):
        del train, key
        return features * variables["params"]["w"][None], {}

    def answer(variables, features, memory, *, train, key=None):
        del memory, train, key
        logits = jnp.sin(features * variables["params"]["w"][None])
        return ExitOutput(logits, jnp.zeros(1), ()), {}

    head = Module(init, answer)
    return EarlyExitNetwork((Module(init, first), Module(init, second)), (head, head))


def test_feature_split_divides_the_channels_between_the_head_and_the_rest():
    network = with_features(jnp.arange(1.0, 5.0))
    batch = Batch(jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32), jnp.eye(4)[:1])
    variables = network.init(KEY, batch.images)

    def features(name, weights):
        options = RegimeOptions(jnp.asarray(weights), 0.0, jnp.array([0.5, 1.0]))
        return gradient(name, options, network, variables, batch)["stages"][0]["w"]

    split = features("feature_split", [1.0, 1.0])
    np.testing.assert_allclose(split[:2], features("joint", [1.0, 0.0])[:2], rtol=1e-6)
    np.testing.assert_allclose(split[2:], features("joint", [0.0, 1.0])[2:], rtol=1e-6)
    assert_same_bits(feature_split.split_gradient(split, first=True), split)


def test_the_weights_of_sdn_grow_to_the_cost():
    cost = jnp.array([0.3, 0.005, 1.0])
    for progress, first in [(0.0, 0.01), (0.5, 0.16), (1.0, 0.3)]:
        weights = sdn.weights(cost, jnp.float32(progress))
        np.testing.assert_allclose(weights, [first, 0.005, 1], rtol=1e-6)
    variables = START[NETWORK].variables
    outputs, _ = NETWORK.apply_all(variables, IMAGES[:BATCH], train=True)
    losses = cross_entropies(outputs.logits, TARGETS)
    (phase,) = REGIMES["sdn"].phases(OPTIONS)
    for progress in (0.0, 0.5):
        value, _ = phase.loss(NETWORK, variables, BATCH_OF, KEY, jnp.float32(progress))
        weights = sdn.weights(OPTIONS.cumulative_cost, jnp.float32(progress))
        assert_close(value, (weights[:, None] * losses).sum(0).mean())


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 50.0])
def test_the_teacher_is_softened_as_far_as_needed(scale):
    logits = scale * jax.random.normal(KEY, (64, 10))

    def confidence(t):
        return float(jax.nn.softmax(logits / t).max(-1).mean())

    t = float(distilled.temperature(logits))
    assert confidence(t) <= 0.5
    assert t == 1 or confidence(t / 1.05) > 0.5
    assert float(distilled.temperature(jnp.zeros((3, 2)) + jnp.array([[5.0, 0.0]]))) < 20_000


def every_phase(name):
    """The state before training and after each phase, with decay and momentum."""
    steps, states = make_steps(REGIMES[name].phases(OPTIONS)), [START[NETWORK]]
    ends = {"exits_only": (5, 10), "mixed": (5, 10), "layerwise": (3, 7, 10)}[name]
    for start, end in zip((0, *ends), ends, strict=False):
        states.append(take(steps, start, end - start, states[-1])[0])
    return steps, states


@pytest.fixture(scope="module", params=["exits_only", "mixed", "layerwise"])
def phased(request):
    return request.param, *every_phase(request.param)


def moved(before, after):
    """Which stages and heads, running statistics included, have other bits."""
    leaves = changed(before.variables, after.variables)

    def any_of(kind, e):
        return any(m for path, m in leaves.items() if f"['{kind}'][{e}]" in path)

    return {kind: [any_of(kind, e) for e in range(EXITS)] for kind in ("stages", "heads")}


def test_each_phase_moves_its_parts_and_keeps_the_bits_of_the_rest(phased):
    name, _, states = phased
    everything = [True] * EXITS
    last, early = [False, False, True], [True, True, False]
    expected = {
        "exits_only": [(everything, last), ([False] * EXITS, early)],
        "mixed": [(everything, last), (everything, everything)],
        "layerwise": [([i == e for i in range(EXITS)],) * 2 for e in range(EXITS)],
    }[name]
    for before, after, (stages, heads) in zip(states, states[1:], expected, strict=False):
        assert moved(before, after) == {"stages": stages, "heads": heads}


@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_regime_resumed_inside_any_phase_ends_bit_for_bit_alike(phased, stop):
    _, steps, states = phased
    state, _ = take(steps, 0, stop)
    assert_same_bits(take(steps, stop, STEPS - stop, state)[0], states[-1])


def test_the_last_exit_of_exits_only_is_that_of_the_plain_network():
    """Its first phase is ordinary training of the network that ends there."""
    plain = NETWORK.keeping([EXITS - 1])
    whole = START[NETWORK]
    phase = REGIMES["exits_only"].phases(OPTIONS)[0]._replace(share=1.0)
    trained, _ = take(make_steps([phase], tx=lambda count: optax.sgd(0.1)), 0, STEPS)
    outputs = NETWORK.apply_all(trained.variables, IMAGES)[0].logits[-1]
    (ordinary,) = REGIMES["joint"].phases(RegimeOptions(jnp.ones(1), 0.0, jnp.ones(1)))
    kept = keep_variables(whole.variables, [EXITS - 1])
    opt_state = optax.sgd(0.1).init(kept["params"])
    start = TrainState(whole.step, kept["params"], kept["batch_stats"], opt_state)
    steps = make_steps([ordinary], plain, tx=lambda count: optax.sgd(0.1))
    alone, _ = take(steps, 0, STEPS, start)
    assert_close(plain.apply_plain(alone.variables, IMAGES), outputs)
