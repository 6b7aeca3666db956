"""Features as bytes, for a link: as they are, in bfloat16, or in int8 by channel; also compressed.

A sample's arrays before a stage have shapes that both ends know from the artifact (`Layout`), so
the bytes hold values alone, and nothing on the wire says how large anything is. Feature maps and
tokens, arrays of two axes and more, are encoded; what is smaller (a policy's state, the last
head's logits) stays as it is, since decisions depend on it.

int8 is symmetric, `x ~ q * scale`, with a scale for each channel of each sample: the largest
magnitude over 127, as is usual for weights (Jacob et al., CVPR 2018,
https://arxiv.org/abs/1712.05877). Channels are the first axis of a feature map, as ONNX holds it,
and the last of tokens. An infinity becomes the largest finite magnitude of its channel, and a NaN
0; the other codecs keep both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eejax.runtime import Runtime

CODECS = ("float32", "bfloat16", "int8", "float32+zstd", "bfloat16+zstd", "int8+zstd")
LOSSLESS = ("float32", "float32+zstd")
_SUFFIX = "+zstd"
# Fast, and nearly as small as higher levels make features.
_LEVEL = 1


class Array(NamedTuple):
    """One array of a sample.

    Attributes:
      shape: without the batch axis.
      dtype: as NumPy names it.
    """

    shape: tuple[int, ...]
    dtype: str


# Of a sample, before a stage.
Layout = tuple[Array, ...]


def layouts(runtime: Runtime) -> list[Layout]:
    """What each of the E stages reads, found by running them once on an image."""
    exits = runtime.manifest.num_exits
    never = np.full(exits - 1, np.inf, np.float32)
    arrays: tuple[np.ndarray, ...] = (np.zeros((1, *runtime.manifest.image), np.uint8),)
    found = []
    for e in range(exits):
        found.append(tuple(Array(a.shape[1:], str(a.dtype)) for a in arrays))
        arrays = runtime.run_stage(e, arrays, never).arrays
    return found


def encode(arrays: Sequence[np.ndarray], codec: str) -> bytes:
    """The bytes of one sample.

    Args:
      arrays: each `[1, ...]`.
      codec: of `CODECS`.
    """
    base = codec.removesuffix(_SUFFIX)
    data = b"".join(_encoded(array[0], base) for array in arrays)
    return _zstd().ZstdCompressor(level=_LEVEL).compress(data) if codec != base else data


def decode(data: bytes, layout: Layout, codec: str) -> tuple[np.ndarray, ...]:
    """The arrays of one sample, each `[1, ...]`.

    Args:
      data: by `encode`.
      layout: of the arrays.
      codec: of `CODECS`.

    Raises:
      ValueError: if there is no such codec, or the bytes are not those of these arrays.
    """
    if codec not in CODECS:
        raise ValueError(f"codec {codec[:80]!r}; give one of {', '.join(CODECS)}.")
    base = codec.removesuffix(_SUFFIX)
    sizes = [_size(array, base) for array in layout]
    if codec != base:
        data = _decompressed(data, sum(sizes))
    if len(data) != sum(sizes):
        raise ValueError(f"features of {len(data)} bytes; expected {sum(sizes)} in {codec}.")
    arrays, start = [], 0
    for array, size in zip(layout, sizes, strict=True):
        arrays.append(_decoded(data[start : start + size], array, base)[None])
        start += size
    return tuple(arrays)


def _encodes(array: Array, base: str) -> bool:
    return base != "float32" and array.dtype == "float32" and len(array.shape) >= 2


def _size(array: Array, base: str) -> int:
    count = int(np.prod(array.shape))
    if not _encodes(array, base):
        return count * np.dtype(array.dtype).itemsize
    return 2 * count if base == "bfloat16" else count + 4 * array.shape[_channels(array.shape)]


def _encoded(array: np.ndarray, base: str) -> bytes:
    if not _encodes(Array(array.shape, str(array.dtype)), base):
        return np.ascontiguousarray(array).tobytes()
    if base == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        # To the nearest, ties to even, as XLA rounds; a NaN would become infinity or 0.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded)
        return rounded.astype("<u2").tobytes()
    others = tuple(axis for axis in range(array.ndim) if axis != _channels(array.shape))
    finite = np.nan_to_num(array, posinf=0, neginf=0)
    largest = np.abs(finite).max(others, keepdims=True)
    scale = largest / np.float32(127)
    finite = np.nan_to_num(np.clip(array, -largest, largest))
    # A subnormal scale is far from exact.
    values = np.clip(np.rint(finite / np.where(scale > 0, scale, 1)), -127, 127).astype(np.int8)
    return scale.astype("<f4").tobytes() + values.tobytes()


def _decoded(data: bytes, array: Array, base: str) -> np.ndarray:
    if not _encodes(array, base):
        return np.frombuffer(data, array.dtype).reshape(array.shape)
    if base == "bfloat16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(array.shape)
    axis = _channels(array.shape)
    channels = array.shape[axis]
    scale = np.frombuffer(data, "<f4", channels)
    values = np.frombuffer(data, np.int8, offset=4 * channels).reshape(array.shape)
    with np.errstate(invalid="ignore", over="ignore"):  # scales are what came
        return values * scale.reshape([channels if i == axis else 1 for i in range(values.ndim)])


def _channels(shape: tuple[int, ...]) -> int:
    """The axis of the channels."""
    return 0 if len(shape) >= 3 else len(shape) - 1


def _decompressed(data: bytes, size: int) -> bytes:
    zstd = _zstd()
    try:
        # A size in the frame, which may have none, would be allocated.
        if zstd.frame_content_size(data) not in (-1, size):
            raise ValueError(f"features that are not {size} bytes by zstd.")
        return zstd.ZstdDecompressor().decompress(data, size, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise ValueError(f"features are not compressed by zstd: {error}") from error


def _zstd() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError:
        message = "codecs with zstd need zstandard: pip install zstandard"
        raise ModuleNotFoundError(message) from None
    return zstandard
