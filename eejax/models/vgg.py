"""VGG: 3x3 convolutions alone, of depth 11, 13 or 16, for small images and for ImageNet.

Simonyan, Zisserman, *Very deep convolutional networks for large-scale image recognition*, ICLR
2015, https://arxiv.org/abs/1409.1556. The one for small images has batch normalisation and one
linear layer at its end, as it is used on CIFAR since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eejax.backbone import cut
from eejax.exits import Exits
from eejax.models.family import FOR_IMAGENET, TORCHVISION, Family, Published
from eejax.models.heads import Flat, Head, Hidden, Mixed, Pooled
from eejax.models.layers import ConvPool, check_rate, check_size
from eejax.network import EarlyExitNetwork

GROUPS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


def vgg(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: int = 16,
    width: int = 64,
    norm: bool = True,
    hidden: int | None = None,
    dropout: float = 0.0,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A VGG, with exits after any of its 8, 10 or 13 convolutions.

    A convolution and the pooling after it are one block. Early heads are `Head(classes, Mixed())`.

    Args:
      image: at least 32x32; with `hidden`, 224x224 or a multiple.
      depth: 11, 13 or 16, the number of layers with `hidden` ones.
      width: channels of the first group; the others have 2, 4, 8 and 8 times as many.
      norm: batch normalisation after each convolution.
      hidden: width of two hidden layers on 7x7 features: 4096 for ImageNet. Without it the
        classifier reads the average over the image.
      dropout: after each hidden layer; 0.5 in the paper.
    """
    if depth not in GROUPS:
        raise ValueError(f"a VGG depth of {depth}; give {', '.join(map(str, GROUPS))}.")
    check_size(image, 32, width=width)
    check_rate(dropout=dropout)
    if dropout and not hidden:
        raise ValueError(f"dropout of {dropout} without hidden layers; give hidden=, or 0.")
    # Five halvings, each of which drops an odd row, leave a multiple of 7.
    if hidden and any(side // 32 % 7 for side in image[:2]):
        raise ValueError(
            f"images of {image[0]}x{image[1]} for hidden layers on 7x7 features; give 224x224 or a "
            "multiple, or hidden=None."
        )
    blocks: list[nn.Module] = [
        ConvPool(width << min(group, 3), pool=i == count - 1, norm=norm, dtype=dtype)
        for group, count in enumerate(GROUPS[depth])
        for i in range(count)
    ]
    early = Head(classes, Mixed(), gate)
    reader = Hidden((hidden, hidden), Flat(7), dropout=dropout) if hidden else Pooled()
    last = Head(classes, reader, gate)
    return cut(blocks, exits, head or (lambda e: early), classifier=last, image=image)


_KUANGLIU = "kuangliu/pytorch-cifar, 49b7aa9"
_LARGE = {**FOR_IMAGENET, "hidden": 4096}
_BARE = {**_LARGE, "norm": False}

FAMILY = Family(
    vgg,
    "Simonyan, Zisserman, 2015, https://arxiv.org/abs/1409.1556",
    {"depth": 11, "width": 4, "image": (32, 32, 3)},
    (
        Published("VGG-11 (CIFAR)", {"classes": 10, "depth": 11}, 9_231_114, 152.8e6, _KUANGLIU),
        Published("VGG-13 (CIFAR)", {"classes": 10, "depth": 13}, 9_416_010, 228.3e6, _KUANGLIU),
        Published("VGG-16 (CIFAR)", {"classes": 10, "depth": 16}, 14_728_266, 313.2e6, _KUANGLIU),
        Published("VGG-11", {**_BARE, "depth": 11}, 132_863_336, 7.609e9, TORCHVISION),
        Published("VGG-13", {**_BARE, "depth": 13}, 133_047_848, 11.308e9, TORCHVISION),
        Published("VGG-16", {**_BARE, "depth": 16}, 138_357_544, 15.47e9, TORCHVISION),
        *(
            Published(
                f"VGG-{depth} with batch normalisation",
                {**_LARGE, "depth": depth},
                parameters,
                macs,
                TORCHVISION,
            )
            for depth, parameters, macs in (
                (11, 132_868_840, 7.609e9),
                (13, 133_053_736, 11.308e9),
                (16, 138_365_992, 15.47e9),
            )
        ),
    ),
    {"hidden": 8, "image": (224, 224, 3), "dropout": 0.5},
)
