"""A small training: a network that compiles in a moment, images, and steps that can be compared."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eejax import training
from eejax.backbone import cut
from eejax.links import LINKS
from eejax.models.heads import Head
from eejax.models.layers import Norm
from eejax.training import REGIMES, RegimeOptions

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


def assert_close(a, b):
    """Equal up to the last bits, which may differ between two compiled programs."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
