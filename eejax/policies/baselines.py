"""Baselines: policies whose score does not depend on what is in the image."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, Rule, make, stateless

fixed = stateless("fixed", lambda output: jnp.zeros(len(output.logits), jnp.float32), baseline=True)
"""The same score for every sample: the baseline of one fixed exit.

A threshold can only switch an exit on or off for all samples, so that a search for a budget finds
the best single exit within it.
"""


class RandomParams(NamedTuple):
    """The seed of `random`, uint32 `[]`."""

    seed: ArrayLike


def random(seed: int) -> Policy:
    """A score uniform in [0, 1) and independent of the sample: exits at any rates, by chance.

    The score is a hash of the bits of the sample's logits at this exit, of the seed and of the
    exit. A random key would not do: numbers drawn for a batch belong to positions in it, and
    executors move the surviving samples to other positions, in tiles of other sizes, so that the
    same sample would leave elsewhere in another executor. Samples with equal logits get equal
    scores; where two programs round a logit differently, the sample gets another score, which is
    just as random.

    Args:
      seed: a whole number in [0, 2^32).

    Raises:
      ValueError: if the seed is outside that range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed of {seed}; give a whole number in [0, 2**32).")
    return make(RANDOM, np.uint32(seed))


def _step(
    params: RandomParams, output: ExitOutput, state: PyTree, e: Any
) -> tuple[Array, Array, PyTree]:
    logits = output.logits
    seed = jnp.asarray(params.seed).reshape(1)
    keys = _mixed(_mixed(seed) + np.arange(logits.shape[-1], dtype="u4"))
    # The two zeros are equal, and every program has to see the same one.
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    # A sum of whole numbers modulo 2^32 is the same in any order.
    total = _mixed(bits ^ keys[None]).sum(-1, dtype=jnp.uint32)
    mixed = _mixed(total + jnp.asarray(e).astype(jnp.uint32) * np.uint32(0x9E3779B9))
    return logits, (mixed >> 8).astype(jnp.float32) * 2.0**-24, state


RANDOM = Rule(
    "random",
    lambda params, batch_size: (),
    _step,
    RandomParams,
    fit=lambda trace, cost: random(0).params,
    baseline=True,
)


def _mixed(x: Array) -> Array:
    """A permutation of uint32 in which every input bit affects every output bit: the finaliser of
    MurmurHash3 (Appleby, https://github.com/aappleby/smhasher)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
