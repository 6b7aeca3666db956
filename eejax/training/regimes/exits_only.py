"""The backbone with its last exit first, then the early exits on the frozen backbone.

    CE_E for half of the steps, then sum_{e<E} w_e CE_e

In the second phase stages and last head keep their bits, running statistics included, and the
stages run in inference mode: the heads learn on what they will see. The whole network loses
nothing, and a trained backbone can be given exits in this way. Kaya, Hong, Dumitras, *Shallow-deep
networks*, ICML 2019, https://arxiv.org/abs/1810.07052 ("IC-only training"); Laskaridis, Kouris,
Lane, *Adaptive inference through early-exit networks*, EMDL 2021, https://arxiv.org/abs/2106.05022.
In Kaya's code the frozen backbone normalises by batches and its running statistics go on moving,
and the heads have 25 epochs of Adam at a rate of 1e-3.
"""

from __future__ import annotations

from jax import Array

from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.training.exitwise import apply_exits
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes.joint import cross_entropies

BACKBONE = 0.5


def last_exit(share: float, exits: int) -> Phase:
    """Ordinary training of the plain network: the stages and the last of `exits` heads."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = network.apply_all(variables, batch.images, train=True, key=key)
        losses = cross_entropies(outputs.logits[-1:], batch.targets)
        return losses.mean(), LossAux(batch_stats, outputs)

    def trains(variables: Variables) -> PyTree:
        heads = (*[False] * (exits - 1), True)
        return {name: {"stages": True, "heads": heads} for name in variables}

    return Phase(share, loss, trains)


def early_heads(share: float, options: RegimeOptions) -> Phase:
    """The heads before the last, on stages that are frozen and run in inference mode."""
    weights = options.exit_weights[:-1, None]
    early = (*[True] * len(weights), False)

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = apply_exits(
            network,
            variables,
            batch.images,
            key,
            train_stages=[False] * len(early),
            train_heads=early,
        )
        losses = weights * cross_entropies(outputs.logits[:-1], batch.targets)
        return losses.sum(0).mean(), LossAux(batch_stats, outputs)

    def trains(variables: Variables) -> PyTree:
        return {name: {"stages": False, "heads": early} for name in variables}

    return Phase(share, loss, trains)


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """Backbone, then early heads; a network without early exits has the first phase alone."""
    exits = len(options.exit_weights)
    if exits == 1:
        return (last_exit(1.0, exits),)
    return last_exit(BACKBONE, exits), early_heads(1 - BACKBONE, options)


REGIME = Regime(phases, trains_gate=False)
