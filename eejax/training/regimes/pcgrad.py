"""Gradient surgery: an exit does not undo what the other exits gain.

    for each exit i, and the other exits j in random order:  g_i -= min(g_i . g_j, 0) / |g_j|^2 g_j
    the update follows sum_i g_i

with the gradients `g_e` of `w_e CE_e` in the parameters of one stage, as they are before surgery on
the right-hand side. A stage is shared by the exits above it, so surgery is done for each stage by
itself; a head has the gradient of its own exit. Yu, Kumar, Gupta, Levine, Hausman, Finn, *Gradient
surgery for multi-task learning*, NeurIPS 2020, https://arxiv.org/abs/2001.06782, with one surgery
for all shared parameters there. A step takes a backward pass for each exit.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from eejax.network import EarlyExitNetwork, PyTree, Variables, keep_variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions, Update
from eejax.training.regimes import joint


def exit_gradients(
    network: EarlyExitNetwork,
    variables: Variables,
    batch: Batch,
    key: Array,
    options: RegimeOptions,
) -> tuple[Array, LossAux, list[PyTree]]:
    """`sum_e w_e CE_e`, and the gradient of each term in all parameters, a list of E trees.

    Each term is that of the network up to its exit, so its gradient costs no more than that part.
    """

    def term(params: PyTree, e: int) -> tuple[Array, LossAux]:
        kept = range(e + 1)
        part = keep_variables({**variables, "params": params}, kept)
        outputs, batch_stats = network.keeping(kept).apply_all(
            part, batch.images, train=True, key=key
        )
        losses = joint.cross_entropies(outputs.logits[-1:], batch.targets)
        return options.exit_weights[e] * losses.mean(), LossAux(batch_stats, outputs)

    differentiate = jax.value_and_grad(term, has_aux=True)
    results = [differentiate(variables["params"], e) for e in range(network.num_exits)]
    (_, aux), _ = results[-1]
    value = jnp.stack([value for (value, _), _ in results]).sum()
    return value, aux, [gradient for _, gradient in results]


def total(trees: Sequence[PyTree]) -> PyTree:
    """The sum of trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).sum(0), *trees)


def surgery(gradients: Array, key: Array) -> Array:
    """The sum of the projected gradients, `[K, P]` to `[P]`; `key` draws the orders."""
    count = len(gradients)
    square = (gradients**2).sum(1)

    def one(i: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(key, i), count)
        projected = gradients[i]
        for j in order:
            conflict = jnp.where(j == i, 0.0, jnp.minimum(projected @ gradients[j], 0.0))
            scale = conflict / jnp.maximum(square[j], jnp.finfo(jnp.float32).tiny)
            projected = projected - scale * gradients[j]
        return projected

    return jax.vmap(one)(jnp.arange(count)).sum(0)


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase."""
    (plain,) = joint.REGIME.phases(options)

    def gradients(
        network: EarlyExitNetwork,
        variables: Variables,
        state: PyTree,
        batch: Batch,
        key: Array,
        _: Array,
    ) -> Update:
        value, aux, terms = exit_gradients(network, variables, batch, key, options)
        stages = []
        for s in range(network.num_exits):
            rows = [ravel_pytree(term["stages"][s]) for term in terms[s:]]
            # The network draws from the key folded with 0 to 2 E - 1.
            drawn = jax.random.fold_in(key, 2 * network.num_exits + s)
            stages.append(rows[0][1](surgery(jnp.stack([row for row, _ in rows]), drawn)))
        heads = total([term["heads"] for term in terms])
        return Update(value, aux, {"stages": tuple(stages), "heads": heads}, state)

    return (plain._replace(gradients=gradients),)


REGIME = Regime(phases, trains_gate=False)
