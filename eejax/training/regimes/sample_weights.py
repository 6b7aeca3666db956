"""Samples weighed at each exit by a small network that learns which exit they leave at (L2W-DEN).

    mean_i sum_e w_e (1 + 0.3 v_ie) CE_ie

where v comes from an MLP on the E losses of sample i (one hidden layer of 500, tanh at the end),
less its mean over samples and exits. The MLP is learned by Adam through a look-ahead step: the
parameters move by `STEP` along the weighted loss of the first half of the batch, and the MLP
lowers what the network then loses on the second half, where each exit counts the samples that it
would answer. These are, for exit e in turn, the most confident of those left, with shares in
proportion to 0.75^e; the last exit has the rest. Han, Pu, Lai, Wang, Song, Cao, Huang, Deng, Huang,
*Learning to weight samples for dynamic early-exiting networks*, ECCV 2022,
https://arxiv.org/abs/2209.08310.

There the two halves change roles and the network takes a step on either; here it takes one step on
the whole batch. The look-ahead there has the momentum and rate of the optimiser; here it is plain
gradient descent at a fixed rate. 0.3 and the mean over samples and exits are their setting for
ImageNet; for CIFAR-100 it is 0.8, a mean over samples alone, and an MLP with weight decay and a
cosine schedule, which ours has not. `w_e` is ours. A step takes three backward passes and one
forward derivative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions, Update
from eejax.training.regimes import joint

STRENGTH = 0.3
HIDDEN = 500
RATIO = 0.75
STEP = 0.1
_ADAM = optax.adam(1e-4)


class Weigher(NamedTuple):
    """The MLP: matrices `[E, H]` and `[H, E]`, offsets `[H]` and `[E]`."""

    first: Array
    first_bias: Array
    second: Array
    second_bias: Array


def begin(variables: Variables, key: Array) -> PyTree:
    """An MLP at random, and a fresh optimiser."""
    exits = len(variables["params"]["heads"])
    draw, (a, b) = jax.nn.initializers.lecun_normal(), jax.random.split(key)
    weigher = Weigher(
        draw(a, (exits, HIDDEN), jnp.float32),
        jnp.zeros(HIDDEN, jnp.float32),
        draw(b, (HIDDEN, exits), jnp.float32),
        jnp.zeros(exits, jnp.float32),
    )
    return {"weigher": weigher, "adam": _ADAM.init(weigher)}


def sample_weights(weigher: Weigher, losses: Array) -> Array:
    """`1 + 0.3 v`, `[E, B]`, from the losses `[E, B]`."""
    x = jax.nn.relu(losses.T @ weigher.first + weigher.first_bias[None])
    v = jnp.tanh(x @ weigher.second + weigher.second_bias[None]).T
    return 1 + STRENGTH * (v - v.mean())


def allocated(logits: Array) -> Array:
    """Which exit answers which sample, bool `[E, B]`, from logits `[E, B, C]`."""
    exits, batch, _ = logits.shape
    shares = RATIO ** np.arange(1, exits + 1)
    left, chosen = jnp.ones(batch, bool), []
    for e, share in enumerate(shares[:-1] / shares.sum()):
        confidence = jnp.where(left, jax.nn.softmax(logits[e]).max(-1), -1.0)
        best = lax.top_k(confidence, math.floor(batch * share))[1]
        chosen.append(jnp.zeros(batch, bool).at[best].set(True))
        left &= ~chosen[-1]
    return jnp.stack([*chosen, left])


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase; a network without early exits is trained as by `joint`.

    Its gradients raise ValueError for a batch of one sample.
    """
    (plain,) = joint.REGIME.phases(options)
    if len(options.exit_weights) == 1:
        return (plain,)

    def gradients(
        network: EarlyExitNetwork,
        variables: Variables,
        state: PyTree,
        batch: Batch,
        key: Array,
        _: Array,
    ) -> Update:
        half = len(batch.images) // 2
        if not half:
            raise ValueError("sample_weights splits a batch of 1 in two; give a larger batch.")
        params = variables["params"]

        def run(params: PyTree, rows: slice) -> tuple[Array, LossAux]:
            """`w_e CE_ie`, `[E, B]`."""
            outputs, batch_stats = network.apply_all(
                {**variables, "params": params}, batch.images[rows], train=True, key=key
            )
            losses = joint.cross_entropies(outputs.logits, batch.targets[rows])
            return options.exit_weights[:, None] * losses, LossAux(batch_stats, outputs)

        def first_half(params: PyTree) -> Array:
            return run(params, slice(half))[0]

        def second_half(params: PyTree) -> Array:
            losses, aux = run(params, slice(half, None))
            chosen = lax.stop_gradient(allocated(aux.outputs.logits)).astype(jnp.float32)
            return ((chosen * losses).sum(1) / jnp.maximum(chosen.sum(1), 1.0)).sum()

        # The look-ahead step. What the second half then loses depends on the weights through the
        # step alone, so its derivative is that of the losses along the slope.
        losses, back = jax.vjp(first_half, params)
        weights, to_weigher = jax.vjp(lambda w: sample_weights(w, losses), state["weigher"])
        (step,) = back(weights / half)
        ahead = jax.tree.map(lambda p, g: p - STEP * g, params, step)
        slope = jax.grad(second_half)(ahead)
        _, along = jax.jvp(first_half, (params,), (slope,))
        (gradient,) = to_weigher(-STEP / half * along)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            change, adam = _ADAM.update(gradient, state["adam"])
        weigher = jax.tree.map(jnp.add, state["weigher"], change)

        def weighted(params: PyTree) -> tuple[Array, LossAux]:
            losses, aux = run(params, slice(None))
            weights = sample_weights(weigher, lax.stop_gradient(losses))
            return (weights * losses).sum(0).mean(), aux

        (value, aux), gradient = jax.value_and_grad(weighted, has_aux=True)(params)
        return Update(value, aux, gradient, {"weigher": weigher, "adam": adam})

    return (plain._replace(gradients=gradients, begin=begin),)


REGIME = Regime(phases, trains_gate=False)
