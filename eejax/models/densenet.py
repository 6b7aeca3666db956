"""DenseNet-BC: every layer reads the outputs of all layers before it in its group.

Huang, Liu, van der Maaten, Weinberger, *Densely connected convolutional networks*, CVPR 2017,
https://arxiv.org/abs/1608.06993. Bottlenecks of four times the growth, half the channels between
groups, as in torchvision.

The features grow by concatenation, so a layer copies all that it reads: a group of n layers moves
n times the memory of its last features, and an executor that gathers samples gathers them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import FOR_IMAGENET, TORCHVISION, Family, Published
from eejax.models.heads import Head, Pooled, average_pool
from eejax.models.layers import Norm, check_size, convolution, shrink, small_image
from eejax.network import EarlyExitNetwork


class Stem(nn.Module):
    """A strided 7x7 convolution, batch normalisation, ReLU and max pooling; if `small`, a 3x3
    convolution alone, as in the paper for images of 32x32."""

    width: int
    small: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        size, stride = (3, 1) if self.small else (7, 2)
        x = convolution(self.width, size, stride, self.dtype, "conv0")(x.astype(self.dtype))
        if self.small:
            return x
        x = nn.relu(Norm(dtype=self.dtype, name="norm0")(x, train=train))
        return shrink(x)


class DenseLayer(nn.Module):
    """`[B, H, W, K]` to `[B, H, W, K + growth]`: a 1x1 and a 3x3 convolution after a norm."""

    growth: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = nn.relu(Norm(dtype=self.dtype, name="norm1")(x, train=train))
        y = convolution(4 * self.growth, 1, 1, self.dtype, "conv1")(y)
        y = nn.relu(Norm(dtype=self.dtype, name="norm2")(y, train=train))
        y = convolution(self.growth, 3, 1, self.dtype, "conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """`[B, H, W, K]` to `[B, H/2, W/2, K/2]`: a 1x1 convolution after its norm, average pooling."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = nn.relu(Norm(dtype=self.dtype, name="norm")(x, train=train))
        y = convolution(x.shape[-1] // 2, 1, 1, self.dtype, "conv")(y)
        return average_pool(y, (2, 2))


def densenet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    groups: Sequence[int] = (6, 12, 24, 16),
    width: int = 32,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A DenseNet-BC, with exits after any of its dense layers.

    All heads are `Head(classes, Pooled(norm=True))`.

    Args:
      image: under 64 pixels, the stem is one 3x3 convolution and keeps the size.
      groups: the number of dense layers in each group; every group but the last ends by halving the
        image. (6, 12, 24, 16) is DenseNet-121 and (6, 12, 32, 32) DenseNet-169; for CIFAR the paper
        has three groups of (d - 4) / 6, at depth d.
      width: the growth rate, channels that a layer adds; the stem's output has twice as many.
    """
    groups = tuple(groups)
    check_size(image, groups=groups, width=width)
    small = small_image(image)
    halvings = len(groups) - 1 + (0 if small else 2)
    check_size(image, 1 << halvings)
    blocks: list[nn.Module] = []
    for group, layers in enumerate(groups):
        for i in range(layers):
            parts: list[nn.Module] = [DenseLayer(width, dtype)]
            if not blocks:
                parts.insert(0, Stem(2 * width, small, dtype))
            if i == layers - 1 and group < len(groups) - 1:
                parts.append(Transition(dtype))
            blocks.append(parts[0] if len(parts) == 1 else Chain(tuple(parts)))
    last = Head(classes, Pooled(norm=True), gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


FAMILY = Family(
    densenet,
    "Huang, Liu, van der Maaten, Weinberger, 2017, https://arxiv.org/abs/1608.06993",
    {"groups": (1, 1, 1), "width": 4, "image": (8, 8, 3)},
    (
        Published("DenseNet-121", FOR_IMAGENET, 7_978_856, 2.834e9, TORCHVISION),
        Published(
            "DenseNet-169",
            {**FOR_IMAGENET, "groups": (6, 12, 32, 32)},
            14_149_480,
            3.36e9,
            TORCHVISION,
        ),
        Published(
            "DenseNet-BC-100",
            {"classes": 10, "groups": (16, 16, 16), "width": 12},
            769_162,
            288e6,
            "bearpaw/pytorch-classification, its layers counted",
        ),
    ),
)
