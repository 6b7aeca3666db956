"""Exit heads, in Flax Linen: `head(features, memory, train) -> ExitOutput`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.network import ExitOutput, PyTree


class PooledLinear(nn.Module):
    """Global pooling, then a linear classifier, and a linear gate on the same pooled features.

    Attributes:
      classes: C, the number of classes.
      gate: learn a gate; without one its logit is zero.
      pool: `"average"`, or `"both"` for average and maximum side by side.
      dtype: of what is pooled; the classifier itself computes in float32.
    """

    classes: int
    gate: bool = False
    pool: str = "average"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, memory: PyTree, *, train: bool) -> ExitOutput:
        """Features `[B, H, W, K]` to logits `[B, C]`."""
        pooled = features.mean((1, 2), dtype=jnp.float32)
        if self.pool == "both":
            highest = features.max((1, 2)).astype(jnp.float32)
            pooled = jnp.concatenate([pooled, highest], axis=-1)
        logits = nn.Dense(self.classes, name="classifier")(pooled)
        # The gate starts undecided at a low rate, so that no exit hoards the samples at the start.
        gate = (
            nn.Dense(1, name="gate", bias_init=nn.initializers.constant(-1.0))(pooled)[:, 0]
            if self.gate
            else jnp.zeros(features.shape[0], jnp.float32)
        )
        return ExitOutput(logits, gate, ())
