"""Samples' features in the form that a TPU stores without padding.

A TPU stores arrays in tiles of 8 sublanes (16 of two bytes, 32 of one) and 128 lanes, and pads the
last two axes to them. Images with 16 channels would take eight times their size. Inside a program
XLA avoids that by taking the batch as lanes, but a buffer to which survivors are appended at any
row has to keep each row together. So such a buffer holds each sample as whole tiles, `[R, K, 128]`,
and a tile of samples is brought into the form that the stage wants when it is read.

Layouts are fixed for what is read and written: otherwise XLA chooses that of the stage for the
whole buffer, and copies it. Images are fixed on the stage's side too, in the form that convolutions
want: otherwise XLA keeps the rows' layout through the whole stage, and changes it in every block.
docs/lab/xla.md has the figures.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from eejax.network import PyTree

LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """An array `[R, *shape]` as a TPU stores it without padding.

    Attributes:
      array: `[R, K, 128]`, `[R, K]` or `[R, *shape]`, with rows as the major axis.
      shape: of one row.
    """

    array: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def on_tpu(platform: str | None = None) -> bool:
    """Whether a program for this platform, default this process's, will run on a TPU.

    Args:
      platform: `"cpu"`, `"cuda"`, `"tpu"`, or the kind of a device such as `"TPU v5 lite"`.
    """
    return (platform or jax.default_backend()).lower().startswith("tpu")


def packed(rows: PyTree) -> PyTree:
    """Packs each array `[R, ...]` of three or more axes; the others stay as they are."""
    return jax.tree.map(lambda x: pack(x) if x.ndim > 2 else x, rows)


def unpacked(rows: PyTree) -> PyTree:
    """The arrays that `packed` was given."""
    return jax.tree.map(lambda x: unpack(x) if is_packed(x) else x, rows, is_leaf=is_packed)


def is_packed(x: Any) -> bool:
    """Whether a node of a pytree is a `Packed`."""
    return isinstance(x, Packed)


def pack(x: Array) -> Packed:
    """Packs `[R, ...]`, unless it takes at most a quarter more than its own size as it is."""
    x = _for_convolutions(x)
    rows, shape = x.shape[0], x.shape[1:]
    size, sublanes = math.prod(shape), 32 // x.dtype.itemsize
    if len(shape) > 1 and padded_size(shape, sublanes) <= 1.25 * size:
        return Packed(_row_major(x), shape)
    flat = x.reshape(rows, size)
    if size < sublanes * LANES:
        return Packed(_row_major(flat), shape)
    whole = padded_size((-(-size // LANES), LANES), sublanes)
    flat = jnp.pad(flat, ((0, 0), (0, whole - size)))
    return Packed(_row_major(flat.reshape(rows, -1, LANES)), shape)


def unpack(x: Packed) -> Array:
    """The array `[R, *shape]`."""
    array = _row_major(x.array)
    if array.shape[1:] != x.shape:
        flat = array.reshape(len(array), -1)[:, : math.prod(x.shape)]
        array = flat.reshape(len(array), *x.shape)
    return _for_convolutions(array)


def empty(rows: PyTree, size: int) -> PyTree:
    """Buffers of `size` rows for what `packed` returned; packed ones hold any values."""

    def make(x: Any) -> Any:
        if is_packed(x):
            return Packed(lax.empty((size, *x.array.shape[1:]), x.array.dtype), x.shape)
        return jnp.zeros((size, *x.shape[1:]), x.dtype)

    return jax.tree.map(make, rows, is_leaf=is_packed)


def padded_size(shape: tuple[int, ...], sublanes: int) -> int:
    """Elements that an array takes in row-major order, its last two axes padded."""
    *major, second, last = shape
    return math.prod(major) * -(-second // sublanes) * sublanes * -(-last // LANES) * LANES


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _for_convolutions(x: Array) -> Array:
    """Images `[R, H, W, C]` with the batch in the lanes, or, if the channels fill those, in the
    sublanes."""
    if x.ndim != 4:
        return x
    minor = (3, 0) if x.shape[3] < LANES else (0, 3)
    return with_layout_constraint(x, Layout((1, 2, *minor)))
