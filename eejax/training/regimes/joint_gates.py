"""Gates that learn the best exit of each sample, and heads that learn where the gates send them.

First `joint` for half of the steps. Then, on frozen stages in inference mode,

    sum_e sg(E pi_e) w_e CE(p_e, y) - log pi_{l*},    l* = argmin_e sg(CE(p_e, y)) + lambda c_e

with the exit distribution `pi` of `eejax.gates`, `sg` for a stopped gradient. The first term trains
the heads, each on the samples that it will answer; the second trains the gates to leave at the exit
that is best for the sample at the price lambda. Each sees the other as it is, without a gradient.
The source's gates read the largest probability, the entropy, the margin and the entropy of the
squared probabilities: that is `gate="uncertainty"`; `gate="evidence"` reads the change since the
head before, too, and both read without a gradient.

Regol, Chataoui, Coates, *Jointly-learned exit and inference for a dynamic neural network: JEI-DNN*,
ICLR 2024, https://arxiv.org/abs/2310.09163. There heads and gates are updated in turns; here both
are in every step, which is the same two gradients. The backbone is trained here, where theirs came
trained. The factor E keeps the heads' loss at the scale of `joint`. In their code a gate's loss is
a binary cross-entropy, balanced between its classes, whose target is 1 at `l*` and at all later
exits; the last head stays frozen; and the probability of an exit is min(g, 1 - sum of the earlier
g). That code also divides the weighted losses by one another in such a way that the probabilities
cancel from the heads' loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax import gates
from eejax.network import EarlyExitNetwork, ExitOutput, PyTree, Variables
from eejax.training.exitwise import apply_exits
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import joint
from eejax.training.regimes.joint import cross_entropies

JOINT = 0.5


def best_exit(losses: Array, options: RegimeOptions) -> Array:
    """`l*`, `[B]` int32, from the losses `[E, B]`; the cheapest among equals."""
    priced = losses + options.cost_weight * options.cumulative_cost[:, None]
    return priced.argmin(0).astype(jnp.int32)


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """The sum of the formula, `[B]`."""
    log_pi = gates.log_exit_distribution(outputs.gate)
    each = cross_entropies(outputs.logits, targets)
    exits = len(each)
    weights = lax.stop_gradient(exits * jnp.exp(log_pi)) * options.exit_weights[:, None]
    best = best_exit(lax.stop_gradient(each), options)
    chosen = jax.nn.one_hot(best, exits, axis=0, dtype=jnp.float32)
    return (weights * each - chosen * log_pi).sum(0)


def heads_and_gates(share: float, options: RegimeOptions) -> Phase:
    """All heads with their gates, on stages that are frozen and run in inference mode."""
    exits = len(options.exit_weights)

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = apply_exits(
            network,
            variables,
            batch.images,
            key,
            train_stages=[False] * exits,
            train_heads=[True] * exits,
        )
        return losses(outputs, batch.targets, options).mean(), LossAux(batch_stats, outputs)

    def trains(variables: Variables) -> PyTree:
        return {name: {"stages": False, "heads": True} for name in variables}

    return Phase(share, loss, trains)


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """Everything, then heads and gates; a network without early exits has the first phase alone."""
    (together,) = joint.REGIME.phases(options)
    if len(options.exit_weights) == 1:
        return (together,)
    return together._replace(share=JOINT), heads_and_gates(1 - JOINT, options)


REGIME = Regime(phases, trains_gate=True)
