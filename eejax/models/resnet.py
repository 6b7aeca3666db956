"""ResNet for small images, depth 6n + 2: a 3x3 convolution, then three groups of n basic blocks.

He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, CVPR 2016,
https://arxiv.org/abs/1512.03385, section 4.2: shortcuts without parameters, every second pixel and
zero channels where a group begins.
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

_he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Stem(nn.Module):
    """Images `[B, H, W, C]` to `[B, H, W, width]`."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = _conv(self.width, 1, self.dtype)(x.astype(self.dtype))
        return nn.relu(Norm(dtype=self.dtype)(x, train=train))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a stride of 2 halves the image."""

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = _conv(self.width, self.stride, self.dtype)(x)
        y = nn.relu(Norm(dtype=self.dtype)(y, train=train))
        y = Norm(dtype=self.dtype)(_conv(self.width, 1, self.dtype)(y), train=train)
        shortcut = x[:, :: self.stride, :: self.stride]
        more = self.width - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return nn.relu(shortcut + y)


def resnet(
    classes: int,
    *,
    depth: int = 56,
    width: int = 16,
    exits: Sequence[int] | None = None,
    gate: bool = False,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A CIFAR ResNet with exits after any of its 3n blocks.

    Args:
      classes: C.
      depth: 6n + 2.
      width: channels of the first group; the next two have twice and four times as many.
      exits: block numbers, 1 to 3n, increasing; the last block's is always there. Default: three
        exits spread evenly before it.
      gate: heads learn a gate.
      dtype: of the backbone's arithmetic; parameters, statistics and heads stay float32.

    Raises:
      ValueError: a depth that is not 6n + 2, or exits that do not exist.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"a ResNet depth of {depth}; give 6n + 2: 8, 14, 20, 32, 44, 56, 110 ...")
    blocks: list[nn.Module] = [
        BasicBlock(width << group, 2 if group and not i else 1, dtype)
        for group in range(3)
        for i in range(n)
    ]
    blocks[0] = Chain((Stem(width, dtype), blocks[0]))
    if exits is None:
        exits = sorted({max(1, round(3 * n * k / 4)) for k in (1, 2, 3)})
    return cut(blocks, exits, lambda e: PooledLinear(classes, gate=gate))


def _conv(width: int, stride: int, dtype: Any) -> nn.Conv:
    # Padding that is the same on both sides, whatever the stride, as in the reference: SAME would
    # pad a strided convolution on one side only.
    return nn.Conv(width, (3, 3), stride, padding=1, use_bias=False, dtype=dtype, kernel_init=_he)
