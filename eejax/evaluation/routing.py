"""The reference: the exit and the answer of every sample of a recorded trace.

Every compiled executor must agree with `route`, sample by sample, for every policy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from eejax.network import ExitOutput
from eejax.policies.base import Policy, check_thresholds
from eejax.trace import Trace


class Scored(NamedTuple):
    """The answers and scores of a policy on a trace.

    Attributes:
      logits: `[N, E, C]`, the policy's answer at each exit.
      scores: `[N, E]`, its score there.
    """

    logits: np.ndarray
    scores: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """`[N, E]` int, the class predicted at each exit."""
        return self.logits.argmax(-1)


class Routed(NamedTuple):
    """The exit and the answer of each sample.

    Attributes:
      exits: `[N]` int, 0-based.
      logits: `[N, C]`.
    """

    exits: np.ndarray
    logits: np.ndarray


def score(policy: Policy, trace: Trace) -> Scored:
    """Steps a policy through every exit of a trace, also past the one where it would stop."""
    state = policy.init(len(trace.labels))
    logits, scores = [], []
    for e in range(trace.logits.shape[1]):
        output = ExitOutput(jnp.asarray(trace.logits[:, e]), jnp.asarray(trace.gates[:, e]), ())
        answer, confidence, state = policy.step(output, state, e)
        logits.append(np.asarray(answer))
        scores.append(np.asarray(confidence))
    return Scored(np.stack(logits, 1), np.stack(scores, 1))


def route(scored: Scored, thresholds: Iterable[float]) -> Routed:
    """Each sample leaves at the first exit whose score reaches its threshold, else at the last.

    Args:
      scored: N samples, E exits.
      thresholds: E - 1, one for each exit but the last.

    Raises:
      ValueError: if the number of thresholds is another, or one is NaN.
    """
    exits = first_exit(scored.scores, check_thresholds(thresholds, scored.scores.shape[1]))
    return Routed(exits, scored.logits[np.arange(len(exits)), exits])


def first_exit(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """`[N]` exits from scores `[N, E]` and thresholds `[E - 1]`."""
    exits = np.full(len(scores), scores.shape[1] - 1)
    for e in reversed(range(len(thresholds))):
        exits[scores[:, e] >= thresholds[e]] = e
    return exits
