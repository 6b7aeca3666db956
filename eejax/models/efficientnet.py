"""EfficientNet: inverted residuals with squeeze-and-excitation, deeper and wider by two factors.

Tan, Le, *EfficientNet: rethinking model scaling for convolutional neural networks*, ICML 2019,
https://arxiv.org/abs/1905.11946, as in torchvision.
"""

from __future__ import annotations

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
from eejax.models.layers import check_rate, check_size, he, small_image
from eejax.models.mobilenet import ConvNorm, InvertedResidual, rounded
from eejax.network import EarlyExitNetwork


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor in (0, 1), from an MLP on the averages of all channels.

    Hu, Shen, Sun, *Squeeze-and-excitation networks*, CVPR 2018, https://arxiv.org/abs/1709.01507.

    Attributes:
      width: of the MLP's hidden layer.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
        share = x.astype(jnp.float32).mean((1, 2), keepdims=True).astype(self.dtype)
        share = nn.silu(self._layer(self.width, "fc1")(share))
        return x * nn.sigmoid(self._layer(x.shape[-1], "fc2")(share))

    def _layer(self, width: int, name: str) -> nn.Conv:
        return nn.Conv(width, (1, 1), dtype=self.dtype, kernel_init=he, name=name)


def efficientnet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: float = 1.0,
    width: float = 1.0,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """An EfficientNet, with exits after any of its blocks: the stem, 16 in B0, a last convolution.

    Early heads are `Head(classes, Pooled(norm=True))`, since blocks end without an activation.

    Args:
      image: at least 8x8. Under 64 pixels the stem and the first strided block keep the size, so
        that the image is halved three times instead of five.
      depth: a factor on the repeats of each block, rounded up: 1 for B0, 1.1 for B1, 1.2 for B2.
      width: a factor on the channels, rounded to multiples of 8: 1 for B0 and B1, 1.1 for B2.
      dropout: before the last classifier; 0.2 for B0 and B1, 0.3 for B2.
      stochastic_depth: the rate at which the last residual branch is dropped, 0.2 as published; it
        grows linearly from zero at the first.
    """
    check_size(image, 8, depth=depth, width=width)
    check_rate(dropout=dropout, stochastic_depth=stochastic_depth)
    small = small_image(image)
    before = rounded(32 * width)
    blocks: list[nn.Module] = [
        ConvNorm(before, 3, 1 if small else 2, activation=nn.silu, dtype=dtype)
    ]
    counts = block_counts(depth)
    for group, (expansion, channels, _, stride, size) in enumerate(GROUPS):
        for i in range(counts[group]):
            stays = i > 0 or (small and group == 1)
            after = rounded(channels * width)
            blocks.append(
                InvertedResidual(
                    after,
                    1 if stays else stride,
                    expansion,
                    size,
                    attention=SqueezeExcitation(before // 4, dtype),
                    activation=nn.silu,
                    drop=stochastic_depth * (len(blocks) - 1) / sum(counts),
                    dtype=dtype,
                )
            )
            before = after
    blocks.append(ConvNorm(4 * before, activation=nn.silu, dtype=dtype))
    early = Head(classes, Pooled(norm=True), gate)
    last = Head(classes, gate=gate, dropout=dropout)
    return cut(blocks, exits, head or (lambda e: early), classifier=last, image=image)


# Expansion, channels, repeats, stride of the first, size of the depthwise filter.
GROUPS = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def block_counts(depth: float) -> list[int]:
    """The blocks of each group, from a factor on their repeats."""
    return [math.ceil(repeats * depth) for _, _, repeats, _, _ in GROUPS]


FAMILY = Family(
    efficientnet,
    "Tan, Le, 2019, https://arxiv.org/abs/1905.11946",
    {"depth": 0.25, "width": 0.1, "image": (8, 8, 3)},
    (
        Published("EfficientNet-B0", FOR_IMAGENET, 5_288_548, 0.386e9, TORCHVISION),
        Published(
            "EfficientNet-B2",
            {"classes": 1000, "image": (288, 288, 3), "depth": 1.2, "width": 1.1},
            9_109_994,
            1.088e9,
            TORCHVISION,
        ),
    ),
    {"dropout": 0.2, "stochastic_depth": 0.2},
)
