"""Regimes that combine gradients, or keep a teacher or learned weights beside the network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_training import (
    BATCH,
    IMAGES,
    KEY,
    NETWORK,
    OPTIONS,
    START,
    STEPS,
    assert_close,
    assert_same_bits,
    begun,
    changed,
    make_steps,
    take,
)
from test_exitwise import BATCH_OF, TARGETS, gradient, of_exit

from eejax import checkpoint
from eejax.training import REGIMES, Phase, Update, cross_entropies, init_state
from eejax.training.regimes import distilled, gradient_fusion, joint, pcgrad, sample_weights

VARIABLES, EXITS = START[NETWORK].variables, NETWORK.num_exits
PROGRESS = jnp.float32(0)


def updated(name, state=()):
    """One call of a regime's gradients at the start."""
    gradients = REGIMES[name].phases(OPTIONS)[0].gradients
    assert gradients is not None
    run = jax.jit(lambda state: gradients(NETWORK, VARIABLES, state, BATCH_OF, KEY, PROGRESS))
    return run(state)


@pytest.fixture(scope="module")
def terms():
    """Value and gradient of each exit's weighted cross-entropy."""
    run = jax.jit(lambda v: pcgrad.exit_gradients(NETWORK, v, BATCH_OF, KEY, OPTIONS))
    return run(VARIABLES)


def test_the_gradients_of_the_exits_are_those_of_each_alone_and_add_up_to_the_joint_one(terms):
    value, aux, gradients = terms
    outputs, stats = NETWORK.apply_all(VARIABLES, IMAGES[:BATCH], train=True)
    assert_close(value, joint.losses(outputs, TARGETS, OPTIONS).mean())
    assert_close(aux, (stats, outputs))
    assert_close(pcgrad.total(gradients), gradient("joint", OPTIONS))
    for e, found in enumerate(gradients):
        assert_close(found, jax.tree.map(lambda g, e=e: OPTIONS.exit_weights[e] * g, of_exit(e)))


def projections(gradients, i):
    """Gradient i after surgery, for every order of the others."""
    others = [j for j in range(len(gradients)) if j != i]
    for order in itertools.permutations(others):
        g = gradients[i].copy()
        for j in order:
            dot = g @ gradients[j]
            g -= min(dot, 0) / (gradients[j] @ gradients[j]) * gradients[j]
        yield g


@pytest.mark.parametrize("seed", range(4))
def test_surgery_removes_from_each_gradient_what_conflicts_with_the_others(seed):
    print("seed", seed)
    gradients = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
    gradients[1] -= gradients[0]
    choices = [list(projections(gradients, i)) for i in range(3)]
    sums = np.array([np.sum(parts, axis=0) for parts in itertools.product(*choices)])
    found = pcgrad.surgery(jnp.asarray(gradients), jax.random.key(seed))
    assert np.abs(sums - found[None]).max(1).min() < 1e-4
    assert np.abs(gradients.sum(0) - found).max() > 1e-3


def test_without_conflict_surgery_is_the_sum():
    gradients = jnp.array([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(pcgrad.surgery(gradients, KEY), [1.5, 1.0], rtol=1e-6)


def test_surgery_is_done_on_each_stage_and_leaves_heads_and_last_stage_alone(terms):
    update = updated("pcgrad")
    assert_close((update.value, update.aux), terms[:2])
    plain = gradient("joint", OPTIONS)
    assert_close(update.gradients["heads"], plain["heads"])
    assert_close(update.gradients["stages"][-1], plain["stages"][-1])
    rows = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(term["stages"][1])])
            for term in terms[2][1:]]  # fmt: skip
    expected = sum(next(projections(rows, i)) for i in range(2))  # two exits have one order
    found = jax.tree.leaves(update.gradients["stages"][1])
    np.testing.assert_allclose(np.concatenate([x.ravel() for x in found]), expected, rtol=1e-3,
                               atol=1e-6)  # fmt: skip


def test_fused_gradients_are_means_with_learned_weights(terms):
    state = gradient_fusion.begin(VARIABLES, KEY)
    sizes = [{x.shape for x in jax.tree.leaves(stage)} for stage in state["numbers"]]
    assert sizes == [{(3,)}, {(2,)}, {(1,)}]
    mean = gradient_fusion.fused(terms[2], state["numbers"])
    plain = gradient("joint", OPTIONS)
    for s in range(EXITS):
        shared = jax.tree.map(lambda g, s=s: g / (EXITS - s), plain["stages"][s])
        assert_close(mean["stages"][s], shared)
    assert_close(mean["heads"], plain["heads"])
    # A large number picks an exit, tensor by tensor.
    first, *others = state["numbers"]
    leaves, tree = jax.tree.flatten(first)
    leaves[0] = jnp.array([-30.0, 0.0, -30.0])
    picked = gradient_fusion.fused(terms[2], (tree.unflatten(leaves), *others))["stages"][0]
    found, second = jax.tree.leaves(picked), jax.tree.leaves(terms[2][1]["stages"][0])
    assert_close(found[0], second[0])
    assert_close(found[1:], jax.tree.leaves(mean["stages"][0])[1:])


def test_fusion_learns_weights_that_lower_the_loss_after_a_step(terms):
    state = gradient_fusion.begin(VARIABLES, KEY)
    update = updated("gradient_fusion", state)
    numbers = update.state["numbers"]
    assert_close(update.gradients, gradient_fusion.fused(terms[2], numbers))
    assert all(changed(state["numbers"][:-1], numbers[:-1]).values())
    (phase,) = REGIMES["gradient_fusion"].phases(OPTIONS)

    def after(numbers):
        step = gradient_fusion.fused(terms[2], numbers)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, VARIABLES["params"], step)
        variables = {**VARIABLES, "params": params}
        return phase.loss(NETWORK, variables, BATCH_OF, KEY, PROGRESS)[0]

    assert float(after(numbers)) < float(after(state["numbers"]))


LOGITS = jnp.asarray(np.random.default_rng(2).normal(size=(3, 20, 4)), jnp.float32)


def test_each_sample_is_allocated_to_one_exit_the_confident_first():
    chosen = np.asarray(sample_weights.allocated(LOGITS))
    shares = 0.75 ** np.arange(1, 4)
    counts = np.floor(20 * shares / shares.sum())
    assert chosen.sum(0).tolist() == [1] * 20
    assert chosen.sum(1).tolist() == [counts[0], counts[1], 20 - counts[0] - counts[1]]
    confidence = np.asarray(jax.nn.softmax(LOGITS).max(-1))
    assert confidence[0][chosen[0]].min() >= confidence[0][~chosen[0]].max()
    left = ~chosen[0]
    assert confidence[1][chosen[1]].min() >= confidence[1][left & ~chosen[1]].max()


def test_sample_weights_are_one_on_average_and_within_their_range():
    weigher = sample_weights.begin(VARIABLES, KEY)["weigher"]
    weights = sample_weights.sample_weights(weigher, 5 * jnp.abs(LOGITS[..., 0]))
    assert weights.shape == (3, 20)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
    assert 0.4 <= float(weights.min()) < float(weights.max()) <= 1.6


def test_the_weigher_learns_through_the_look_ahead_step():
    """Against the gradient of the whole look-ahead, and the loss against its formula."""
    state, half = sample_weights.begin(VARIABLES, KEY), BATCH // 2

    def losses(params, rows):
        outputs, _ = NETWORK.apply_all({**VARIABLES, "params": params}, IMAGES[rows], train=True)
        weighed = OPTIONS.exit_weights[:, None] * cross_entropies(outputs.logits, TARGETS[rows])
        return weighed, outputs.logits

    def ahead(weigher):
        def weighted(params):
            found = losses(params, slice(half))[0]
            weights = sample_weights.sample_weights(weigher, jax.lax.stop_gradient(found))
            return (weights * found).sum(0).mean()

        params = VARIABLES["params"]
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(weighted)(params))
        found, logits = losses(params, slice(half, BATCH))
        chosen = sample_weights.allocated(logits).astype(jnp.float32)
        return ((chosen * found).sum(1) / chosen.sum(1)).sum()

    update = updated("sample_weights", state)
    adam = update.state["adam"][0]
    # The first moment after one step is a tenth of the gradient.
    expected = jax.tree.map(lambda g: 0.1 * g, jax.jit(jax.grad(ahead))(state["weigher"]))
    for found, whole in zip(adam.mu, expected, strict=True):
        assert float(jnp.abs(whole).max()) > 0
        np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-4 * float(jnp.abs(whole).max()))
    found, _ = losses(VARIABLES["params"], slice(BATCH))
    weights = sample_weights.sample_weights(update.state["weigher"], found)
    assert_close(update.value, (weights * found).sum(0).mean())


def test_the_teacher_is_the_plain_network_as_the_second_phase_finds_it_and_stays():
    phases = REGIMES["frozen_teacher"].phases(OPTIONS)
    steps, start = make_steps(phases), begun("frozen_teacher", NETWORK)
    plain, _ = take(steps, 0, 5, start)
    assert_same_bits(plain.regime, start.regime)
    first, _ = take(steps, 5, 1, plain)
    assert_same_bits(first.regime, plain.variables)
    last, _ = take(steps, 6, 4, first)
    assert_same_bits(last.regime, plain.variables)
    assert all(changed(last.params["stages"], plain.params["stages"]).values())


def test_a_training_state_begins_with_that_of_the_regime():
    begin = REGIMES["frozen_teacher"].phases(OPTIONS)[0].begin
    state = init_state(NETWORK, optax.sgd(0.1), KEY, IMAGES[:1], begin)
    assert_same_bits(state.regime, state.variables)
    assert_same_bits(state.variables, VARIABLES)


def test_the_loss_with_a_teacher_is_that_of_the_formula():
    phase = REGIMES["frozen_teacher"].phases(OPTIONS)[1]
    teacher = jax.tree.map(lambda x: 2 * x, dict(VARIABLES))
    value, _ = phase.loss(NETWORK, VARIABLES, BATCH_OF, KEY, PROGRESS, teacher)
    logits = NETWORK.apply_all(VARIABLES, IMAGES[:BATCH], train=True)[0].logits
    target = NETWORK.apply_all(teacher, IMAGES[:BATCH])[0].logits[-1]
    t = distilled.temperature(target)
    soft = -(jax.nn.softmax(target / t)[None] * jax.nn.log_softmax(logits / t)).sum(-1)
    each = cross_entropies(logits, TARGETS) / 2 + t**2 * soft / 2
    assert_close(value, (OPTIONS.exit_weights[:, None] * each).sum(0).mean())


@pytest.mark.parametrize("name", ["frozen_teacher", "gradient_fusion", "sample_weights"])
def test_what_a_regime_keeps_is_resumed_bit_for_bit(name, tmp_path):
    steps, start = make_steps(REGIMES[name].phases(OPTIONS)), begun(name, NETWORK)
    whole, _ = take(steps, 0, STEPS, start)
    for stop in (3, 7):
        state, _ = take(steps, 0, stop, start)
        checkpoint.save(tmp_path / str(stop), stop, state)
        _, restored = checkpoint.restore(tmp_path / str(stop), start)
        assert_same_bits(take(steps, stop, STEPS - stop, restored)[0], whole)


def test_a_regimes_own_gradients_and_state_replace_those_of_its_loss():
    """A made-up regime: descent along ones, and a count of the steps."""

    def gradients(network, variables, state, batch, key, progress):
        _, aux = joint.REGIME.phases(OPTIONS)[0].loss(network, variables, batch, key, progress)
        ones = jax.tree.map(jnp.ones_like, variables["params"])
        return Update(jnp.float32(7), aux, ones, {"steps": state["steps"] + 1})

    def heads(variables):
        return {name: {"stages": False, "heads": True} for name in variables}

    def begin(variables, key):
        del variables, key
        return {"steps": jnp.int32(0)}

    def refused(*arguments):
        pytest.fail("the loss was called")

    phases = (Phase(1.0, refused, heads, begin, gradients),)
    tx = optax.sgd(0.5)
    start = START[NETWORK]._replace(opt_state=tx.init(START[NETWORK].params))
    steps = make_steps(phases, tx=lambda count: tx)
    with pytest.raises(ValueError, match=r"the training state has none; make it with init_state"):
        take(steps, 0, 1, start)
    state, metrics = take(steps, 0, 4, start._replace(regime=begin(None, KEY)))
    assert int(state.regime["steps"]) == 4
    assert float(metrics.loss) == 28
    assert_same_bits(state.params["stages"], start.params["stages"])
    assert_close(state.params["heads"], jax.tree.map(lambda p: p - 2, start.params["heads"]))
