"""Joint training with gradients of equal size along the backbone.

    sum_e w_e CE_e

The gradient of head e is multiplied by 1 / (E - e), that of stage e + 1 by (E - e - 1) / (E - e),
with e from 0. A stage early in the backbone is below many exits, and its gradient is the sum of
theirs; with these factors every exit contributes the same, so the sum does not grow with the number
of exits. Li, Zhang, Qi, Yang, Huang, *Improved techniques for training adaptive deep networks*,
ICCV 2019, https://arxiv.org/abs/1908.06294. Their code scales the features of MSDNet's last scale
alone; here all are scaled.
"""

from __future__ import annotations

from eejax.training.exitwise import scale_gradient
from eejax.training.regime import Phase, Regime, RegimeOptions
from eejax.training.regimes.joint import connected


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase."""
    exits = len(options.exit_weights)
    return connected(
        options,
        to_head=lambda e, x: scale_gradient(1 / (exits - e), x),
        to_stage=lambda e, x: scale_gradient((exits - e - 1) / (exits - e), x),
    )


REGIME = Regime(phases, trains_gate=False)
