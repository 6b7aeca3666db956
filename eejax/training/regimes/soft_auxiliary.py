"""Soft gates with auxiliary losses: every head also learns by itself.

    CE(f_1, y) + sum_e w_e CE(p_e, y) + lambda sum_e pi_e c_e,    f_1 = sum_e pi_e p_e

Every head gets a gradient whatever its gate says, so heads do not starve as with `soft_literal`.
Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini, *Differentiable branching in deep networks
for fast inference*, ICASSP 2020,
https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference.
"""

from __future__ import annotations

from jax import Array

from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes import joint
from eejax.training.regimes.joint import all_at_once
from eejax.training.regimes.soft_literal import mixed_cross_entropy, with_cost


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`CE(f_1, y) + sum_e w_e CE_e + lambda sum_e pi_e c_e`, `[B]`."""
    values = mixed_cross_entropy(outputs, targets) + joint.losses(outputs, targets, options)
    return with_cost(values, outputs, options)


REGIME = Regime(all_at_once(losses), trains_gate=True)
