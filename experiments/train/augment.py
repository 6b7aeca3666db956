"""Augmentation on the device: pure functions on uint8 images, inside the compiled training step.

`draw` makes the random choices and `transform` applies them, so that a test can give the same draws
to this code and to a plain reference. Nothing is converted to float on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Draws(NamedTuple):
    """Random choices for one batch.

    Attributes:
      shift: `[B, 2]` int32, rows and columns by which the view moves, each in [-shift, shift].
      centre: `[B, 2]` int32, row and column of the cutout's centre.
    """

    shift: jax.Array
    centre: jax.Array


def draw(key: jax.Array, batch: int, height: int, width: int, *, shift: int) -> Draws:
    """Draws the random choices for `batch` images of `height` x `width` pixels.

    Switching one of them off leaves the draws of the other as they are.
    """
    shift_key, centre_key = jax.random.split(key)
    bounds = jnp.asarray((height, width), jnp.int32)
    return Draws(
        shift=jax.random.randint(shift_key, (batch, 2), -shift, shift + 1, jnp.int32),
        centre=jax.random.randint(centre_key, (batch, 2), 0, bounds[None, :], jnp.int32),
    )


def transform(images: jax.Array, draws: Draws, *, cutout: int, fill: tuple[int, ...]) -> jax.Array:
    """Shifts (the border reflected, its own pixel not repeated), then cuts out.

    Args:
      images: uint8 [B, H, W, C].
      draws: from `draw`; shifts must be smaller than H and W.
      cutout: side of the square in pixels, clipped at the border; 0 is off.
      fill: C values in 0..255 for the square.

    Returns:
      uint8 [B, H, W, C].
    """
    _, height, width, _ = images.shape
    row = jnp.arange(height)[None, :]
    column = jnp.arange(width)[None, :]
    # out[i, j] = in[rows[i], columns[j]]: one lookup a row, one a column.
    rows = _reflect(row + draws.shift[:, :1], height)
    columns = _reflect(column + draws.shift[:, 1:], width)
    # Measured on two CPU cores (jax 0.10.2, B=512, 32x32x3): 0.41 ms. One gather of pixels takes
    # 0.47 ms, a vmap of dynamic_slice on padded images 1.8 ms, one-hot matrix products 6.2 ms, and
    # a select over all offsets 80 ms at shift 4, because XLA fuses the chain and recomputes it.
    out = _take(images, rows[:, :, None, None], axis=1)
    out = _take(out, columns[:, None, :, None], axis=2)
    if cutout:
        top_left = draws.centre - cutout // 2
        in_rows = (row >= top_left[:, :1]) & (row < top_left[:, :1] + cutout)
        in_columns = (column >= top_left[:, 1:]) & (column < top_left[:, 1:] + cutout)
        square = in_rows[:, :, None, None] & in_columns[:, None, :, None]
        out = jnp.where(square, jnp.asarray(fill, jnp.uint8)[None, None, None, :], out)
    return out


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    shift: int,
    cutout: int,
    fill: tuple[int, ...],
) -> jax.Array:
    """Shifts and blanks each image by its own random choice.

    Args:
      key: JAX key.
      images: uint8 [B, H, W, C].
      shift: largest shift in pixels, in each direction; 0 is off.
      cutout: side in pixels of the blanked square, whose centre is uniform over the image; 0 is off
        (DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552).
      fill: colour of the square, C values in 0..255: the mean pixel of the training images.

    Returns:
      uint8 [B, H, W, C].

    Raises:
      ValueError: if the images are not uint8 [B, H, W, C], `fill` has not C values in 0..255,
        `shift` is not in 0..min(H, W) - 1 (a reflection reaches no further), or `cutout` is
        negative.
    """
    if images.ndim != 4 or images.dtype != jnp.uint8:
        raise ValueError(f"augment takes uint8 [B, H, W, C], not {images.dtype} {images.shape}")
    batch, height, width, channels = images.shape
    if not 0 <= shift < min(height, width):
        raise ValueError(
            f"shift={shift} for images of {height}x{width}; give 0 to {min(height, width) - 1}"
        )
    if cutout < 0:
        raise ValueError(f"cutout={cutout}; give a side in pixels, or 0 for none")
    if len(fill) != channels or not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"fill={fill} for {channels} channels; give {channels} values in 0..255")
    if not (shift or cutout):
        return images
    draws = draw(key, batch, height, width, shift=shift)
    return transform(images, draws, cutout=cutout, fill=fill)


@jax.jit
def mirrored(key: jax.Array, images: jax.Array, epoch: jax.Array | int) -> jax.Array:
    """Half of a data set mirrored left-right, and in the next epoch the other half.

    So an image is seen from both sides in any two epochs, where independent draws would show half
    of the images twice from the same side. Jordan, *94% on CIFAR-10 in 3.29 seconds on a single
    GPU*, 2024, https://arxiv.org/abs/2404.00498.

    Args:
      key: draws the half; the same for all epochs of a run.
      images: uint8 [N, H, W, C].
      epoch: from 0.

    Returns:
      uint8 [N, H, W, C].
    """
    half = jax.random.bernoulli(key, shape=images.shape[:1])
    chosen = half ^ (jnp.asarray(epoch, jnp.int32) % 2 == 1)
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def epoch_order(key: jax.Array, n: int, batch: int) -> jax.Array:
    """A random order of `n` images in whole batches; `n % batch` images are left out.

    Returns:
      int32 [n // batch, batch], no index twice.

    Raises:
      ValueError: if there are fewer images than one batch takes.
    """
    if not 1 <= batch <= n:
        raise ValueError(f"a batch of {batch:,} from {n:,} images; give 1 to {n:,}")
    order = jax.random.permutation(key, np.arange(n, dtype=np.int32))
    return order[: n // batch * batch].reshape(n // batch, batch)


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Indices in -size < i < 2 size - 1, mirrored into 0..size - 1 at the centre of the border."""
    index = jnp.abs(index)
    return jnp.where(index >= size, 2 * (size - 1) - index, index)


def _take(array: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    # The indices are in bounds by construction: XLA need not clamp or fill.
    return jnp.take_along_axis(array, index, axis, mode="promise_in_bounds")
