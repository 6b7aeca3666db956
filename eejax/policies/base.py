"""What a policy is, and the thresholds that its scores must reach.

Exit e is taken by a sample when `score_e >= threshold_e`; where none is, the last exit answers. So
one search for thresholds, one router and one set of executors serve every policy. A threshold of
+inf switches an exit off, -inf makes it always fire; a score is neither, and one that is NaN never
fires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from eejax.network import ExitOutput, PyTree


class Policy(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: `init(batch_size) -> state`, a pytree whose leaves lead with the batch axis; `()` for a
        policy that looks at one exit at a time.
      step: `step(output, state, e) -> (logits, score, state)`: what the policy answers at exit e,
        `[B, C]`, and how sure it is, `[B]`. `e` is a Python integer, or in `loop`, which runs all
        depths in one program, an int32 scalar.
    """

    init: Callable[[int], PyTree]
    step: Callable[[ExitOutput, PyTree, Any], tuple[Array, Array, PyTree]]


def stateless(score: Callable[[ExitOutput], Array]) -> Policy:
    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        del e
        return output.logits, score(output), state

    return Policy(lambda batch_size: (), step)


def check_thresholds(thresholds: Iterable[float], exits: int) -> np.ndarray:
    """Thresholds as float32 `[E - 1]`.

    Raises:
      ValueError: not one for each exit but the last, or one that is NaN.
    """
    # Not `list` of an array on a device, which would fetch each number by itself.
    is_array = isinstance(thresholds, np.ndarray | jax.Array)
    values = np.asarray(thresholds if is_array else list(thresholds), np.float32)
    if values.shape != (exits - 1,):
        given = f"{len(values)} thresholds" if values.ndim == 1 else f"thresholds {values.shape}"
        raise ValueError(
            f"{given} for {exits} exits; give {exits - 1}, one for each exit but the last."
        )
    if np.isnan(values).any():
        raise ValueError(f"thresholds {values.tolist()} hold a NaN; give numbers, inf is one.")
    return values
