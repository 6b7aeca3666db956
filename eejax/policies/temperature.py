"""A temperature for each exit, fitted on held-out data.

Guo, Pleiss, Sun, Weinberger, *On calibration of modern neural networks*, ICML 2017,
https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy
from eejax.trace import Trace


def with_temperatures(policy: Policy, temperatures: Sequence[float] | np.ndarray) -> Policy:
    """The same policy over logits divided by a temperature for each exit.

    Args:
      policy: whose answers become the calibrated logits.
      temperatures: E positive numbers, as `calibration.fit_temperatures` returns.

    Raises:
      ValueError: one that is not positive; at an exit for which there is none.
    """
    # Python numbers: NumPy's float64 would be a type of its own under strict promotion.
    values = [float(t) for t in temperatures]
    if not all(t > 0 for t in values):
        raise ValueError(f"temperatures {values}; give positive numbers.")

    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        if isinstance(e, int) and e >= len(values):
            raise ValueError(f"{len(values)} temperatures, and exit {e + 1}; give one for each.")
        temperature = jnp.asarray(values, jnp.float32)[e]
        return policy.step(output._replace(logits=output.logits / temperature), state, e)

    return Policy(policy.init, step)


_LOG_LIMIT = np.log(100.0)  # temperatures in [1/100, 100]


def fit_temperatures(trace: Trace) -> np.ndarray:
    """The temperatures `[E]` that minimise each exit's negative log-likelihood on `trace`.

    In `b = 1 / T` the negative log-likelihood of `softmax(b z)` is convex, so its slope
    `mean(E_p[z] - z_y)` changes sign once: bisection on `log b` finds it to float precision.

    Args:
      trace: N samples of a split that serves no other purpose.

    Returns:
      Float64 `[E]`, within [0.01, 100]; the limit is reached where every sample is right (or
      all are wrong) and the likelihood has no maximum.

    Raises:
      ValueError: an empty trace, or logits that are not finite.
    """
    if not len(trace.labels) or not np.isfinite(trace.logits).all():
        raise ValueError("an empty trace, or logits with NaN or infinity; give finite logits.")
    z = np.asarray(trace.logits, np.float64)  # [N, E, C]
    z = z - z.max(-1, keepdims=True)
    z_label = np.take_along_axis(z, np.asarray(trace.labels)[:, None, None], -1)[..., 0]
    low, high = np.full(z.shape[1], -_LOG_LIMIT), np.full(z.shape[1], _LOG_LIMIT)
    for _ in range(60):
        middle = (low + high) / 2
        p = np.exp(np.exp(middle)[:, None] * z)
        slope = ((p * z).sum(-1) / p.sum(-1) - z_label).mean(0)
        # A slope of zero is one that underflowed: every sample is right, and surer is still better.
        surer = slope <= 0
        low, high = np.where(surer, middle, low), np.where(surer, high, middle)
    return np.exp(-(low + high) / 2)
