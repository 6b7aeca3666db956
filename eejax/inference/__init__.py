"""Compiled inference in which each sample stops at its own exit."""

from eejax.inference.executors import Executor, Prediction, cond, full
from eejax.inference.predictors import Predictor, bound, predictor, sharded

__all__ = ["Executor", "Prediction", "Predictor", "bound", "cond", "full", "predictor", "sharded"]
