"""Every exit trains its own stage alone: no gradient passes from one stage to the one before.

    sum_e w_e CE_e, with the gradient cut between stages

All stages learn at the same time, each on the present features of the one before. Belilovsky,
Eickenberg, Oyallon, *Decoupled greedy learning of CNNs*, ICML 2020,
https://arxiv.org/abs/1901.08164.
"""

from __future__ import annotations

from jax import lax

from eejax.training.regime import Phase, Regime, RegimeOptions
from eejax.training.regimes.joint import connected


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase."""
    return connected(options, to_stage=lambda _, features: lax.stop_gradient(features))


REGIME = Regime(phases, trains_gate=False)
