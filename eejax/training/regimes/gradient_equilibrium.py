"""Joint training with gradients of equal size along the backbone.

    sum_e w_e CE_e

The gradient of head e is multiplied by 1 / (E - e), that of stage e + 1 by (E - e - 1) / (E - e),
with e from 0. A stage early in the backbone is below many exits, and its gradient is the sum of
theirs; with these factors every exit contributes the same, so the sum does not grow with the number
of exits. Li, Zhang, Qi, Yang, Huang, *Improved techniques for training adaptive deep networks*,
ICCV 2019, https://arxiv.org/abs/1908.06294.
"""

from __future__ import annotations

from jax import Array

from eejax.network import EarlyExitNetwork, Variables
from eejax.training.exitwise import apply_exits, scale_gradient
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import joint


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase."""
    exits = len(options.exit_weights)

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = apply_exits(
            network,
            variables,
            batch.images,
            key,
            to_head=lambda e, features: scale_gradient(1 / (exits - e), features),
            to_stage=lambda e, features: scale_gradient((exits - e - 1) / (exits - e), features),
        )
        losses = joint.losses(outputs, batch.targets, options)
        return losses.mean(), LossAux(batch_stats, outputs)

    return (Phase(1.0, loss),)


REGIME = Regime(phases, trains_gate=False)
