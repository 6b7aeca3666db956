"""Zero Time Waste: a cascade of early heads on a frozen backbone.

    CE_E for half of the steps, then sum_{e<E} w_e CE_e

with early heads that also read the normalised answer of the head before, without gradient:
`eejax.links.cascaded`. The phases are those of `exits_only`. The ensemble over the exits is fitted
afterwards, by the policy `ztw`. Wolczyk, Wojcik, Balazy, Podolak, Tabor, Smieja, Trzcinski, *Zero
time waste: recycling predictions in early exit neural networks*, NeurIPS 2021,
https://arxiv.org/abs/2106.05409.
"""

from __future__ import annotations

from jax import Array

from eejax.links import Linked
from eejax.network import EarlyExitNetwork, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import exits_only


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """Backbone, then early heads.

    The second loss raises ValueError if the early heads of the network are not cascaded.
    """
    backbone, *heads = exits_only.phases(options)
    if not heads:
        return (backbone,)

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, progress: Array
    ) -> tuple[Array, LossAux]:
        value, aux = heads[0].loss(network, variables, batch, key, progress)
        # A single early head has none before it.
        if network.num_exits > 2 and not isinstance(aux.outputs.memory[0], Linked):
            raise ValueError(
                "the regime ztw trains a cascade of early heads; give it "
                "eejax.links.cascaded(network)."
            )
        return value, aux

    return backbone, heads[0]._replace(loss=loss)


REGIME = Regime(phases, trains_gate=False, link="cascaded")
