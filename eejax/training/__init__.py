"""Training: the regimes, the state, and the compiled step."""

from eejax.training.exitwise import apply_exits, scale_gradient
from eejax.training.regime import (
    Batch,
    LossAux,
    Phase,
    Regime,
    RegimeOptions,
    Update,
    joined,
    phase_starts,
)
from eejax.training.regimes import REGIMES
from eejax.training.regimes.joint import cross_entropies
from eejax.training.state import TrainState, init_state
from eejax.training.step import Metrics, make_train_step, make_train_steps

__all__ = [
    "REGIMES",
    "Batch",
    "LossAux",
    "Metrics",
    "Phase",
    "Regime",
    "RegimeOptions",
    "TrainState",
    "Update",
    "apply_exits",
    "cross_entropies",
    "init_state",
    "joined",
    "make_train_step",
    "make_train_steps",
    "phase_starts",
    "scale_gradient",
]
