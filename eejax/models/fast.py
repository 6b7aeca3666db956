"""A network that two CPU cores train in minutes, in the shape of airbench's: Jordan, *94% on
CIFAR-10 in 3.29 seconds on a single GPU*, 2024, https://arxiv.org/abs/2404.00498.

A fixed whitening of 2x2 patches, then six 3x3 convolutions that begin as identities, normalised
without a learned scale. airbench is twice as wide in the first two and a third wider in the others;
the widths here are for a CPU, where most of the time goes into large feature maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import Family
from eejax.models.heads import Head, Pooled
from eejax.models.layers import Norm, check_size, halved
from eejax.network import EarlyExitNetwork


class Whitening(nn.Module):
    """Projects patches of 2x2 pixels onto their principal components, each divided by its standard
    deviation, and onto the negatives of these; then GELU. It is never trained.

    `[B, H, W, C]` to `[B, H - 1, W - 1, 8 C]`. The components are those of the images that `init`
    is given. They stand among the running statistics, so that no optimiser sees them and
    checkpoints hold them. Page, *How to train your ResNet 8: bag of tricks*, 2019,
    https://web.archive.org/web/20231118151801/https://myrtle.ai/learn/how-to-train-your-resnet-8-bag-of-tricks/;
    the negatives are Jordan's.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
        x = x.astype(jnp.float32)
        kernel = self.variable("batch_stats", "kernel", whitening, x).value
        x = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.gelu(x)


def whitening(images: Array) -> Array:
    """The kernel of `Whitening` for images `[B, H, W, C]`, `[2, 2, C, 8 C]`."""
    h, w, c = images.shape[1] - 1, images.shape[2] - 1, images.shape[3]
    shifts = [images[:, i : i + h, j : j + w] for i in range(2) for j in range(2)]
    patches = jnp.stack(shifts, axis=-2).reshape(-1, 4 * c)
    patches = patches - patches.mean(0, keepdims=True)
    variances, components = jnp.linalg.eigh(patches.T @ patches / len(patches))
    # So much variance that a component without any, in images of one colour say, stays finite.
    kernel = components / jnp.sqrt(variances + 5e-4)[None]
    return jnp.concatenate([kernel, -kernel], axis=1).reshape(2, 2, c, 8 * c)


class Block(nn.Module):
    """A 3x3 convolution, with `pool` 2x2 pooling, and with `residual` a shortcut."""

    width: int
    pool: bool = False
    residual: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype, kernel_init=identity)(x)
        y = halved(y, 4) if self.pool else y
        y = nn.gelu(Norm(scale=False, dtype=self.dtype)(y, train=train))
        return x + y if self.residual else y


def identity(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """A 3x3 kernel `[3, 3, I, O]` that hands on its inputs; outputs beyond the I-th are random."""
    random = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)
    same = jnp.arange(min(shape[2:]))
    return random.at[..., : len(same)].set(0).at[1, 1, same, same].set(1)


def fast(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    width: int = 32,
    exits: Exits = (2, 3, 4),
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """The fast network: six blocks of a convolution each, with exits after any.

    The whitening is part of the first block. Blocks 1, 3 and 5 pool, down to 3x3 pixels; block 6
    has a shortcut. All heads are `Head(classes, Pooled("both"))`.

    Args:
      image: 2x2 pixels or more.
      width: channels of blocks 1 and 2; the others have 6 times as many.
    """
    check_size(image, 2, width=width)
    blocks: list[nn.Module] = [
        Chain((Whitening(dtype), Block(width, pool=True, dtype=dtype))),
        Block(width, dtype=dtype),
        Block(6 * width, pool=True, dtype=dtype),
        Block(6 * width, dtype=dtype),
        Block(6 * width, pool=True, dtype=dtype),
        Block(6 * width, residual=True, dtype=dtype),
    ]
    last = Head(classes, Pooled("both"), gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


FAMILY = Family(
    fast,
    "after Jordan, 2024, https://arxiv.org/abs/2404.00498",
    {"width": 4, "image": (8, 8, 3)},
)
