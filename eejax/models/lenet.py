"""LeNet-5 as it is used today: two 5x5 convolutions with ReLU and max pooling, three linear layers.

LeCun, Bottou, Bengio, Haffner, *Gradient-based learning applied to document recognition*,
Proceedings of the IEEE 86, 1998, https://doi.org/10.1109/5.726791. Theirs has sigmoids, averages,
and connections that are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eejax.backbone import cut
from eejax.exits import Exits
from eejax.models.family import Family, Published
from eejax.models.heads import Flat, Head, Hidden, Mixed
from eejax.models.layers import ConvPool, check_size
from eejax.network import EarlyExitNetwork


def lenet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    width: int = 6,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A LeNet, with exits after its first convolution, its second, or both.

    The three linear layers are the last head; early heads are `Head(classes, Mixed())`.

    Args:
      image: at least 16x16.
      width: channels of the first convolution. The second has 8/3 as many (rounded down), and the
        linear layers 20 and 14 times as many: 16, 120 and 84 in a LeNet.
    """
    check_size(image, 16, width=width)
    blocks: list[nn.Module] = [
        ConvPool(channels, 5, padding=0, pool=True, dtype=dtype)
        for channels in (width, 8 * width // 3)
    ]
    early = Head(classes, Mixed(), gate)
    last = Head(classes, Hidden((20 * width, 14 * width), Flat()), gate)
    return cut(blocks, exits, head or (lambda e: early), classifier=last, image=image)


FAMILY = Family(
    lenet,
    "LeCun, Bottou, Bengio, Haffner, 1998, https://doi.org/10.1109/5.726791",
    {"width": 4, "image": (16, 16, 3)},
    (Published("LeNet", {"classes": 10}, 62_006, 651.7e3, "kuangliu/pytorch-cifar, 49b7aa9"),),
)
