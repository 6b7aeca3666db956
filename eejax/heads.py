"""Exit heads, in Flax Linen: `head(features, memory, train) -> ExitOutput`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

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
        pooled = _pooled(features.astype(jnp.float32), lax.add, jnp.mean, 0.0, train)
        if self.pool == "both":
            highest = _pooled(features, lax.max, jnp.max, -jnp.inf, train).astype(jnp.float32)
            pooled = jnp.concatenate([pooled, highest], axis=-1)
        logits = nn.Dense(self.classes, name="classifier")(pooled)
        # The gate starts undecided at a low rate, so that no exit hoards the samples at the start.
        gate = (
            nn.Dense(1, name="gate", bias_init=nn.initializers.constant(-1.0))(pooled)[:, 0]
            if self.gate
            else jnp.zeros(features.shape[0], jnp.float32)
        )
        return ExitOutput(logits, gate, ())


def _pooled(x: Array, combine: Any, reduce: Any, start: float, train: bool) -> Array:
    """`[B, H, W, K]` to `[B, K]`, by `reduce`, the mean or the maximum.

    XLA fuses a reduction with everything elementwise before it, and on a CPU computes that again
    for it: in a ResNet the whole chain of shortcuts of a stage, which made a head cost 1 % of the
    network. It does not fuse a window. Where gradients are wanted a window's are slower, though,
    and on other devices the reduction is the quicker.
    """
    size = x.shape[1] * x.shape[2]

    def window(x: Array) -> Array:
        start_ = jnp.asarray(start, x.dtype)
        shape = (1, *x.shape[1:3], 1)
        pooled = lax.reduce_window(x, start_, combine, shape, shape, "VALID")
        return pooled[:, 0, 0] / (size if combine is lax.add else 1)

    def plain(x: Array) -> Array:
        return reduce(x, axis=(1, 2))

    return plain(x) if train else lax.platform_dependent(x, cpu=window, default=plain)
