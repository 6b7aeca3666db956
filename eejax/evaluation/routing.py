"""The reference: which exit a recorded trace takes, what it answers there, and what that costs.

Every compiled executor must agree with `route`, sample by sample, for every policy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from eejax.network import ExitOutput
from eejax.policies.base import Policy, check_thresholds
from eejax.trace import (
    Trace,
)


class Scored(NamedTuple):
    """A policy's view of a trace.

    Attributes:
      logits: `[N, E, C]`, what the policy answers at each exit.
      scores: `[N, E]`, how sure it is there.
    """

    logits: np.ndarray
    scores: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """`[N, E]` int, the class answered at each exit."""
        return self.logits.argmax(-1)


class Routed(NamedTuple):
    """Where each sample leaves, and with which answer.

    Attributes:
      exits: `[N]` int, 0-based.
      logits: `[N, C]`.
    """

    exits: np.ndarray
    logits: np.ndarray


def score(policy: Policy, trace: Trace) -> Scored:
    """Steps a policy through every exit of a trace, whether or not it would have stopped."""
    state = policy.init(len(trace.labels))
    logits, scores = [], []
    for e in range(trace.logits.shape[1]):
        output = ExitOutput(jnp.asarray(trace.logits[:, e]), jnp.asarray(trace.gates[:, e]), ())
        answer, certainty, state = policy.step(output, state, e)
        logits.append(np.asarray(answer))
        scores.append(np.asarray(certainty))
    return Scored(np.stack(logits, 1), np.stack(scores, 1))


def route(scored: Scored, thresholds: Iterable[float]) -> Routed:
    """Each sample leaves at the first exit whose score reaches its threshold, else at the last.

    Args:
      scored: N samples, E exits.
      thresholds: E - 1, one for each exit but the last.

    Raises:
      ValueError: another number of thresholds, or one that is NaN.
    """
    exits = first_exit(scored.scores, check_thresholds(thresholds, scored.scores.shape[1]))
    return Routed(exits, scored.logits[np.arange(len(exits)), exits])


def first_exit(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """`[N]` exits from scores `[N, E]` and thresholds `[E - 1]`."""
    last = np.ones((len(scores), 1), bool)
    return np.concatenate([scores[:, :-1] >= thresholds, last], axis=1).argmax(1)
