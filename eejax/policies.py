"""When to stop: a score for each exit, and a threshold that it must reach.

Exit e is taken by a sample when `score_e >= threshold_e`; where none is, the last exit answers. So
one search for thresholds, one router and one set of executors serve every policy. A threshold of
+inf switches an exit off, -inf makes it always fire; a score is neither, and one that is NaN never
fires.

Confidences close to 1 are where thresholds matter and where float32 has no values left: at logits
20 apart the largest probability *is* 1.0, thousands of samples tie, and no threshold tells them
apart. So `max_prob` and `margin` score with `-log(1 - confidence)`, in nats, computed without the
cancellation. `confidence_threshold` and `threshold_confidence` convert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


def _stateless(score: Callable[[ExitOutput], Array]) -> Policy:
    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        del e
        return output.logits, score(output), state

    return Policy(lambda batch_size: (), step)


def _max_prob(output: ExitOutput) -> Array:
    """`-log(1 - max_k p_k)`: minus the log of all the probability that the top class leaves.

    With `d` the top logit above the log-sum-exp of the others, that is `log(1 + exp(d))`.
    """
    others = jax.nn.logsumexp(_without_top(output.logits), axis=-1)
    return _nats(-jax.nn.softplus(output.logits.max(-1) - others))


def _margin(output: ExitOutput) -> Array:
    """`-log(1 - (p_1st - p_2nd))`, where `1 - p_1st + p_2nd` is a sum of positive terms."""
    others = _without_top(jax.nn.log_softmax(output.logits))
    second = others.max(-1, keepdims=True)
    return _nats(jax.nn.logsumexp(jnp.concatenate([others, second], axis=-1), axis=-1))


def _nats(log_doubt: Array) -> Array:
    """`-log(1 - confidence)`, finite also where nothing is left to doubt: one class, say."""
    return jnp.minimum(-log_doubt, jnp.finfo(log_doubt.dtype).max)


def _without_top(values: Array) -> Array:
    """`[B, C]` with the first largest entry of each row at minus infinity."""
    top = jnp.arange(values.shape[-1])[None] == values.argmax(-1)[:, None]
    return jnp.where(top, -jnp.inf, values)


def _entropy(output: ExitOutput) -> Array:
    """`sum_k p_k log p_k / log C`, in [-1, 0]: the negative normalised entropy."""
    log_p = jax.nn.log_softmax(output.logits)
    # A class that is ruled out, by a logit of minus infinity or one far below the rest, adds zero.
    terms = jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p)
    # With one class there is no doubt, and log C is zero.
    return jnp.clip(terms.sum(-1) / math.log(max(log_p.shape[-1], 2)), -1.0, 0.0)


def _gate(output: ExitOutput) -> Array:
    """The learned gate's logit: 0 is where `sigmoid` is one half."""
    return output.gate


max_prob = _stateless(_max_prob)
"""Largest probability (MSDNet, Huang et al., ICLR 2018, https://arxiv.org/abs/1703.09844)."""

margin = _stateless(_margin)
"""Largest minus second largest probability."""

entropy = _stateless(_entropy)
"""Negative normalised entropy (BranchyNet, Teerapittayanon et al., ICPR 2016,
https://arxiv.org/abs/1709.01686)."""

gate = _stateless(_gate)
"""The head's learned gate (Scardapane et al., ICASSP 2020)."""


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


def confidence_threshold(confidence: float) -> float:
    """The threshold on `max_prob` or `margin` that a confidence in [0, 1] means: `-log(1 - c)`.

    Raises:
      ValueError: a confidence outside [0, 1].
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"a confidence of {confidence}; give one in [0, 1].")
    return math.inf if confidence == 1 else -math.log1p(-confidence)


def threshold_confidence(threshold: float) -> float:
    """The confidence that a threshold on `max_prob` or `margin` means: `1 - exp(-s)`."""
    return -math.expm1(-threshold)
