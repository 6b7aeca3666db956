"""Hard gates, trained with the gradient of soft ones.

    sum_e h_e CE(p_e, y) + sum_e w_e CE(p_e, y) + lambda sum_e h_e c_e

with `h` one-hot at the first exit whose gate reaches one half, as in inference, and the gradient of
the exit distribution `pi` of `eejax.gates`: the straight-through estimator of Bengio, Leonard,
Courville, *Estimating or propagating gradients through stochastic neurons for conditional
computation*, 2013, https://arxiv.org/abs/1308.3432. So the gates learn at the exits that are really
taken. The exits' own losses keep every head learning, as in `soft_auxiliary`.
"""

from __future__ import annotations

from jax import Array

from eejax import gates
from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes.joint import all_at_once, cross_entropies


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`sum_e (h_e + w_e) CE_e + lambda sum_e h_e c_e`, `[B]`."""
    taken = gates.straight_through(outputs.gate)
    each = cross_entropies(outputs.logits, targets)
    price = options.cost_weight * options.cumulative_cost[:, None]
    return (taken * (each + price) + options.exit_weights[:, None] * each).sum(0)


REGIME = Regime(all_at_once(losses), trains_gate=True)
