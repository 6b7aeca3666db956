"""A temperature for each exit, fitted on held-out data.

Guo, Pleiss, Sun, Weinberger, *On calibration of modern neural networks*, ICML 2017,
https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, Rule, make
from eejax.policies.confidence import max_prob
from eejax.trace import Trace


class TemperatureParams(NamedTuple):
    """The parameters of `with_temperatures`.

    Attributes:
      temperatures: float32 `[E]`, positive.
      policy: steps on the logits divided by them.
    """

    temperatures: ArrayLike
    policy: Policy


def with_temperatures(policy: Policy, temperatures: Sequence[float] | ArrayLike) -> Policy:
    """The same policy over logits divided by a temperature for each exit.

    Args:
      policy: its answers become the calibrated logits.
      temperatures: `[E]`, positive, as `fit_temperatures` returns.

    Raises:
      ValueError: if a temperature is not positive, or `step` reaches an exit that has none.
    """
    return make(TEMPERATURE, temperatures, policy)


def _check(params: TemperatureParams) -> TemperatureParams:
    values = np.asarray(params.temperatures, np.float32)
    if values.ndim != 1 or not (values > 0).all():
        raise ValueError(f"temperatures {values.tolist()}; give positive numbers.")
    return params._replace(temperatures=values)


def _step(
    params: TemperatureParams, output: ExitOutput, state: PyTree, e: Any
) -> tuple[Array, Array, PyTree]:
    temperatures = jnp.asarray(params.temperatures)
    if isinstance(e, int) and e >= len(temperatures):
        raise ValueError(f"{len(temperatures)} temperatures, and exit {e + 1}; give one for each.")
    return params.policy.step(output._replace(logits=output.logits / temperatures[e]), state, e)


TEMPERATURE = Rule(
    "temperature",
    lambda params, batch_size: params.policy.init(batch_size),
    _step,
    TemperatureParams,
    _check,
    lambda trace, cost: with_temperatures(max_prob, fit_temperatures(trace)).params,
)

_LOG_LIMIT = np.log(100.0)  # temperatures in [1/100, 100]


def fit_temperatures(trace: Trace) -> np.ndarray:
    """The temperatures `[E]` that minimise the negative log-likelihood of each exit on `trace`.

    In `b = 1 / T` the negative log-likelihood of `softmax(b z)` is convex, so its slope
    `mean(E_p[z] - z_y)` changes sign once: bisection on `log b` finds it to float precision.

    Args:
      trace: N samples of a split that serves no other purpose.

    Returns:
      Float64 `[E]`, within [0.01, 100]. An end of that range is reached where the likelihood has no
      maximum: every sample is correct, or every one wrong.

    Raises:
      ValueError: if the trace is empty, or logits are not finite.
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
        # A slope of zero has underflowed: every sample is correct, and a colder softmax is better.
        colder = slope <= 0
        low, high = np.where(colder, middle, low), np.where(colder, high, middle)
    return np.exp(-(low + high) / 2)
