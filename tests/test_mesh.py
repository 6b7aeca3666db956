"""Training on four simulated devices: the same numbers as on one, for every regime."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from eejax import checkpoint, training
from eejax.backbone import cut
from eejax.links import LINKS
from eejax.models.heads import Head
from eejax.models.layers import Norm
from eejax.training import REGIMES, RegimeOptions, placement
from experiments.data.splits import Split
from experiments.train.feeding import Fed, Resident

CLASSES, BATCH, STEPS = 3, 16, 4
KEY = jax.random.key(7)
OPTIONS = RegimeOptions(jnp.array([0.5, 2.0]), 0.3, jnp.array([0.4, 1.0]))
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, CLASSES, 80).astype(np.int32)
IMAGES = (RNG.integers(0, 99, (80, 2, 2, 4)) + 50 * LABELS[:, None, None, None]).astype(np.uint8)


class Block(nn.Module):
    """Its kernel from the second block on is 64 x 64: large enough to be divided."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(64, use_bias=False)(x.astype(jnp.float32) / 255)
        return nn.silu(Norm()(x, train=train))  # smooth: rounding decides nothing


NETWORK = cut([Block(), Block()], (1,), lambda e: Head(CLASSES, gate="features"))


def optimiser(count):
    rate = optax.linear_schedule(0.05, 0.01, count)
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, 0.9))


def augment(key, images):
    """Draws for each sample of the batch."""
    return jnp.where(
        jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1)), images[:, ::-1], images
    )


def mesh(devices, fsdp=1):
    return placement.make_mesh(jax.devices()[:devices], fsdp)


def trained(regime, mesh, steps=STEPS, state=None, feed=None):
    """The state after `steps` steps, and the metrics of the last dispatch."""
    phases = REGIMES[regime].phases(OPTIONS)
    link = REGIMES[regime].link
    network = NETWORK if link is None else LINKS[link](NETWORK)
    train_steps = training.make_train_steps(
        network, optimiser, phases, augment, steps=STEPS, classes=CLASSES, mesh=mesh
    )
    key = placement.replicate(mesh, KEY)
    if state is None:

        @jax.jit
        def begin(key, images):
            begun = training.init_state(network, optimiser(1), key, images, phases[0].begin)
            return placement.constrain_state(mesh, begun)

        state = begin(key, placement.replicate(mesh, IMAGES[:1]))
    feed = feed or Resident(Split(IMAGES, LABELS), key, BATCH, flip=True, mesh=mesh)
    step = int(state.step)
    return train_steps(state, key, *feed(step, steps - step), steps - step)


def assert_close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_trains_on_four_devices_as_on_one(regime):
    one, expected = trained(regime, mesh(1))
    four, metrics = trained(regime, mesh(4, 2))
    if regime == "gradient_fusion":
        # The weight of an only exit has the gradient 0; Adam scales its rounding to a step.
        one, four = (state._replace(regime=()) for state in (one, four))
    assert_close(four, one)
    assert_close(metrics, expected)
    assert int(metrics.seen) == STEPS * BATCH
    divided = [x for x in jax.tree.leaves(four.params["stages"][1]) if not x.is_fully_replicated]
    assert [x.shape for x in divided] == [(64, 64)]
    assert {shard.data.shape for shard in divided[0].addressable_shards} == {(64, 32)}


def test_a_checkpoint_goes_from_one_device_to_four_and_back(tmp_path):
    """The state of two steps, restored on another mesh, and trained to the end there."""
    expected, _ = trained("joint", mesh(1))
    for i, (before, after) in enumerate([(mesh(1), mesh(4, 2)), (mesh(4, 4), mesh(1))]):
        state, _ = trained("joint", before, steps=2)
        checkpoint.save(tmp_path / str(i), 2, state)
        shapes = jax.eval_shape(lambda x: x, state)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            placement.state_shardings(after, shapes),
        )
        _, restored = checkpoint.restore(tmp_path / str(i), like)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
        assert_close(trained("joint", after, state=restored)[0], expected)


def test_a_checkpoint_written_while_training_goes_on_has_the_state_of_its_step(tmp_path):
    """The state is donated to the next step as soon as `save` returns."""
    state, _ = trained("joint", mesh(4, 2), steps=1)
    expected = jax.tree.map(np.array, state)
    with checkpoint.writer(tmp_path) as save:
        save(1, state)
        trained("joint", mesh(4, 2), state=state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    step, restored = checkpoint.restore(tmp_path, expected)
    assert step == 1
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_images_that_come_in_batches_train_as_a_split_on_the_devices():
    """What a feed from the host gives: the batches of some steps, and more rows than are read."""
    place = mesh(4)
    whole = Resident(Split(IMAGES, LABELS), KEY, BATCH, flip=False, mesh=place)
    order = np.asarray(whole(0, STEPS).order)
    order = np.concatenate([order, order[:1]])

    def batches(step, count):
        del count
        placed = [
            jax.make_array_from_process_local_data(placement.batch_sharding(place, 1), x[order])
            for x in (IMAGES, LABELS)
        ]
        assert {s.data.shape[:2] for x in placed for s in x.addressable_shards} == {(6, 4)}
        images, labels = placed
        return Fed(images, labels, None, step)

    expected, metrics = trained("joint", place, feed=whole)
    state, fed = trained("joint", place, feed=batches)
    assert_close(state, expected)
    assert int(fed.seen) == int(metrics.seen)


def test_the_order_of_samples_depends_on_key_and_step_alone():
    split = Split(IMAGES, LABELS)
    key = placement.replicate(mesh(4, 2), KEY)
    through = Resident(split, KEY, BATCH, flip=True, mesh=mesh(1))
    assert through.per_epoch == 5
    for step in range(12):
        fed = through(step, 1)
        resumed = Resident(split, key, BATCH, flip=True, mesh=mesh(4, 2))(step, 1)
        assert fed.start == resumed.start == step % 5
        for a, b in zip(fed[:3], resumed[:3], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((64, 64), 2, P(None, "fsdp")),
        ((128, 64), 4, P("fsdp")),
        ((3, 3, 63, 64), 4, P(None, None, None, "fsdp")),
        ((4096,), 2, P("fsdp")),
        ((4095,), 2, P()),  # small
        ((101, 103), 2, P()),  # no axis can be divided
        ((64, 64), 1, P()),
        ((), 2, P()),
    ],
)
def test_an_array_is_divided_along_its_largest_axis_that_can_be(shape, fsdp, spec):
    shapes = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert placement.state_shardings(mesh(4, fsdp), shapes)["x"].spec == spec


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="fsdp=3 for 4 devices"):
        mesh(4, 3)
