"""Soft gates with a mixture of losses in place of the loss of a mixture.

    sum_e pi_e w_e CE(p_e, y) + lambda sum_e pi_e c_e

with the exit distribution `pi` of `eejax.gates`. The form is that of Banino, Balaguer, Blundell,
*PonderNet: learning to ponder*, 2021, https://arxiv.org/abs/2107.05407; its divergence from a
geometric prior is left out, the price of the expected cost stands in its place.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from eejax import gates
from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes.joint import all_at_once, cross_entropies
from eejax.training.regimes.soft_literal import with_cost


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`sum_e pi_e w_e CE_e + lambda sum_e pi_e c_e`, `[B]`."""
    pi = jnp.exp(gates.log_exit_distribution(outputs.gate))
    weighted = pi * options.exit_weights[:, None] * cross_entropies(outputs.logits, targets)
    return with_cost(weighted.sum(0), outputs, options)


REGIME = Regime(all_at_once(losses), trains_gate=True)
