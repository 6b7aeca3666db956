"""Scores from one exit's output alone: how sure it is.

Confidences close to 1 are where thresholds matter and where float32 has no values left: at logits
20 apart the largest probability *is* 1.0, thousands of samples tie, and no threshold tells them
apart. So `max_prob` and `margin` score with `-log(1 - confidence)`, in nats, computed without the
cancellation. `confidence_threshold` and `threshold_confidence` convert.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from eejax.network import ExitOutput
from eejax.policies.base import stateless


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


max_prob = stateless(_max_prob)
"""Largest probability (MSDNet, Huang et al., ICLR 2018, https://arxiv.org/abs/1703.09844)."""


margin = stateless(_margin)
"""Largest minus second largest probability."""


entropy = stateless(_entropy)
"""Negative normalised entropy (BranchyNet, Teerapittayanon et al., ICPR 2016,
https://arxiv.org/abs/1709.01686)."""


gate = stateless(_gate)
"""The head's learned gate (Scardapane et al., ICASSP 2020)."""


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
