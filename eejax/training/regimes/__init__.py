"""The regimes by name. A new one takes one file, which ends in its `REGIME`, and a line here."""

from eejax.training.regime import Regime
from eejax.training.regimes import (
    boosted,
    distilled,
    exits_only,
    feature_split,
    frozen_teacher,
    gradient_equilibrium,
    gradient_fusion,
    hinted,
    joint,
    layerwise,
    local,
    mixed,
    pcgrad,
    progressive,
    sample_weights,
    sdn,
    self_distilled,
    soft_auxiliary,
    soft_literal,
    soft_mixture,
    ztw,
)

REGIMES: dict[str, Regime] = {
    "joint": joint.REGIME,
    "sdn": sdn.REGIME,
    "exits_only": exits_only.REGIME,
    "mixed": mixed.REGIME,
    "layerwise": layerwise.REGIME,
    "progressive": progressive.REGIME,
    "local": local.REGIME,
    "distilled": distilled.REGIME,
    "self_distilled": self_distilled.REGIME,
    "hinted": hinted.REGIME,
    "frozen_teacher": frozen_teacher.REGIME,
    "gradient_equilibrium": gradient_equilibrium.REGIME,
    "feature_split": feature_split.REGIME,
    "pcgrad": pcgrad.REGIME,
    "gradient_fusion": gradient_fusion.REGIME,
    "sample_weights": sample_weights.REGIME,
    "boosted": boosted.REGIME,
    "ztw": ztw.REGIME,
    "soft_literal": soft_literal.REGIME,
    "soft_auxiliary": soft_auxiliary.REGIME,
    "soft_mixture": soft_mixture.REGIME,
}

__all__ = ["REGIMES"]
