"""Exits whose weights grow during training, up to their cost.

    CE_E + sum_{e<E} tau_e CE_e,    tau_e = min(c_e, 0.01 + c_e t)

with the cost `c_e` of leaving at exit e as a fraction of the whole network, and the share t of the
steps already taken. So the backbone learns first, and an early exit never weighs more than its part
of the network. Kaya, Hong, Dumitras, *Shallow-deep networks: understanding and mitigating network
overthinking*, ICML 2019, https://arxiv.org/abs/1810.07052; there the weights change once an epoch,
here with every step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from eejax.network import EarlyExitNetwork, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes.joint import cross_entropies

START = 0.01


def weights(cumulative_cost: Array, progress: Array) -> Array:
    """`tau_e`, and 1 for the last exit: `[E]` from the costs `[E]` and the progress in [0, 1)."""
    early = cumulative_cost[:-1]
    ramp = jnp.minimum(early, START + early * progress)
    return jnp.concatenate([ramp, jnp.ones(1, ramp.dtype)])


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase; the exit weights are not read."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, progress: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = network.apply_all(variables, batch.images, train=True, key=key)
        losses = cross_entropies(outputs.logits, batch.targets)
        weighted = weights(options.cumulative_cost, progress)[:, None] * losses
        return weighted.sum(0).mean(), LossAux(batch_stats, outputs)

    return (Phase(1.0, loss),)


REGIME = Regime(phases, trains_gate=False)
