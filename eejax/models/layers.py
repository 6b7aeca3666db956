"""Layers that several families share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Norm(nn.Module):
    """Batch normalisation, computed in float32 whatever the dtype around it.

    Attributes:
      scale: learn a scale beside the offset; a convolution that follows directly can make any.
      dtype: of the result.
    """

    scale: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[..., K]` to the same shape."""
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, use_scale=self.scale
        )
        return norm(x.astype(jnp.float32)).astype(self.dtype)
