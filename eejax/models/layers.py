"""Layers that several families share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Norm(nn.Module):
    """Batch normalisation, computed in float32 whatever the dtype around it.

    Attributes:
      scale: learn a scale beside the offset; a convolution that follows directly can make any.
      dtype: of the result.
    """

    scale: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[..., K]` to the same shape."""
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, use_scale=self.scale
        )
        return norm(x.astype(jnp.float32)).astype(self.dtype)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, without bias, `[B, H, W, K]` to the same channels.

    XLA has no fast kernel for it on a CPU. There a sum of shifted images, which is elementwise and
    fused, is 14 to 46 times as fast (`python -m experiments.microbenchmarks depthwise`).

    Attributes:
      size: of the kernel, odd; the padding keeps the image's size.
      stride: by which the image shrinks.
      dtype: of the arithmetic.
    """

    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, 1, x.shape[-1])
        # Each output reads one channel. Counted over all channels it would start so small that
        # nothing passes before the statistics have adapted.
        kernel = self.param("kernel", he_in, shape, jnp.float32)
        # Flax's own methods cannot be branches of a program.
        return lax.platform_dependent(
            x,
            kernel.astype(self.dtype),
            cpu=functools.partial(shifted, stride=self.stride),
            default=functools.partial(convolved, stride=self.stride),
        )


def convolved(x: Array, kernel: Array, stride: int) -> Array:
    """`x` `[B, H, W, K]` with a depthwise kernel `[n, n, 1, K]`, padded to its size."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted(x: Array, kernel: Array, stride: int) -> Array:
    """As `convolved`, by shifted images; summed in float32, as a convolution is."""
    size = kernel.shape[0]
    pad = size // 2
    h, w = ((side - 1) // stride * stride + 1 for side in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))).astype(jnp.float32)
    kernel = kernel.astype(jnp.float32)
    parts = [
        padded[:, i : i + h : stride, j : j + w : stride] * kernel[None, None, i, j]
        for i in range(size)
        for j in range(size)
    ]
    return functools.reduce(jnp.add, parts).astype(x.dtype)


def convolution(
    width: int, size: int, stride: int, dtype: Any, name: str | None = None, bias: bool = False
) -> nn.Conv:
    """A convolution to `width` channels with a kernel of `size` x `size`, odd.

    It pads both sides alike, whatever the stride, as the published networks do: SAME would pad a
    strided convolution on one side only.
    """
    return nn.Conv(
        width,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=bias,
        dtype=dtype,
        kernel_init=he,
        name=name,
    )


he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# By the inputs, so that networks without normalisation keep the size of what passes through them
# where a layer is much wider than the one before.
he_in = nn.initializers.he_normal()


def small_image(image: Sequence[int]) -> bool:
    """Whether images `(height, width, channels)` are too small for a network of ImageNet's shape,
    which shrinks them 32 times; such networks then leave out their first reductions."""
    return min(image[:2]) < 64


def shrink(x: Array) -> Array:
    """3x3 max pooling with stride 2 and padding 1, as networks of ImageNet's shape begin."""
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]


def halved(x: Array, least: int = 2) -> Array:
    """2x2 max pooling with a stride of 2, `[B, H, W, K]` to `[B, H // 2, W // 2, K]`.

    An odd last row or column is left out, and with a side under `least` pixels nothing is pooled. A
    maximum over a reshaped array: on a CPU its gradient is several times quicker than that of a
    window reduction.
    """
    b, h, w, k = x.shape
    if min(h, w) < least:
        return x
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, k).max((2, 4))


def check_size(
    image: Sequence[int],
    least: int = 1,
    network: str = "any network",
    **sizes: float | Sequence[float],
) -> None:
    """Refuses what no network can be made of.

    Args:
      image: `(height, width, channels)`.
      least: pixels that the shorter side has at least.
      network: what needs them, for the message.
      **sizes: numbers, or a number for each of some parts, by the names of the arguments.

    Raises:
      ValueError: not three positive whole numbers, a side that is too short, a size that is not
        positive, or no parts.
    """
    shape = np.asarray(image)
    if shape.shape != (3,) or shape.dtype.kind not in "iu" or shape.min() < 1:
        raise ValueError(f"image {image}; give (height, width, channels), positive whole numbers.")
    for name, size in sizes.items():
        # Not a number is not positive either.
        if np.size(size) == 0 or not np.greater(size, 0).all():
            wanted = "one or more positive numbers" if np.ndim(size) else "a positive number"
            raise ValueError(f"{name} {size}; give {wanted}.")
    if min(image[:2]) < least:
        raise ValueError(
            f"images of {image[0]}x{image[1]} for {network}; give at least {least}x{least}."
        )


def check_patches(image: Sequence[int], patch: int) -> None:
    """Refuses images `(height, width, channels)` that are not whole patches of `patch` pixels."""
    if image[0] % patch or image[1] % patch:
        raise ValueError(
            f"images of {image[0]}x{image[1]} for patches of {patch}x{patch}; give a multiple."
        )
