"""The regimes by name. A new one takes one file, which ends in its `REGIME`, and a line here."""

from eejax.training.regime import Regime
from eejax.training.regimes import joint, soft_auxiliary, soft_literal, soft_mixture

REGIMES: dict[str, Regime] = {
    "joint": joint.REGIME,
    "soft_literal": soft_literal.REGIME,
    "soft_auxiliary": soft_auxiliary.REGIME,
    "soft_mixture": soft_mixture.REGIME,
}

__all__ = ["REGIMES"]
