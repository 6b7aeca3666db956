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


fixed = _stateless(lambda output: jnp.zeros(len(output.logits), jnp.float32))
"""The same score for every sample, so that nothing is known of any: the baseline of one fixed exit.

Thresholds can only switch an exit off or on for all, and a search for a budget then finds the best
single exit that the budget allows.
"""


def _patience() -> Policy:
    def init(batch_size: int) -> PyTree:
        return jnp.full(batch_size, -1, jnp.int32), jnp.zeros(batch_size, jnp.float32)

    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        del e
        before, count = state
        now = output.logits.argmax(-1).astype(jnp.int32)
        count = jnp.where(now == before, count + 1, 0)
        return output.logits, count, (now, count)

    return Policy(init, step)


patience = _patience()
"""How many exits in a row gave the class of the one before, 0 at the first (PABEE, Zhou et al.,
NeurIPS 2020, https://arxiv.org/abs/2006.04152)."""


def random(seed: int) -> Policy:
    """A score uniform in [0, 1) that says nothing of the sample: exits at any rates, by chance.

    The number is a hash of the bits of the sample's own logits at this exit, of the seed and of the
    exit. Numbers drawn for a batch from a random key would belong to positions in that batch, and
    executors move the samples that go on to other positions, in tiles of other sizes; a key for
    each sample in the state would have to start from its position too. So the same sample would
    leave elsewhere in another executor. Samples with equal logits get equal numbers; where two
    programs round a logit differently, the sample gets another number, just as much by chance.

    Args:
      seed: a whole number in [0, 2^32).

    Raises:
      ValueError: a seed outside that range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed of {seed}; give a whole number in [0, 2**32).")

    def score(logits: Array, e: Any) -> Array:
        keys = _mixed(_mixed(np.array([seed], np.uint32)) + np.arange(logits.shape[-1], dtype="u4"))
        # Of the two zeros, which are equal, every program is to see the same.
        bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
        # A sum of whole numbers modulo 2^32 is the same in any order.
        total = _mixed(bits ^ keys[None]).sum(-1, dtype=jnp.uint32)
        mixed = _mixed(total + jnp.asarray(e).astype(jnp.uint32) * np.uint32(0x9E3779B9))
        return (mixed >> 8).astype(jnp.float32) * 2.0**-24

    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        return output.logits, score(output.logits, e), state

    return Policy(lambda batch_size: (), step)


def _mixed(x: Any) -> Any:
    """A permutation of uint32 in which every bit of x bears on every other: MurmurHash3's last step
    (Appleby, https://github.com/aappleby/smhasher). NumPy or JAX, as it comes."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


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
