"""AlexNet for small images: its five convolutions, padded, and one linear layer.

Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, 2014,
https://arxiv.org/abs/1404.5997, after Krizhevsky, Sutskever, Hinton, NeurIPS 2012. For small images
the hidden linear layers are left out, and all pooling is of 2x2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eejax.backbone import cut
from eejax.exits import Exits
from eejax.models.family import Family, Published
from eejax.models.heads import Flat, Head, Mixed
from eejax.models.layers import ConvPool, check_size
from eejax.network import EarlyExitNetwork


def alexnet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    width: int = 64,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """An AlexNet for small images, with exits after any of its five convolutions.

    A convolution and the pooling after it are one block. Early heads are `Head(classes, Mixed())`.

    Args:
      image: at least 16x16. The last pooling is left out below 29x29, where it would leave nothing.
      width: channels of the first block; the others have 3, 6, 4 and 4 times as many.
    """
    check_size(image, 16, width=width)
    block = functools.partial(ConvPool, dtype=dtype)
    blocks: list[nn.Module] = [
        block(width, 11, 4, padding=5, pool=True),
        block(3 * width, 5, padding=2, pool=True),
        block(6 * width),
        block(4 * width),
        block(4 * width, pool=True),
    ]
    early, last = Head(classes, Mixed(), gate), Head(classes, Flat(), gate)
    return cut(blocks, exits, head or (lambda e: early), classifier=last, image=image)


FAMILY = Family(
    alexnet,
    "Krizhevsky, 2014, https://arxiv.org/abs/1404.5997",
    {"width": 4, "image": (16, 16, 3)},
    (
        Published(
            "AlexNet (CIFAR)",
            {"classes": 10},
            2_472_266,
            14.96e6,
            "bearpaw/pytorch-classification, 24f1c45",
        ),
    ),
)
