"""A network that two CPU cores train in minutes, in the shape of airbench's (Jordan, 2024,
https://arxiv.org/abs/2404.00498): few wide convolutions, normalised without a learned scale.

The differences are for XLA on a CPU, where a 3x3 convolution runs at full speed on images of 8x8
and 4x4 with many channels, several times slower on 32x32 with few, and a hundred times slower on
2x2. So the image is folded once (2x2 pixels become channels) and halved twice by pooling, and most
multiply-accumulates are spent on 4x4 features near the end, which leaves the early exits cheap.
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
from eejax.models.heads import Head, Pooled
from eejax.models.layers import Norm, check_size, halved
from eejax.network import EarlyExitNetwork


class Stem(nn.Module):
    """Folds 2x2 pixels into channels where the image is large, then a 3x3 convolution.

    `[B, H, W, C]` to `[B, H // 2, W // 2, width]`; an odd last row or column is left out. Images
    under 16 pixels are not folded.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        b, h, w, c = x.shape
        if min(h, w) >= 16:
            x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
            x = x.transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(b, h // 2, w // 2, 4 * c)
        x = _conv(self.width, self.dtype)(x.astype(self.dtype))
        return nn.gelu(Norm(scale=False, dtype=self.dtype)(x, train=train))


class Block(nn.Module):
    """A 3x3 convolution, with `pool` 2x2 pooling, and with `residual` a shortcut."""

    width: int
    pool: bool = False
    residual: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = _conv(self.width, self.dtype)(x)
        y = halved(y, 8) if self.pool else y
        y = nn.gelu(Norm(scale=False, dtype=self.dtype)(y, train=train))
        return x + y if self.residual else y


def fast(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    width: int = 64,
    exits: Exits = (2, 3, 4),
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """The fast network: a stem and five blocks, with exits after any block.

    All heads are `Head(classes, Pooled("both"))`.

    Args:
      image: from 16 pixels on, an odd last row or column is left out.
      width: channels of the first block; the others have 2, 4, 4 and 4 times as many.
    """
    check_size(image, width=width)
    blocks: list[nn.Module] = [
        Chain((Stem(max(width // 2, 1), dtype), Block(width, pool=True, dtype=dtype))),
        Block(2 * width, pool=True, dtype=dtype),
        Block(4 * width, dtype=dtype),
        Block(4 * width, residual=True, dtype=dtype),
        Block(4 * width, residual=True, dtype=dtype),
    ]
    last = Head(classes, Pooled("both"), gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


def _conv(width: int, dtype: Any) -> nn.Conv:
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nn.Conv(width, (3, 3), use_bias=False, dtype=dtype, kernel_init=init)


FAMILY = Family(
    fast,
    "after Jordan, 2024, https://arxiv.org/abs/2404.00498",
    {"width": 4, "image": (8, 8, 3)},
)
