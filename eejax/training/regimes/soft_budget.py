"""Soft gates that are held at a mean cost: the price follows from the budget, in every batch.

    CE(f_1, y) + sum_e w_e CE(p_e, y) + sg(lambda) (sum_e pi_e c_e - budget)

with `pi` and `f_1` from the gates plus one offset b, the same for all exits and samples, such that
the mean expected cost of the batch is the budget. The price is the multiplier of that constraint,

    lambda = -(dCE/db) / (dcost/db) >= 0,

of the batch's means. With it a change of all gates alike has no gradient, and the gates learn which
samples leave first: a gate's gradient is that of the loss along the budget. So the mean cost cannot
run to one end, and no price has to be guessed. Dual ascent on the price has the same fixed point
(Boyd, Vandenberghe, *Convex optimization*, 2004, chapter 5,
https://web.stanford.edu/~boyd/cvxbook/); here it is found in each batch, so it needs no state. The
losses are those of `soft_auxiliary`: Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini,
*Differentiable branching in deep networks for fast inference*, ICASSP 2020,
https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference. `cost_weight`
is not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax import gates
from eejax.network import EarlyExitNetwork, ExitOutput, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import joint
from eejax.training.regimes.soft_literal import mixed_cross_entropy

# The mean cost must fall at least so fast with the offset. It hardly moves where all gates decide.
_SLOWEST = 1e-4


def price(outputs: ExitOutput, targets: Array, cumulative_cost: Array) -> Array:
    """`lambda`, `[]`: how much the loss falls for a little more of the budget, divided by that.

    Args:
      outputs: gates `[E, B]` with the offset added.
      targets: `[B, C]`.
      cumulative_cost: `[E]`.
    """

    def means(offset: Array) -> tuple[Array, Array]:
        shifted = outputs._replace(gate=outputs.gate + offset)
        spent = gates.expected_cost(shifted.gate, cumulative_cost)
        return mixed_cross_entropy(shifted, targets).mean(), spent.mean()

    _, (loss, cost) = jax.jvp(means, (jnp.float32(0),), (jnp.float32(1),))
    return jnp.maximum(loss, 0) / jnp.maximum(-cost, _SLOWEST)


def at_budget(outputs: ExitOutput, options: RegimeOptions) -> ExitOutput:
    """The outputs with the offset that meets the budget added to the gates."""
    offset = gates.offset_for_cost(outputs.gate, options.cumulative_cost, options.budget)
    return outputs._replace(gate=outputs.gate + offset)


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`CE(f_1, y) + sum_e w_e CE_e + sg(lambda) (sum_e pi_e c_e - budget)`, `[B]`.

    Args:
      outputs: gates `[E, B]` with the offset added.
      targets: `[B, C]`.
      options: gives the exit weights, the costs and the budget.
    """
    values = mixed_cross_entropy(outputs, targets) + joint.losses(outputs, targets, options)
    spent = gates.expected_cost(outputs.gate, options.cumulative_cost) - options.budget
    fixed = lax.stop_gradient(outputs._replace(memory=()))
    return values + price(fixed, targets, options.cumulative_cost) * spent


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase; the metrics are those of the gates with the offset."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = network.apply_all(variables, batch.images, train=True, key=key)
        outputs = at_budget(outputs, options)
        return losses(outputs, batch.targets, options).mean(), LossAux(batch_stats, outputs)

    return (Phase(1.0, loss),)


REGIME = Regime(phases, trains_gate=True)
