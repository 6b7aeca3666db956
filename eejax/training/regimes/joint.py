"""Joint training: the weighted sum of the exits' cross-entropies.

    sum_e w_e CE(p_e, y)

The gates are not read and get no gradient. Teerapittayanon, McDanel, Kung, *BranchyNet: fast
inference via early exiting from deep neural networks*, ICPR 2016, https://arxiv.org/abs/1709.01686;
Huang, Chen, Li, Wu, van der Maaten, Weinberger, *Multi-scale dense networks for resource efficient
image classification*, ICLR 2018, https://arxiv.org/abs/1703.09844. Joint training among the other
ways to train exits: Scardapane, Scarpiniti, Baccarelli, Uncini, *Why should we add early exits to
neural networks?*, Cognitive Computation 12, 2020, https://arxiv.org/abs/2004.12814.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp
import optax
from jax import Array

from eejax.network import EarlyExitNetwork, ExitOutput, Variables
from eejax.training.exitwise import Between, apply_exits, unchanged
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions


def cross_entropies(logits: Array, targets: Array) -> Array:
    """The cross-entropy of each exit, `[E, B]`, from logits `[E, B, C]` and targets `[B, C]`."""
    chex.assert_rank([logits, targets], [3, 2])
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets[None])


def all_at_once(
    losses: Callable[[ExitOutput, Array, RegimeOptions], Array],
) -> Callable[[RegimeOptions], tuple[Phase, ...]]:
    """The `phases` of a regime that trains the whole network in one phase.

    Args:
      losses: `losses(outputs, targets, options) -> [B]`, the loss of each sample, from the outputs
        of all exits (logits `[E, B, C]`, gates `[E, B]`) and targets `[B, C]`. The mean over the
        batch is minimised.
    """

    return along(lambda outputs, targets, options, progress: losses(outputs, targets, options))


def along(
    losses: Callable[[ExitOutput, Array, RegimeOptions, Array], Array],
) -> Callable[[RegimeOptions], tuple[Phase, ...]]:
    """As `all_at_once`, with losses that change along the training.

    Args:
      losses: `losses(outputs, targets, options, progress) -> [B]`, the progress in [0, 1).
    """

    def phases(options: RegimeOptions) -> tuple[Phase, ...]:
        def loss(
            network: EarlyExitNetwork,
            variables: Variables,
            batch: Batch,
            key: Array,
            progress: Array,
        ) -> tuple[Array, LossAux]:
            outputs, batch_stats = network.apply_all(variables, batch.images, train=True, key=key)
            values = losses(outputs, batch.targets, options, progress)
            return values.mean(), LossAux(batch_stats, outputs)

        return (Phase(1.0, loss),)

    return phases


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`sum_e w_e CE_e`, `[B]`."""
    return (options.exit_weights[:, None] * cross_entropies(outputs.logits, targets)).sum(0)


def connected(
    options: RegimeOptions, to_head: Between = unchanged, to_stage: Between = unchanged
) -> tuple[Phase, ...]:
    """One phase with the same losses, and gradients changed between stages and heads.

    Args:
      options: gives the exit weights.
      to_head, to_stage: as for `apply_exits`.
    """

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = apply_exits(
            network, variables, batch.images, key, to_head=to_head, to_stage=to_stage
        )
        return losses(outputs, batch.targets, options).mean(), LossAux(batch_stats, outputs)

    return (Phase(1.0, loss),)


REGIME = Regime(all_at_once(losses), trains_gate=False)
