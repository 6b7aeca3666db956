"""Training: the state, the compiled step, and what is minimised."""

from eejax.training.state import TrainState, init_state
from eejax.training.step import Metrics, Objective, make_train_step, make_train_steps

__all__ = [
    "Metrics",
    "Objective",
    "TrainState",
    "init_state",
    "make_train_step",
    "make_train_steps",
]
