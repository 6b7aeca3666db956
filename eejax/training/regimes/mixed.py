"""The backbone with its last exit first, then all exits jointly.

    CE_E for half of the steps, then sum_e w_e CE_e

Kubaty, Wojcik, Krzepkowski, Michaluk, Trzcinski, Pomponi, Adamczewski, *How to train your
multi-exit model? Analyzing the impact of training strategies*, 2024,
https://arxiv.org/abs/2407.14320; the last exit was best with it in most of their cases.
"""

from __future__ import annotations

from eejax.training.regime import Phase, Regime, RegimeOptions
from eejax.training.regimes import joint
from eejax.training.regimes.exits_only import BACKBONE, last_exit


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """Backbone, then everything; a network without early exits has the second phase alone."""
    (together,) = joint.REGIME.phases(options)
    exits = len(options.exit_weights)
    if exits == 1:
        return (together,)
    return last_exit(BACKBONE, exits), together._replace(share=1 - BACKBONE)


REGIME = Regime(phases, trains_gate=False)
