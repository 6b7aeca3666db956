"""Boosted exits: each exit learns what the answer before it still lacks.

    sum_e w_e CE(F_e),    F_e = z_e + sg(F_{e-1}) / 2,    F_1 = z_1

with the gradients of `gradient_equilibrium` along the backbone. The answer of exit e is F_e, in
training and in inference, so the heads have to be linked: `eejax.links.boosted`. Yu, Li, Hua,
Huang, Shi, *Boosted dynamic neural networks*, AAAI 2023, https://arxiv.org/abs/2211.16726; their
batches that shrink from exit to exit and weight decay that grows are left out.
"""

from __future__ import annotations

from jax import Array

from eejax.links import Linked
from eejax.network import EarlyExitNetwork, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import gradient_equilibrium


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase.

    Its loss raises ValueError if the heads of the network are not linked.
    """
    (phase,) = gradient_equilibrium.phases(options)

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, progress: Array
    ) -> tuple[Array, LossAux]:
        value, aux = phase.loss(network, variables, batch, key, progress)
        if network.num_exits > 1 and not isinstance(aux.outputs.memory[-1], Linked):
            raise ValueError(
                "the regime boosted trains heads that add half of the answer before; give it "
                "eejax.links.boosted(network)."
            )
        return value, aux

    return (phase._replace(loss=loss),)


REGIME = Regime(phases, trains_gate=False, link="boosted")
