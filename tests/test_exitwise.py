"""Regimes that cut, scale or freeze: which parameters get which gradient, and in which phase."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_training import (
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
    network_of,
    take,
)

from eejax.network import EarlyExitNetwork, ExitOutput, Module, keep_variables
from eejax.training import REGIMES, Batch, RegimeOptions, TrainState, cross_entropies
from eejax.training.exitwise import apply_exits, scale_gradient
from eejax.training.regimes import distilled, feature_split, hinted, sdn

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


def test_of_several_scales_feature_split_divides_the_one_that_heads_read():
    def total(features):
        parts = feature_split.split_gradient(features, first=False)
        assert isinstance(parts, tuple)
        return sum(part.sum() for part in parts)

    fine, coarse = jax.grad(total)((jnp.ones(4), jnp.ones(4)))
    np.testing.assert_array_equal(fine, [1, 1, 1, 1])
    np.testing.assert_array_equal(coarse, [0, 0, 1, 1])


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


# Where the phases end.
ENDS = {
    "exits_only": (5, 10),
    "ztw": (5, 10),
    "mixed": (5, 10),
    "layerwise": (3, 7, 10),
    "progressive": (3, 7, 10),
}


def every_phase(name):
    """The state before training and after each phase, with decay and momentum."""
    network = network_of(name)
    steps, states = make_steps(REGIMES[name].phases(OPTIONS), network), [START[network]]
    ends = ENDS[name]
    for start, end in zip((0, *ends), ends, strict=False):
        states.append(take(steps, start, end - start, states[-1])[0])
    return steps, states


@pytest.fixture(scope="module", params=ENDS)
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
        "ztw": [(everything, last), ([False] * EXITS, early)],
        "mixed": [(everything, last), (everything, everything)],
        "layerwise": [([i == e for i in range(EXITS)],) * 2 for e in range(EXITS)],
        "progressive": [([i <= e for i in range(EXITS)],) * 2 for e in range(EXITS)],
    }[name]
    for before, after, (stages, heads) in zip(states, states[1:], expected, strict=False):
        assert moved(before, after) == {"stages": stages, "heads": heads}


@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_regime_resumed_inside_any_phase_ends_bit_for_bit_alike(phased, stop):
    _, steps, states = phased
    state, _ = take(steps, 0, stop, states[0])
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


def loss_of(name, network=NETWORK, options=OPTIONS):
    """The value of the first phase's loss at the start."""
    phase = REGIMES[name].phases(options)[0]
    return phase.loss(network, START[network].variables, BATCH_OF, KEY, jnp.float32(0))[0]


def test_boosting_trains_each_exit_on_what_the_answer_before_lacks():
    network = network_of("boosted")
    bare = START[network].variables
    logits = NETWORK.apply_all(bare, IMAGES[:BATCH], train=True)[0].logits

    def loss(logits):
        before, total = jnp.zeros_like(logits[0]), 0.0
        for e, weight in enumerate(OPTIONS.exit_weights):
            answer = logits[e] + jax.lax.stop_gradient(before) / 2
            total += weight * optax.softmax_cross_entropy(answer, TARGETS).mean()
            before = answer
        return total

    assert_close(loss_of("boosted", network), loss(logits))

    # The gradient of each head, and that of the stages in equilibrium.
    def through(params, scaled):
        run = apply_exits(
            NETWORK,
            {**bare, "params": params},
            IMAGES[:BATCH],
            KEY,
            to_head=lambda e, x: scale_gradient(1 / (EXITS - e), x) if scaled else x,
            to_stage=lambda e, x: scale_gradient(1 - 1 / (EXITS - e), x) if scaled else x,
        )
        return loss(run[0].logits)

    balanced = gradient("boosted", OPTIONS, network, bare)
    assert_close(balanced, jax.grad(through)(bare["params"], True))
    assert_close(balanced["heads"], jax.grad(through)(bare["params"], False)["heads"])


@pytest.mark.parametrize("name", ["boosted", "ztw"])
def test_a_regime_for_linked_heads_refuses_others(name):
    phase = REGIMES[name].phases(OPTIONS)[-1]
    with pytest.raises(ValueError, match=rf"{name} trains .*give it eejax\.links\."):
        jax.eval_shape(
            lambda v: phase.loss(NETWORK, v, BATCH_OF, KEY, jnp.float32(0))[0],
            START[NETWORK].variables,
        )


def test_hints_compare_where_features_are_strong():
    rng = np.random.default_rng(3)
    small, large = rng.normal(size=(2, 2, 2, 5)), rng.normal(size=(2, 2, 2, 3))
    target = (small**2).mean(-1).reshape(2, 4)
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    early = (large**2).mean(-1).reshape(2, 4)
    early /= np.linalg.norm(early, axis=1, keepdims=True)
    found = hinted.hints([jnp.asarray(x, jnp.float32) for x in (large, 3 * small, small)])
    np.testing.assert_allclose(found[0], ((early - target) ** 2).sum(1), rtol=1e-4)
    np.testing.assert_allclose(found[1], 0, atol=1e-6)  # the scale of features is no matter
    # A larger map is brought to the size of the last one: a uniform one stays uniform.
    uniform = hinted.hints([jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 7))])
    np.testing.assert_allclose(uniform, 0, atol=1e-6)
    tokens = hinted.hints([jnp.ones((1, 9, 4)), jnp.ones((1, 9, 6))])
    assert tokens.shape == (1, 1)


def test_hints_are_added_to_self_distillation_and_teach_the_early_features_alone():
    variables, features = START[NETWORK].variables, []

    def read(e, x):
        features.append(x)
        return x

    apply_exits(NETWORK, variables, IMAGES[:BATCH], KEY, to_head=read)
    hint = (OPTIONS.exit_weights[:-1, None] * hinted.hints(features)).sum(0).mean()
    assert float(hint) > 0
    assert_close(loss_of("hinted") - loss_of("self_distilled"), 1000 / 128 * hint)
    last = gradient("hinted")["stages"][-1]
    assert_close(last, gradient("self_distilled")["stages"][-1])
    first = gradient("hinted")["stages"][0], gradient("self_distilled")["stages"][0]
    with pytest.raises(AssertionError):
        assert_close(*first)


def test_progressive_training_weighs_the_exits_so_far():
    variables = START[NETWORK].variables
    logits = NETWORK.apply_all(variables, IMAGES[:BATCH], train=True)[0].logits
    losses = OPTIONS.exit_weights * cross_entropies(logits, TARGETS).mean(-1)
    for e, phase in enumerate(REGIMES["progressive"].phases(OPTIONS)):
        value, aux = phase.loss(NETWORK, variables, BATCH_OF, KEY, jnp.float32(0))
        assert_close(value, losses[: e + 1].sum())
        assert_close(aux.outputs.logits[: e + 1], logits[: e + 1])
        assert set(aux.outputs.logits[e + 1 :].argmax(-1).ravel().tolist()) <= {0}
        assert aux.outputs.logits.shape == logits.shape
