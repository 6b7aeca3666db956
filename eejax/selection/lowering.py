"""A path of ever lower thresholds, for times of load."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from eejax.evaluation.routing import first_exit
from eejax.runtime.manifest import HeldOut
from eejax.selection.thresholds import for_budget
from eejax.serving.samples import Level

_STEP = 0.02  # of the whole network's cost


def lowered(held_out: HeldOut, cost: ArrayLike, thresholds: ArrayLike, drop: float) -> list[Level]:
    """The chosen thresholds, then those for ever smaller budgets on the same samples.

    It ends where more than `drop` of the last exit's accuracy would be lost on them.

    Args:
      held_out: N samples.
      cost: `[E]`, of leaving at each exit, as shares of the last.
      thresholds: `[E - 1]`, that were chosen.
      drop: a share of the samples.

    Returns:
      At least one level.

    Raises:
      ValueError: if `drop` is not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"a drop of {drop}; give a share of the samples in [0, 1).")
    scores, correct = held_out
    cost = np.asarray(cost, np.float64)
    levels = [level(scores, np.asarray(thresholds, np.float32))]
    budget = float(cost[first_exit(scores, levels[0].thresholds)].mean())
    while (budget := budget - _STEP) > cost[0]:
        choice = for_budget(scores, correct, cost, budget)
        exits = first_exit(scores, choice.thresholds)
        if correct[np.arange(len(exits)), exits].mean() < correct[:, -1].mean() - drop:
            break
        levels.append(level(scores, choice.thresholds))
    return levels


def level(scores: np.ndarray, thresholds: np.ndarray) -> Level:
    """The level of these thresholds `[E - 1]`, with the shares that go on among `[N, E]` scores."""
    exits = first_exit(scores, thresholds)
    reached = np.array([(exits >= e).sum() for e in range(scores.shape[1])])
    return Level(thresholds, reached[1:] / np.maximum(reached[:-1], 1))
