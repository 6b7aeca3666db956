"""MSDNet: features at several scales at once, densely connected; exits read the coarsest.

Huang, Chen, Li, Wu, van der Maaten, Weinberger, *Multi-scale dense networks for resource efficient
image classification*, ICLR 2018, https://arxiv.org/abs/1703.09844; exactly as in
https://github.com/kalviny/MSDNet-PyTorch. Features are a tuple of scales, the finest first. A layer
adds channels to each of them, from it and from the next finer one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import FOR_IMAGENET, Family, Published
from eejax.models.heads import Head, Reduced
from eejax.models.layers import Norm, check_size, convolution, shrink, small_image
from eejax.network import EarlyExitNetwork


class FirstLayer(nn.Module):
    """Images `[B, H, W, C]` to all scales; each is a strided convolution of the one before.

    Attributes:
      width: channels of the finest scale, before its factor.
      factors: of the channels of each scale.
      small: the finest scale comes from a 3x3 convolution, not a strided 7x7 one with pooling.
    """

    width: int
    factors: Sequence[int]
    small: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, ...]:
        x = x.astype(self.dtype)
        scales = []
        for i, factor in enumerate(self.factors):
            size, stride, names, bias = 3, 2 if i else 1, f"layers_{i}_net", False
            if not (i or self.small):
                size, stride, names, bias = 7, 2, "layers_0", True
            x = _conv(x, factor * self.width, names, 0, train, size, stride, bias)
            if not (i or self.small):
                x = shrink(x)
            scales.append(x)
        return tuple(scales)


class Layer(nn.Module):
    """Adds channels to each scale, and may drop the finest.

    Attributes:
      growth: channels that the finest scale gains, before its factor.
      factors: of every scale of the network, for its growth and its bottlenecks.
      scales: the number of scales of the output, the coarsest ones.
    """

    growth: int
    factors: Sequence[int]
    scales: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool) -> tuple[Array, ...]:
        def gain(x: Array, width: int, factor: int, name: str, stride: int) -> Array:
            inner = min(x.shape[-1], factor * width)
            x = _conv(x, inner, f"{name}_net", 0, train, 1)
            return _conv(x, width, f"{name}_net", 3, train, 3, stride)

        out = []
        for i in range(self.scales):
            at = i - self.scales  # counted from the coarsest, as the input may have one scale more
            x, factor, width = features[at], self.factors[at], self.growth * self.factors[at]
            name = f"layers_{i}_conv"
            if len(features) + at == 0:  # no finer scale
                parts = [x, gain(x, width, factor, f"{name}_normal", 1)]
            else:
                finer, half = self.factors[at - 1], width // 2
                down = gain(features[at - 1], half, finer, f"{name}_down", 2)
                parts = [x, down, gain(x, half, factor, f"{name}_normal", 1)]
            out.append(jnp.concatenate(parts, axis=-1))
        return tuple(out)


class Transition(nn.Module):
    """A 1x1 convolution to `widths` channels in each scale."""

    widths: Sequence[int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[Array], *, train: bool) -> tuple[Array, ...]:
        return tuple(
            _conv(x, width, f"m_{i}_net", 0, train, 1)
            for i, (x, width) in enumerate(zip(features, self.widths, strict=True))
        )


class Step(NamedTuple):
    """One layer: the number of scales of its output, and whether a transition halves the
    channels after it."""

    scales: int
    reduced: bool


def steps(depth: int, scales: int, prune: str) -> list[Step]:
    """The layers of a network with `depth` layers and `scales` scales.

    Raises:
      ValueError: if there are fewer layers than scales, or `prune` is another string.
    """
    if depth < scales:
        raise ValueError(f"{depth} layers for {scales} scales; give at least as many layers.")
    if prune == "max":
        interval = -(-depth // scales)
        counts = [scales - i // interval for i in range(depth)]
        return [Step(n, before > n) for before, n in zip([scales, *counts], counts, strict=False)]
    if prune == "min":
        thirds = (depth // 3, 2 * depth // 3)
        return [Step(min(scales, depth - i), i + 1 in thirds) for i in range(depth)]
    raise ValueError(f'scales pruned by {prune!r}; give "max" or "min".')


def msdnet(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    depth: int = 16,
    width: int = 16,
    growth: int = 6,
    factors: Sequence[int] = (1, 2, 4),
    prune: str = "max",
    base: int = 4,
    step: int = 2,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """An MSDNet, with exits after any of its layers.

    Without arguments it is the network for anytime prediction on CIFAR, with seven exits. That for
    budgets on CIFAR has `depth=15, exits=(1, 3, 6, 10, 15)`, that for ImageNet `depth=20, width=32,
    growth=16, factors=(1, 2, 4, 4), step=4`. All heads read the coarsest scale by `heads.Reduced`,
    with 128 channels for images under 64 pixels.

    Args:
      image: under 64 pixels, the first layer is a 3x3 convolution and keeps the size.
      depth: layers.
      width: channels of the finest scale at the start, before its factor.
      growth: channels that a layer adds to the finest scale, before its factor.
      factors: of each scale, the finest first, for its channels, its growth and its bottlenecks.
      prune: `"max"` drops the finest scale at equal intervals, `"min"` only in the last layers,
        where it can no longer reach the classifier.
      base: layers before the first exit, where `exits` is None.
      step: layers from one exit to the next, where `exits` is None.
      exits: None is after layer `base` and then every `step`, as published.

    Raises:
      ValueError: also if there are fewer layers than scales, or `prune` is another string.
    """
    factors = tuple(factors)
    sizes = {"depth": depth, "width": width, "growth": growth, "factors": factors}
    check_size(image, **sizes, base=base, step=step)
    small = small_image(image)
    blocks: list[nn.Module] = []
    channels = width
    for scales, reduced in steps(depth, len(factors), prune):
        block: nn.Module = Layer(growth, factors, scales, dtype)
        channels += growth
        if reduced:
            channels //= 2
            widths = tuple(channels * factor for factor in factors[-scales:])
            block = Chain((block, Transition(widths, dtype)))
        blocks.append(block)
    blocks[0] = Chain((FirstLayer(width, factors, small, dtype), blocks[0]))
    last = Head(classes, Reduced(128 if small else None), gate)
    exits = tuple(range(base, depth, step)) if exits is None else exits
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


def _conv(
    x: Array,
    width: int,
    names: str,
    first: int,
    train: bool,
    size: int,
    stride: int = 1,
    bias: bool = False,
) -> Array:
    """A convolution, normalised, and ReLU: modules `names_first` and the one after it."""
    conv = convolution(width, size, stride, x.dtype, f"{names}_{first}", bias)
    return nn.relu(Norm(dtype=x.dtype, name=f"{names}_{first + 1}")(conv(x), train=train))


_SOURCE = "kalviny/MSDNet-PyTorch, f654595"

FAMILY = Family(
    msdnet,
    "Huang, Chen, Li, Wu, van der Maaten, Weinberger, 2018, https://arxiv.org/abs/1703.09844",
    {"depth": 3, "width": 4, "growth": 2, "factors": (1, 2), "base": 1, "image": (8, 8, 3)},
    # Counted there, layer by layer, without the early classifiers and what they cost.
    (
        Published("MSDNet, CIFAR, anytime", {"classes": 100}, 853_984, 51.89e6, _SOURCE),
        Published(
            "MSDNet, CIFAR, budgets",
            {"classes": 100, "depth": 15, "exits": (1, 3, 6, 10, 15)},
            827_196,
            45.95e6,
            _SOURCE,
        ),
        Published(
            "MSDNet, ImageNet",
            {
                **FOR_IMAGENET,
                **{"depth": 20, "step": 4, "width": 32, "growth": 16, "factors": (1, 2, 4, 4)},
            },
            13_322_568,
            1.262e9,
            _SOURCE,
        ),
    ),
)
