"""ResNet: for small images of depth 6n + 2, and for ImageNet with 18, 34 or 50 layers.

He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, CVPR 2016,
https://arxiv.org/abs/1512.03385. For small images as in section 4.2: shortcuts have no parameters;
where a group begins they take every second pixel and add channels of zeros. For ImageNet as in
torchvision: there the shortcut is a 1x1 convolution, and a bottleneck strides in its 3x3
convolution.
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
from eejax.models.heads import Head
from eejax.models.layers import Norm, check_size, convolution, shrink, small_image
from eejax.network import EarlyExitNetwork


class Stem(nn.Module):
    """Images `[B, H, W, C]` to `[B, H, W, width]`."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = convolution(self.width, 3, 1, self.dtype)(x.astype(self.dtype))
        return nn.relu(Norm(dtype=self.dtype)(x, train=train))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a stride of 2 halves the image."""

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = convolution(self.width, 3, self.stride, self.dtype)(x)
        y = nn.relu(Norm(dtype=self.dtype)(y, train=train))
        y = Norm(dtype=self.dtype)(convolution(self.width, 3, 1, self.dtype)(y), train=train)
        shortcut = x[:, :: self.stride, :: self.stride]
        more = self.width - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return nn.relu(shortcut + y)


def resnet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: int = 56,
    width: int = 16,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A ResNet for small images, with exits after any of its 3n blocks.

    All heads are `Head(classes)`.

    Args:
      depth: 6n + 2.
      width: channels of the first group; the next two have twice and four times as many.
    """
    check_size(image, width=width)
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"a ResNet depth of {depth}; give 6n + 2: 8, 14, 20, 32, 44, 56, 110 ...")
    blocks: list[nn.Module] = [
        BasicBlock(width << group, 2 if group and not i else 1, dtype)
        for group in range(3)
        for i in range(n)
    ]
    blocks[0] = Chain((Stem(width, dtype), blocks[0]))
    last = Head(classes, gate=gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


class LargeStem(nn.Module):
    """A strided 7x7 convolution and max pooling, a quarter of the size; or one 3x3 convolution."""

    width: int
    small: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        size, stride = (3, 1) if self.small else (7, 2)
        conv = convolution(self.width, size, stride, self.dtype, "conv1")
        x = nn.relu(Norm(dtype=self.dtype, name="bn1")(conv(x.astype(self.dtype)), train=train))
        return x if self.small else shrink(x)


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck, beside a shortcut, which is
    projected where the shape changes."""

    width: int
    stride: int = 1
    bottleneck: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        out = 4 * self.width if self.bottleneck else self.width
        layers = [(self.width, 3, self.stride), (out, 3, 1)]
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)]
        y = x
        for i, (width, size, stride) in enumerate(layers, 1):
            y = convolution(width, size, stride, self.dtype, f"conv{i}")(y)
            y = Norm(dtype=self.dtype, name=f"bn{i}")(y, train=train)
            y = nn.relu(y) if i < len(layers) else y
        if x.shape != y.shape:
            x = convolution(out, 1, self.stride, self.dtype, "downsample_0")(x)
            x = Norm(dtype=self.dtype, name="downsample_1")(x, train=train)
        return nn.relu(x + y)


def resnet_imagenet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: int = 18,
    width: int = 64,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """The ResNet of ImageNet, with exits after any of its 8 (depth 18) or 16 blocks.

    All heads are `Head(classes)`.

    Args:
      image: under 64 pixels, the stem is one 3x3 convolution and keeps the size.
      depth: 18 or 34, of basic blocks, or 50, of bottlenecks.
      width: channels of the first group; each of the next three has twice as many.
    """
    check_size(image, width=width)
    if depth not in GROUPS:
        raise ValueError(f"a ResNet depth of {depth}; give {', '.join(map(str, GROUPS))}.")
    blocks: list[nn.Module] = [
        ProjectedBlock(width << group, 2 if group and not i else 1, depth >= 50, dtype)
        for group, count in enumerate(GROUPS[depth])
        for i in range(count)
    ]
    blocks[0] = Chain((LargeStem(width, small_image(image), dtype), blocks[0]))
    last = Head(classes, gate=gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


GROUPS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


_AKAMASTER = "akamaster/pytorch_resnet_cifar10, d5489e8"
_PAPER = "He, Zhang, Ren, Sun, 2016, https://arxiv.org/abs/1512.03385"

SMALL_IMAGES = Family(
    resnet,
    _PAPER,
    {"depth": 8, "width": 4, "image": (8, 8, 3)},
    (
        Published("ResNet-20", {"classes": 10, "depth": 20}, 269_722, 40.6e6, _AKAMASTER),
        Published("ResNet-32", {"classes": 10, "depth": 32}, 464_154, 68.9e6, _AKAMASTER),
        Published("ResNet-44", {"classes": 10, "depth": 44}, 658_586, 97.2e6, _AKAMASTER),
        Published("ResNet-56", {"classes": 10, "depth": 56}, 853_018, 125.5e6, _AKAMASTER),
        Published("ResNet-110", {"classes": 10, "depth": 110}, 1_727_962, 253e6, _AKAMASTER),
    ),
)
IMAGENET = Family(
    resnet_imagenet,
    _PAPER,
    {"depth": 18, "width": 4, "image": (8, 8, 3)},
    (
        Published("ResNet-18", {**FOR_IMAGENET, "depth": 18}, 11_689_512, 1.814e9, TORCHVISION),
        Published("ResNet-34", {**FOR_IMAGENET, "depth": 34}, 21_797_672, 3.664e9, TORCHVISION),
        Published("ResNet-50", {**FOR_IMAGENET, "depth": 50}, 25_557_032, 4.089e9, TORCHVISION),
    ),
)
