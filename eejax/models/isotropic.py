"""An isotropic network: patches, then equal residual blocks of one width and one image size.

All stages but the first are one module, so that `compaction.loop` compiles them once, whatever the
depth. The shape is that of isotropic vision networks without attention (Trockman & Kolter, *Patches
are all you need?*, 2022, https://arxiv.org/abs/2201.09792), with a plain 3x3 convolution a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.adapters import Chain, cut
from eejax.heads import PooledLinear
from eejax.models.layers import Norm
from eejax.network import EarlyExitNetwork


class Patches(nn.Module):
    """Images `[B, H, W, C]` to `[B, H/patch, W/patch, width]`."""

    width: int
    patch: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, "VALID", use_bias=False, dtype=self.dtype)(
            x.astype(self.dtype)
        )
        return nn.gelu(Norm(dtype=self.dtype)(x, train=train))


class Block(nn.Module):
    """A 3x3 convolution beside a shortcut."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype)(x)
        return x + nn.gelu(Norm(dtype=self.dtype)(y, train=train))


def isotropic(
    classes: int,
    *,
    depth: int = 12,
    width: int = 64,
    patch: int = 4,
    exits: Sequence[int] | None = None,
    gate: bool = False,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """An isotropic network with exits after any of its blocks.

    Args:
      classes: C.
      depth: blocks.
      width: channels.
      patch: pixels along a patch; images are multiples of it.
      exits: block numbers, 1 to `depth`, increasing; the last block's is always there. Default: all
        of them.
      gate: heads learn a gate.
      dtype: of the backbone's arithmetic; parameters, statistics and heads stay float32.

    Raises:
      ValueError: exits that do not exist.
    """
    blocks: list[nn.Module] = [Block(width, dtype) for _ in range(depth)]
    blocks[0] = Chain((Patches(width, patch, dtype), blocks[0]))
    places = range(1, depth + 1) if exits is None else exits
    return cut(blocks, places, lambda e: PooledLinear(classes, gate=gate))
