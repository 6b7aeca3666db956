"""Wide ResNets: pre-activation residual networks of few and wide blocks.

Zagoruyko, Komodakis, *Wide residual networks*, BMVC 2016, https://arxiv.org/abs/1605.07146.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import Family, Published
from eejax.models.heads import Head, Pooled
from eejax.models.layers import Norm, check_rate, check_size, convolution
from eejax.network import EarlyExitNetwork


class Stem(nn.Module):
    """A 3x3 convolution, `[B, H, W, C]` to `[B, H, W, 16]`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
        return convolution(16, 3, 1, self.dtype, "conv1")(x.astype(self.dtype))


class Block(nn.Module):
    """Normalisation, ReLU and a 3x3 convolution, twice, beside a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution after the first
    normalisation. Dropout acts before the second convolution.
    """

    width: int
    stride: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = nn.relu(Norm(dtype=self.dtype, name="bn1")(x, train=train))
        if x.shape[-1] != self.width:
            x = convolution(self.width, 1, self.stride, self.dtype, "shortcut")(y)
        y = convolution(self.width, 3, self.stride, self.dtype, "conv1")(y)
        y = nn.relu(Norm(dtype=self.dtype, name="bn2")(y, train=train))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + convolution(self.width, 3, 1, self.dtype, "conv2")(y)


def wideresnet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: int = 28,
    width: int = 10,
    dropout: float = 0.0,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A wide ResNet, WRN-depth-width, with exits after any of its 3n blocks.

    All heads are `Head(classes, Pooled(norm=True))`.

    Args:
      depth: 6n + 4.
      width: a factor on the 16, 32 and 64 channels of the three groups.
      dropout: in each block, between its convolutions; 0.3 in the paper, where it helps.
    """
    check_size(image, width=width)
    check_rate(dropout=dropout)
    n, rest = divmod(depth - 4, 6)
    if rest or n < 1:
        raise ValueError(f"a wide ResNet's depth of {depth}; give 6n + 4: 10, 16, 22, 28, 40 ...")
    blocks: list[nn.Module] = [
        Block(16 * width << group, 2 if group and not i else 1, dropout, dtype)
        for group in range(3)
        for i in range(n)
    ]
    blocks[0] = Chain((Stem(dtype), blocks[0]))
    last = Head(classes, Pooled(norm=True), gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


_SOURCE = "xternalz/WideResNet-pytorch, 1171f93"

FAMILY = Family(
    wideresnet,
    "Zagoruyko, Komodakis, 2016, https://arxiv.org/abs/1605.07146",
    {"depth": 10, "width": 1, "image": (8, 8, 3)},
    (
        Published(
            "WRN-16-8", {"classes": 10, "depth": 16, "width": 8}, 10_961_370, 1.548e9, _SOURCE
        ),
        Published(
            "WRN-40-4", {"classes": 10, "depth": 40, "width": 4}, 8_949_210, 1.299e9, _SOURCE
        ),
        Published(
            "WRN-28-10", {"classes": 10, "depth": 28, "width": 10}, 36_479_194, 5.243e9, _SOURCE
        ),
    ),
    {"dropout": 0.3},
)
