"""The regimes by name. A new one takes one file, which ends in its `REGIME`, and a line here."""

from eejax.training.regime import Regime
from eejax.training.regimes import (
    distilled,
    exits_only,
    feature_split,
    gradient_equilibrium,
    joint,
    joint_gates,
    layerwise,
    local,
    mixed,
    sdn,
    self_distilled,
    soft_annealed,
    soft_auxiliary,
    soft_budget,
    soft_distilled,
    soft_floor,
    soft_literal,
    soft_mixture,
    soft_straight_through,
)

REGIMES: dict[str, Regime] = {
    "joint": joint.REGIME,
    "sdn": sdn.REGIME,
    "exits_only": exits_only.REGIME,
    "mixed": mixed.REGIME,
    "layerwise": layerwise.REGIME,
    "local": local.REGIME,
    "distilled": distilled.REGIME,
    "self_distilled": self_distilled.REGIME,
    "gradient_equilibrium": gradient_equilibrium.REGIME,
    "feature_split": feature_split.REGIME,
    "soft_literal": soft_literal.REGIME,
    "soft_auxiliary": soft_auxiliary.REGIME,
    "soft_mixture": soft_mixture.REGIME,
    "soft_floor": soft_floor.REGIME,
    "soft_annealed": soft_annealed.REGIME,
    "soft_straight_through": soft_straight_through.REGIME,
    "soft_distilled": soft_distilled.REGIME,
    "soft_budget": soft_budget.REGIME,
    "joint_gates": joint_gates.REGIME,
}

__all__ = ["REGIMES"]
