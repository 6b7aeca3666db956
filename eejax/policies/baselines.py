"""Policies that know nothing of the sample, to stand beside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, stateless

fixed = stateless(lambda output: jnp.zeros(len(output.logits), jnp.float32))
"""The same score for every sample, so that nothing is known of any: the baseline of one fixed exit.

Thresholds can only switch an exit off or on for all, and a search for a budget then finds the best
single exit that the budget allows.
"""


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
