"""Every exit trains its own stage alone: no gradient passes from one stage to the one before.

    sum_e w_e CE_e, with the gradient cut between stages

All stages learn at the same time, each on the present features of the one before. Belilovsky,
Eickenberg, Oyallon, *Decoupled greedy learning of CNNs*, ICML 2020,
https://arxiv.org/abs/1901.08164.
"""

from __future__ import annotations

from jax import Array, lax

from eejax.network import EarlyExitNetwork, Variables
from eejax.training.exitwise import apply_exits
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import joint


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = apply_exits(
            network,
            variables,
            batch.images,
            key,
            to_stage=lambda _, features: lax.stop_gradient(features),
        )
        losses = joint.losses(outputs, batch.targets, options)
        return losses.mean(), LossAux(batch_stats, outputs)

    return (Phase(1.0, loss),)


REGIME = Regime(phases, trains_gate=False)
