"""Confidence scores, from the output of one exit alone.

Confidences close to 1 are where thresholds matter and where float32 has no values left: for logits
20 apart the largest probability *is* 1.0, thousands of samples tie, and no threshold separates
them. So `max_prob` and `margin` score with `-log(1 - confidence)`, in nats, computed without the
cancellation. `confidence_threshold` converts a confidence to a threshold on that scale.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from eejax.network import ExitOutput
from eejax.policies.base import stateless


def _max_prob(output: ExitOutput) -> Array:
    """`-log(1 - max_k p_k)`: minus the log of the total probability of the other classes.

    With `d` the top logit minus the log-sum-exp of the other logits, that is `log(1 + exp(d))`.
    """
    others = jax.nn.logsumexp(_without_top(output.logits), axis=-1)
    return _nats(-jax.nn.softplus(output.logits.max(-1) - others))


def _margin(output: ExitOutput) -> Array:
    """`-log(1 - (p_1st - p_2nd))`, where `1 - p_1st + p_2nd` is a sum of positive terms."""
    others = _without_top(jax.nn.log_softmax(output.logits))
    second = others.max(-1, keepdims=True)
    return _nats(jax.nn.logsumexp(jnp.concatenate([others, second], axis=-1), axis=-1))


def _nats(log_doubt: Array) -> Array:
    """`-log(1 - confidence)`, finite also at confidence 1, which a single class has."""
    return jnp.minimum(-log_doubt, jnp.finfo(log_doubt.dtype).max)


def _without_top(values: Array) -> Array:
    """`[B, C]` with the first largest entry of each row at minus infinity."""
    top = jnp.arange(values.shape[-1])[None] == values.argmax(-1)[:, None]
    return jnp.where(top, -jnp.inf, values)


def _entropy(output: ExitOutput) -> Array:
    """`sum_k p_k log p_k / log C`, in [-1, 0]: the negative normalised entropy."""
    log_p = jax.nn.log_softmax(output.logits)
    # A class of probability zero (its logit is minus infinity or far below the rest) adds zero.
    terms = jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p)
    # With one class the entropy and log C are both zero.
    return jnp.clip(terms.sum(-1) / math.log(max(log_p.shape[-1], 2)), -1.0, 0.0)


max_prob = stateless("max_prob", _max_prob)
"""Largest probability (MSDNet, Huang et al., ICLR 2018, https://arxiv.org/abs/1703.09844)."""


entropy = stateless("entropy", _entropy)
"""Negative normalised entropy (BranchyNet, Teerapittayanon et al., ICPR 2016,
https://arxiv.org/abs/1709.01686)."""


margin = stateless("margin", _margin)
"""Largest minus second largest probability (the score margin of Park et al., *Big/little deep
neural network for ultra low power inference*, CODES+ISSS 2015,
https://doi.org/10.1109/CODESISSS.2015.7331375)."""


gate = stateless("gate", lambda output: output.gate, needs_gate=True)
"""The logit of the head's learned gate, 0 where its sigmoid is one half (Scardapane et al., ICASSP
2020)."""


def confidence_threshold(confidence: float) -> float:
    """The threshold on `max_prob` or `margin` for a confidence c in [0, 1]: `-log(1 - c)`.

    Raises:
      ValueError: if the confidence is outside [0, 1].
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"a confidence of {confidence}; give one in [0, 1].")
    return math.inf if confidence == 1 else -math.log1p(-confidence)
