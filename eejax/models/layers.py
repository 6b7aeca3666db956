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
      scale: whether a scale is learned beside the offset; a convolution that follows directly makes
        it redundant.
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


class ConvPool(nn.Module):
    """A convolution with an offset, ReLU and pooling: the block of networks without shortcuts.

    Attributes:
      width: channels that come out.
      size: of the kernel.
      stride: by which the image shrinks.
      padding: pixels on each side.
      pool: 2x2 pooling at the end.
      norm: batch normalisation before the ReLU; the offset stays, as in the published VGGs.
      dtype: of the arithmetic.
    """

    width: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: bool = False
    norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = nn.Conv(
            self.width,
            (self.size, self.size),
            self.stride,
            padding=self.padding,
            dtype=self.dtype,
            kernel_init=he_in,
            conv_general_dilated=convolve,
            name="conv",
        )
        x = conv(x.astype(self.dtype))
        if self.norm:
            x = Norm(dtype=self.dtype, name="bn")(x, train=train)
        x = nn.relu(x)
        return halved(x) if self.pool else x


class Depthwise(nn.Module):
    """A convolution of each channel by itself, without bias, `[B, H, W, K]` to the same channels.

    XLA has no fast kernel for it on a CPU, where a sum of shifted images, which is elementwise and
    fused, is 14 to 46 times faster (`python -m experiments.microbenchmarks depthwise`).

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

    Both sides are padded equally, as in PyTorch; `SAME` pads a strided convolution on one side
    only.
    """
    return nn.Conv(
        width,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=bias,
        dtype=dtype,
        kernel_init=he,
        conv_general_dilated=convolve,
        name=name,
    )


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Array:
    """`lax.conv_general_dilated`, for `flax.linen.Conv` without dilation. An image that is smaller
    than its square kernel, and padded to keep its size, is convolved by `small` on a CPU. XLA's own
    convolution is then 5 to 150 times slower in batches of 16 or more; for one image there is no
    clear winner (`python -m experiments.microbenchmarks small`)."""
    convolution = functools.partial(
        lax.conv_general_dilated, window_strides=strides, padding=padding, **options
    )
    size, reach = kernel.shape[0], kernel.shape[0] // 2
    kept = tuple(strides) == (1, 1) and [tuple(side) for side in padding] == [(reach, reach)] * 2
    whole = kernel.shape[1] == size and size % 2 == 1 and kernel.shape[2] == x.shape[-1]
    if not (kept and whole and max(x.shape[1:3]) < size):
        return convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=small, default=convolution)


def small(x: Array, kernel: Array) -> Array:
    """`x` `[B, H, W, I]` with a kernel `[n, n, I, O]`, padded to its size, by matrix products.

    A pixel of the result is the product of what its window holds of the image with that part of the
    kernel; there are H x W products.
    """
    b, h, w, _ = x.shape
    reach = kernel.shape[0] // 2

    def window(i: int, side: int) -> slice:
        return slice(max(0, i - reach), min(side, i + reach + 1))

    def shifted_back(part: slice, i: int) -> slice:
        return slice(part.start - i + reach, part.stop - i + reach)

    pixels = []
    for i in range(h):
        for j in range(w):
            rows, columns = window(i, h), window(j, w)
            seen = x[:, rows, columns].reshape(b, -1)
            weights = kernel[shifted_back(rows, i), shifted_back(columns, j)]
            weights = weights.reshape(seen.shape[1], -1)
            pixels.append(jnp.matmul(seen, weights, preferred_element_type=jnp.float32))
    return jnp.stack(pixels, 1).reshape(b, h, w, -1).astype(x.dtype)


def drop_branch(x: Array, rate: float, train: bool) -> Array:
    """Stochastic depth: in training, zeroes a residual branch `[B, ...]` of some samples.

    What is left is divided by `1 - rate`, so the expected value does not change. Huang, Sun, Liu,
    Sedra, Weinberger, *Deep networks with stochastic depth*, ECCV 2016,
    https://arxiv.org/abs/1603.09382. To be called inside a compact module.
    """
    drop = nn.Dropout(rate, broadcast_dims=tuple(range(1, x.ndim)))
    return drop(x, deterministic=not train)


he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Scaled by the inputs, so that activations without normalisation keep their size in a layer that is
# much wider than the one before.
he_in = nn.initializers.he_normal()


def small_image(image: Sequence[int]) -> bool:
    """Whether an image is too small to be shrunk 32 times, as networks for ImageNet do; they then
    leave out their first reductions."""
    return min(image[:2]) < 64


def shrink(x: Array) -> Array:
    """3x3 max pooling with stride 2 and padding 1, as in the stems of networks for ImageNet."""
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


def check_size(image: Sequence[int], least: int = 1, **sizes: float | Sequence[float]) -> None:
    """Checks the sizes of a network.

    Args:
      image: `(height, width, channels)`.
      least: the smallest height and width, in pixels.
      **sizes: a number, or a sequence of them, by the name of the argument.

    Raises:
      ValueError: if `image` is not three positive whole numbers, a side is shorter than `least`, a
        size is not positive, or a sequence is empty.
    """
    shape = np.asarray(image)
    if shape.shape != (3,) or shape.dtype.kind not in "iu" or shape.min() < 1:
        raise ValueError(f"image {image}; give (height, width, channels), positive whole numbers.")
    for name, size in sizes.items():
        # Written so that a NaN fails.
        if np.size(size) == 0 or not np.greater(size, 0).all():
            expected = "one or more positive numbers" if np.ndim(size) else "a positive number"
            raise ValueError(f"{name} {size}; give {expected}.")
    if min(image[:2]) < least:
        raise ValueError(
            f"images of {image[0]}x{image[1]}; this network needs at least {least}x{least}."
        )


def check_rate(**rates: float) -> None:
    """Raises ValueError if a rate of dropout or stochastic depth is not in [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} of {rate}; give a rate from 0 to less than 1.")


def check_patches(image: Sequence[int], patch: int) -> None:
    """Raises ValueError if the sides of the image are not multiples of `patch`."""
    if image[0] % patch or image[1] % patch:
        raise ValueError(
            f"images of {image[0]}x{image[1]} for patches of {patch}x{patch}; give a multiple."
        )
