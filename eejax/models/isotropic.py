"""An isotropic network: patches, then equal residual blocks of one width and one image size.

All stages but the first are equal modules, so `eejax.loop` compiles one for any depth. The shape is
that of isotropic vision networks without attention (Trockman & Kolter, *Patches are all you need?*,
2022, https://arxiv.org/abs/2201.09792), with a plain 3x3 convolution in each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import Family
from eejax.models.heads import Head
from eejax.models.layers import Norm, check_patches, check_size
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
    image: Sequence[int] = (32, 32, 3),
    depth: int = 12,
    width: int = 64,
    patch: int = 4,
    exits: Exits = "all",
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """An isotropic network, with exits after any of its blocks; all heads are `Head(classes)`.

    Args:
      image: a multiple of the patch.
      depth: blocks.
      width: channels.
      patch: pixels along a patch.
    """
    check_size(image, depth=depth, width=width, patch=patch)
    check_patches(image, patch)
    blocks: list[nn.Module] = [Block(width, dtype) for _ in range(depth)]
    blocks[0] = Chain((Patches(width, patch, dtype), blocks[0]))
    last = Head(classes, gate=gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


FAMILY = Family(
    isotropic,
    "after Trockman, Kolter, 2022, https://arxiv.org/abs/2201.09792",
    {"depth": 4, "width": 4, "image": (8, 8, 3)},
)
