"""Policies that count how often exits agree."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy


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
