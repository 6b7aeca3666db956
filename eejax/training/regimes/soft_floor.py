"""Soft gates with a floor under every exit's share of the loss.

    sum_e pi'_e w_e CE(p_e, y) + lambda sum_e pi_e c_e,    pi'_e = (1 - rho) pi_e + rho / E

with the exit distribution `pi` of `eejax.gates` and rho = 1/2. `soft_mixture` collapses: an exit
that the gates avoid learns nothing and is avoided the more. Here every head keeps at least a share
`rho / E` of its loss. It is the uniform exploration of reinforcement learning (Sutton, Barto,
*Reinforcement learning*, 2nd edition, 2018, section 2.2, http://incompleteideas.net/book/) in the
mixture of Banino, Balaguer, Blundell, *PonderNet: learning to ponder*, 2021,
https://arxiv.org/abs/2107.05407.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from eejax import gates
from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes.joint import all_at_once, cross_entropies
from eejax.training.regimes.soft_literal import with_cost

FLOOR = 0.5


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`sum_e pi'_e w_e CE_e + lambda sum_e pi_e c_e`, `[B]`."""
    pi = jnp.exp(gates.log_exit_distribution(outputs.gate))
    floored = (1 - FLOOR) * pi + FLOOR / len(pi)
    weighted = floored * options.exit_weights[:, None] * cross_entropies(outputs.logits, targets)
    return with_cost(weighted.sum(0), outputs, options)


REGIME = Regime(all_at_once(losses), trains_gate=True)
