"""Compiled inference in which each sample stops at its own exit."""

from eejax.inference.compaction import compact, loop
from eejax.inference.executors import Executor, Prediction, cond, full
from eejax.inference.predictors import Predictor, bound, predictor, sharded

EXECUTORS: dict[str, Executor] = {"full": full, "cond": cond, "compact": compact, "loop": loop}
"""The executors with the common signature, by name: candidates of `auto` and of the benchmarks."""

__all__ = [
    "EXECUTORS",
    "Executor",
    "Prediction",
    "Predictor",
    "bound",
    "compact",
    "cond",
    "full",
    "loop",
    "predictor",
    "sharded",
]
