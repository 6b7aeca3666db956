"""Phases of a training, of regimes that are made up, and what its steps draw."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from small_training import (
    BATCH,
    CLASSES,
    IMAGES,
    KEY,
    LABELS,
    NETWORK,
    START,
    STEPS,
    Block,
    assert_close,
    assert_same_bits,
    changed,
    make_steps,
    optimiser,
    take,
)

from eejax import checkpoint, training
from eejax.backbone import cut
from eejax.models.heads import Head
from eejax.training import REGIMES, Batch, LossAux, Phase, RegimeOptions, cross_entropies


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
