"""Training regimes: the table, and phases of a regime that is made up for the tests."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from eejax import checkpoint, gates, training
from eejax.backbone import cut
from eejax.compiling import compiler_options
from eejax.links import LINKS
from eejax.models.heads import Head
from eejax.models.layers import Norm
from eejax.training import REGIMES, Batch, LossAux, Phase, RegimeOptions, cross_entropies
from eejax.training.regimes.distilled import temperature

CLASSES, BATCH, STEPS, SMOOTHING = 3, 16, 10, 0.1
KEY = jax.random.key(5)
ONE_EXIT = RegimeOptions(jnp.ones(1), 0.0, jnp.ones(1))
OPTIONS = RegimeOptions(jnp.array([0.5, 1.0, 2.0]), 0.3, jnp.array([0.3, 0.6, 1.0]))


class Block(nn.Module):
    """Each pixel by itself: no convolution, so that it compiles in a moment."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.relu(Norm()(nn.Dense(8, use_bias=False)(x), train=train))


NETWORK = cut([Block(), Block(), Block()], (1, 2), lambda e: Head(CLASSES, gate="features"))
PLAIN = NETWORK.keeping([2])
LINKED = {None: NETWORK, **{name: link(NETWORK) for name, link in LINKS.items()}}
RNG = np.random.default_rng(0)
LABELS = jnp.asarray(RNG.integers(0, CLASSES, 64), jnp.int32)
IMAGES = jnp.asarray(
    RNG.normal(size=(64, 4, 4, 1)) + np.asarray(LABELS)[:, None, None, None], jnp.float32
)
ORDER = jnp.asarray(np.stack([RNG.permutation(64)[:BATCH] for _ in range(STEPS)]), jnp.int32)


def optimiser(count):
    """Momentum, decay and a schedule: everything that could move a frozen parameter."""
    rate = optax.linear_schedule(0.1, 0.01, count)
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, 0.9))


START = {
    network: training.init_state(network, optimiser(1), KEY, IMAGES[:1])
    for network in (PLAIN, *LINKED.values())
}


def begun(name, network):
    """The state before training, with what the regime keeps beside the network."""
    exits = network.num_exits
    begin = REGIMES[name].phases(OPTIONS if exits > 1 else ONE_EXIT)[0].begin
    start = START[network]
    return start if begin is None else start._replace(regime=begin(start.variables, KEY))


def network_of(name):
    """The network that a regime trains."""
    return LINKED[REGIMES[name].link]


def noise(key, images):
    return images + 0.01 * jax.random.normal(key, images.shape)


def make_steps(phases, network=NETWORK, tx=optimiser, steps=STEPS, augment=noise):
    options = {"steps": steps, "classes": CLASSES, "label_smoothing": SMOOTHING}
    return training.make_train_steps(network, tx, phases, augment, **options)


def take(train_steps, start, count, state=None):
    """`count` steps from `start` on, from a copy of the state, which training donates."""
    state = jax.tree.map(jnp.copy, START[NETWORK] if state is None else state)
    return train_steps(state, KEY, IMAGES, LABELS, ORDER, start, count)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def changed(before, after):
    """Which leaves have other bits, by path."""
    differs = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    return {jax.tree_util.keystr(path): d for path, d in jax.tree.leaves_with_path(differs)}


# The table.


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


def assert_close(a, b):
    """Equal up to the last bits, which may differ between two compiled programs."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


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


# Phases, of a regime that is made up.


def heads_loss(network, variables, batch: Batch, key, progress):
    """The heads learn on the features of stages in inference mode."""
    del key, progress
    features, memory, outputs, stats = batch.images, (), [], []
    for e in range(network.num_exits):
        features, _ = network.apply_stage(variables, e, features)
        output, after = network.apply_head(variables, e, features, memory, train=True)
        memory = output.memory
        outputs.append(output)
        stats.append(after)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *outputs)
    stats = {"stages": variables["batch_stats"]["stages"], "heads": tuple(stats)}
    loss = cross_entropies(stacked.logits, batch.targets).sum(0).mean()
    return loss, LossAux(stats, stacked)


def everything_loss(network, variables, batch, key, progress):
    """All exits jointly, the last one three times as much at the end as in the beginning."""
    outputs, stats = network.apply_all(variables, batch.images, train=True, key=key)
    weights = jnp.ones(network.num_exits).at[-1].set(1 + 2 * progress)
    loss = (weights[:, None] * cross_entropies(outputs.logits, batch.targets)).sum(0).mean()
    return loss, LossAux(stats, outputs)


def heads_only(variables):
    del variables
    return {"params": {"stages": False, "heads": (True, True, False)}, "batch_stats": False}


def stages_only(variables):
    del variables
    return {name: {"stages": True, "heads": False} for name in ("params", "batch_stats")}


PHASES = (
    Phase(0.4, everything_loss),
    Phase(0.3, heads_loss, heads_only),
    Phase(0.3, everything_loss, stages_only),
)


@pytest.fixture(scope="module")
def three_phases():
    return make_steps(PHASES)


@pytest.fixture(scope="module")
def after(three_phases):
    """The state after each phase."""
    first, _ = take(three_phases, 0, 4)
    second, _ = take(three_phases, 4, 3, first)
    third, _ = take(three_phases, 7, 3, second)
    return first, second, third


def test_a_phase_moves_what_it_trains_and_keeps_the_bits_of_the_rest(after):
    first, second, third = after
    assert all(changed(START[NETWORK].params, first.params).values())
    assert all(changed(START[NETWORK].batch_stats, first.batch_stats).values())
    # Momentum from the first phase, or decay, would show here.
    moved = changed(first.params, second.params)
    assert {m for path, m in moved.items() if "'stages'" in path} == {False}
    assert {m for path, m in moved.items() if "['heads'][2]" in path} == {False}
    for e in (0, 1):
        learned = [p for p in moved if f"['heads'][{e}]" in p and "gate" not in p]
        assert all(moved[path] for path in learned)
    assert not any(changed(first.batch_stats, second.batch_stats).values())
    moved = changed((second.params, second.batch_stats), (third.params, third.batch_stats))
    for path, m in moved.items():
        assert m == ("'stages'" in path), path


def test_a_phase_begins_with_a_fresh_optimiser_and_a_schedule_over_its_own_steps(after):
    counts = []

    def recording(count):
        counts.append(count)
        return optimiser(count)

    make_steps(PHASES, tx=recording)
    assert counts == [4, 3, 3]
    for state, count in zip(after, counts, strict=True):
        steps = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
        assert [int(x) for x in steps] == [count]


@pytest.mark.parametrize("stop", [0, 2, 4, 5, 7, 9])
def test_training_resumed_inside_any_phase_ends_bit_for_bit_alike(
    three_phases, after, stop, tmp_path
):
    state, _ = take(three_phases, 0, stop)
    checkpoint.save(tmp_path, stop, state)
    _, restored = checkpoint.restore(tmp_path, START[NETWORK])
    resumed, metrics = take(three_phases, stop, STEPS - stop, restored)
    assert_same_bits(resumed, after[-1])
    assert int(metrics.seen) == (STEPS - stop) * BATCH


def test_on_accelerators_no_dispatch_is_of_two_phases(monkeypatch, after):
    """The program for other backends, run here on the CPU: the same numbers."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    looped = make_steps(PHASES)
    state, metrics = take(looped, 0, STEPS)
    assert_close(state, after[-1])
    assert int(metrics.seen) == STEPS * BATCH


def telling(number):
    """A loss whose value tells its phase and the progress in it."""

    def loss(network, variables, batch, key, progress):
        value, aux = everything_loss(network, variables, batch, key, progress)
        return number + progress + 0 * value, aux

    return loss


def test_the_shares_divide_the_steps_and_each_step_tells_its_phase_by_its_number():
    phases = [Phase(share, telling(i)) for i, share in enumerate((0.25, 0.5, 0.25))]
    train_steps = make_steps(phases, steps=8)
    state, values = START[NETWORK], []
    for i in range(9):
        state, metrics = take(train_steps, i, 1, state)
        values.append(float(metrics.loss))
    # Beyond the last step the last phase goes on.
    np.testing.assert_allclose(values, [0, 0.5, 1, 1.25, 1.5, 1.75, 2, 2.5, 3], atol=1e-6)
    _, total = take(train_steps, 0, 8)
    assert float(total.loss) == pytest.approx(sum(values[:8]))


@pytest.mark.parametrize(
    ("shares", "steps", "starts"),
    [
        ((1.0,), 7, (0, 7)),
        ((0.5, 0.5), 7, (0, 4, 7)),
        ((1 / 3, 1 / 3, 1 / 3), 100, (0, 33, 67, 100)),
        ((0.1,) * 10, 10, tuple(range(11))),
        ((0.9, 0.1), 1000, (0, 900, 1000)),
    ],
)
def test_phases_start_where_their_shares_say(shares, steps, starts):
    phases = [Phase(share, everything_loss) for share in shares]
    assert training.phase_starts(phases, steps) == starts


@pytest.mark.parametrize(
    ("shares", "steps", "message"),
    [
        ((0.5, 0.4), 10, "add up to 0.9; give 1"),
        ((), 10, "add up to 0; give 1"),
        ((0.99, 0.01), 10, "a phase gets no step: 10 steps"),
        ((0.5, 0.7, -0.2), 10, "a phase gets no step"),
    ],
)
def test_shares_that_do_not_divide_the_steps_are_refused(shares, steps, message):
    with pytest.raises(ValueError, match=message):
        make_steps([Phase(share, everything_loss) for share in shares], steps=steps)


def test_the_learning_rate_on_record_starts_anew_in_each_phase():
    rate = training.joined(lambda count: optax.linear_schedule(1.0, 0.0, count), PHASES, STEPS)
    expected = [1, 0.75, 0.5, 0.25, 1, 2 / 3, 1 / 3, 1, 2 / 3, 1 / 3]
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(STEPS)), expected, rtol=1e-6)


def scaled(x, factor):
    """The same value, `factor` times the gradient."""
    return factor * x + lax.stop_gradient((1 - factor) * x)


def test_a_loss_can_scale_the_gradient_into_a_stage():
    def loss(factor):
        def value(network, variables, batch, key, progress):
            first, *others = variables["params"]["stages"]
            first = jax.tree.map(lambda p: scaled(p, factor), first)
            params = {**variables["params"], "stages": (first, *others)}
            return everything_loss(network, {**variables, "params": params}, batch, key, progress)

        return value

    def update(factor):
        train_steps = make_steps([Phase(1.0, loss(factor))], tx=lambda count: optax.sgd(0.1))
        state, _ = take(train_steps, 0, 1)
        return jax.tree.map(jnp.subtract, state.params, START[NETWORK].params)

    whole, quarter = update(1.0), update(0.25)
    first = jax.tree.map(lambda x: 0.25 * x, whole["stages"][0])
    assert_close(quarter["stages"][0], first)
    assert_close((quarter["stages"][1:], quarter["heads"]), (whole["stages"][1:], whole["heads"]))


def test_the_network_draws_by_the_steps_number_and_not_what_augmentation_draws():
    drawn = []

    def augment(key, images):
        keys = [key, *jax.random.split(key, 8)]
        jax.debug.callback(lambda *x: drawn.extend(map(float, x)), *map(jax.random.uniform, keys))
        return images

    def loss(network, variables, batch, key, progress):
        value, aux = everything_loss(network, variables, batch, key, progress)
        return jax.random.uniform(key) + 0 * value, aux

    train_steps = make_steps([Phase(1.0, loss)], augment=augment)
    state, values = START[NETWORK], []
    for i in range(5):
        state, metrics = take(train_steps, i, 1, state)
        values.append(float(metrics.loss))
    jax.effects_barrier()
    assert len(set(values)) == 5
    assert len(drawn) == 45
    assert not set(values) & set(drawn)
    resumed = START[NETWORK]._replace(step=jnp.int32(3))
    assert float(take(train_steps, 3, 1, resumed)[1].loss) == values[3]


class Dropped(nn.Module):
    """A block with dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dropout(0.5, deterministic=not train)(Block()(x, train=train))


def test_dropout_draws_anew_in_each_step():
    network = cut([Dropped(), Dropped()], (1,), lambda e: Head(CLASSES))
    (phase,) = REGIMES["joint"].phases(RegimeOptions(jnp.ones(2), 0.0, jnp.ones(2)))
    tx = optax.sgd(0.1)
    step = jax.jit(training.make_train_step(network, tx, phase, classes=CLASSES))
    state = training.init_state(network, tx, KEY, IMAGES[:1])
    losses = [float(step(state, IMAGES, LABELS, jax.random.key(i))[1].loss) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
