"""MobileNetV2: inverted residuals, which widen, filter each channel by itself, and narrow again.

Sandler, Howard, Zhu, Zhmoginov, Chen, *MobileNetV2: inverted residuals and linear bottlenecks*,
CVPR 2018, https://arxiv.org/abs/1801.04381. As in torchvision, without its dropout before the
classifier: parameters and inference are the same.
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
from eejax.models.family import Family, Published
from eejax.models.heads import Head, Pooled
from eejax.models.layers import Depthwise, Norm, check_size, convolution, small_image
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
      dtype: of the arithmetic.
    """

    width: int
    stride: int = 1
    expansion: int = 6
    size: int = 3
    attention: nn.Module | None = None
    activation: Callable[[Array], Array] = nn.relu6
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
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


def mobilenet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: float = 1.0,
    width: float = 1.0,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A MobileNetV2, with exits after any of its blocks: stem, 17 inverted residuals, convolution.

    Args:
      classes: C.
      image: `(height, width, channels)`. Of images under 64 pixels the stem and the first strided
        block keep the size, so that these are halved three times and not five.
      depth: a factor on the repeats of each block, rounded up; 1 in the paper.
      width: a factor on the channels, which are rounded to multiples of 8. The last convolution's
        1280 only grow by it.
      exits: where, as `positions.blocks_of` takes them.
      head: `head(e)` makes an early head; without it one that normalises and activates what it
        pools, `heads.Pooled(norm=True)`, since the blocks end without an activation.
      gate: what the gates of the heads read: `"features"`, `"uncertainty"`, or None for no gate.
      dtype: of the backbone's arithmetic; parameters, statistics and heads stay float32.

    Raises:
      ValueError: a factor that is not positive, images under 8 pixels, or exits that do not exist.
    """
    check_size(image, 8, "a network that halves them three times or more", depth=depth, width=width)
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
    early, last = Head(classes, Pooled(norm=True), gate), Head(classes, gate=gate)
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
    (
        Published(
            "MobileNetV2",
            {"classes": 1000, "image": (224, 224, 3)},
            3_504_872,
            0.301e9,
            "torchvision 0.28",
        ),
    ),
)
