"""Soft gates on exits that also learn from the last one.

    CE(f_1, y) + distilled + lambda sum_e pi_e c_e,    f_1 = sum_e pi_e p_e

with the sum `distilled` of the regime of that name in the place of the exits' own cross-entropies.
The gates are those of `soft_auxiliary`: Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini,
*Differentiable branching in deep networks for fast inference*, ICASSP 2020,
https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference. The
distillation is that of Phuong, Lampert, *Distillation-based training for multi-exit architectures*,
ICCV 2019,
https://openaccess.thecvf.com/content_ICCV_2019/html/Phuong_Distillation-Based_Training_for_Multi-Exit_Architectures_ICCV_2019_paper.html.
"""

from __future__ import annotations

from jax import Array

from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes import distilled
from eejax.training.regimes.joint import all_at_once
from eejax.training.regimes.soft_literal import mixed_cross_entropy, with_cost


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """The sum of the formula, `[B]`."""
    values = mixed_cross_entropy(outputs, targets) + distilled.losses(outputs, targets, options)
    return with_cost(values, outputs, options)


REGIME = Regime(all_at_once(losses), trains_gate=True)
