"""Policies that count how often exits agree."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, Rule


def _init(params: Any, batch_size: int) -> PyTree:
    del params
    return jnp.full(batch_size, -1, jnp.int32), jnp.zeros(batch_size, jnp.float32)


def _step(params: Any, output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
    del params, e
    previous, count = state
    prediction = output.logits.argmax(-1).astype(jnp.int32)
    count = jnp.where(prediction == previous, count + 1, 0)
    return output.logits, count, (prediction, count)


patience = Policy(Rule("patience", _init, _step))
"""The number of consecutive exits that predicted the class of the exit before them, 0 at the first
exit (PABEE, Zhou et al., NeurIPS 2020, https://arxiv.org/abs/2006.04152)."""
