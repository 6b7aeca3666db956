"""MobileNetV2: inverted residuals, which widen, filter each channel by itself, and narrow again.

Sandler, Howard, Zhu, Zhmoginov, Chen, *MobileNetV2: inverted residuals and linear bottlenecks*,
CVPR 2018, https://arxiv.org/abs/1801.04381, as in torchvision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.backbone import cut
from eejax.exits import Exits
from eejax.models.family import FOR_IMAGENET, TORCHVISION, Family, Published
from eejax.models.heads import Head, Pooled
from eejax.models.layers import (
    Depthwise,
    Norm,
    check_rate,
    check_size,
    convolution,
    drop_branch,
    small_image,
)
from eejax.network import EarlyExitNetwork


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation, and an activation if there is one.

    Attributes:
      width: channels that come out.
      size: of the kernel, odd; the padding keeps the image's size.
      stride: by which the image shrinks.
      depthwise: each channel by itself; as many must come in as come out.
      activation: a function, or None.
      dtype: of the arithmetic.
    """

    width: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    activation: Callable[[Array], Array] | None = nn.relu6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.depthwise:
            conv = Depthwise(self.size, self.stride, self.dtype, name="conv")
        else:
            conv = convolution(self.width, self.size, self.stride, self.dtype, "conv")
        x = Norm(dtype=self.dtype, name="bn")(conv(x.astype(self.dtype)), train=train)
        return x if self.activation is None else self.activation(x)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, a depthwise filter, 1x1 to `width` without activation.

    What comes in is added where its shape allows. An expansion of 1 leaves the first layer out.

    Attributes:
      width: channels that come out.
      stride: of the depthwise filter.
      expansion: how many times wider the inside is than what comes in.
      size: of the depthwise filter.
      attention: `attention(x, train)`, a module applied to the wide features, or None.
      activation: of the two wide layers.
      drop: the rate of stochastic depth, where there is a shortcut.
      dtype: of the arithmetic.
    """

    width: int
    stride: int = 1
    expansion: int = 6
    size: int = 3
    attention: nn.Module | None = None
    activation: Callable[[Array], Array] = nn.relu6
    drop: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        inside, y = x.shape[-1] * self.expansion, x
        wide = functools.partial(ConvNorm, inside, activation=self.activation, dtype=self.dtype)
        if self.expansion > 1:
            y = wide(name="expand")(y, train=train)
        y = wide(size=self.size, stride=self.stride, depthwise=True, name="depthwise")(
            y, train=train
        )
        if self.attention is not None:
            y = self.attention(y, train=train)
        narrow = ConvNorm(self.width, activation=None, dtype=self.dtype, name="project")
        y = narrow(y, train=train)
        if self.stride > 1 or x.shape[-1] != self.width:
            return y
        return x + drop_branch(y, self.drop, train)


def mobilenet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: float = 1.0,
    width: float = 1.0,
    dropout: float = 0.0,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A MobileNetV2, with exits after any of its blocks: stem, 17 inverted residuals, convolution.

    Early heads are `Head(classes, Pooled(norm=True))`, since blocks end without an activation.

    Args:
      image: at least 8x8. Under 64 pixels the stem and the first strided block keep the size, so
        that the image is halved three times instead of five.
      depth: a factor on the repeats of each block, rounded up; 1 in the paper.
      width: a factor on the channels, which are rounded to multiples of 8; the 1280 channels of the
        last convolution never shrink.
      dropout: before the last classifier; torchvision trains with 0.2.
    """
    check_size(image, 8, depth=depth, width=width)
    check_rate(dropout=dropout)
    small = small_image(image)
    blocks: list[nn.Module] = [
        ConvNorm(rounded(32 * width), 3, 1 if small else 2, dtype=dtype),
    ]
    for group, (expansion, channels, repeats, stride) in enumerate(GROUPS):
        for i in range(math.ceil(repeats * depth)):
            stays = i > 0 or (small and group == 1)
            blocks.append(
                InvertedResidual(
                    rounded(channels * width), 1 if stays else stride, expansion, dtype=dtype
                )
            )
    blocks.append(ConvNorm(rounded(1280 * max(width, 1.0)), dtype=dtype))
    early = Head(classes, Pooled(norm=True), gate)
    last = Head(classes, gate=gate, dropout=dropout)
    return cut(blocks, exits, head or (lambda e: early), classifier=last, image=image)


# Expansion, channels, repeats, stride of the first.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def rounded(channels: float) -> int:
    """The multiple of 8 nearest to a number of channels, at least 8 and at least nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


FAMILY = Family(
    mobilenet,
    "Sandler, Howard, Zhu, Zhmoginov, Chen, 2018, https://arxiv.org/abs/1801.04381",
    {"depth": 0.25, "width": 0.1, "image": (8, 8, 3)},
    (Published("MobileNetV2", FOR_IMAGENET, 3_504_872, 0.301e9, TORCHVISION),),
    {"dropout": 0.2},
)
