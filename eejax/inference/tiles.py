"""How many samples a tile holds: by the batch, the size of the features, and the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax

from eejax.inference import lanes
from eejax.inference.step import Exit

# What a tile's features may take on a CPU; twice that no longer stays in the cache.
TILE_BYTES = 2 << 20
# And on a TPU an eighth of the memory that a core computes from, in MiB by the kind of device: what
# a convolution reads and what it writes fit beside some of the buffers. (JAX's
# `pallas.tpu.get_tpu_info` has the sizes, but answers only where a TPU is.)
VECTOR_MEMORY = {"TPU v2": 16, "TPU v3": 16, "TPU v4": 16, "TPU v5 lite": 128, "TPU v6 lite": 128}
OTHER_VECTOR_MEMORY = 64


def check_tiles(tiles: Sequence[int] | None) -> None:
    """Raises ValueError unless sizes decrease and each divides the one before it; None passes."""
    if tiles is None:
        return
    if not tiles or tiles[-1] < 1 or any(a <= b or a % b for a, b in itertools.pairwise(tiles)):
        raise ValueError(
            f"tiles {tuple(tiles)}; give falling sizes, each a divisor of the one before."
        )


def choose_tiles(
    tiles: tuple[int, ...] | None, exit: Exit, images: Any, platform: str | None = None
) -> tuple[int, ...]:
    """The given tiles, or by default those of `default_tiles`.

    Args:
      tiles: or None.
      exit: the first.
      images: `[B, ...]`, or their shape and dtype.
      platform: as for `default_tiles`.
    """
    if tiles is not None:
        return tiles
    features = jax.eval_shape(
        lambda variables, images: exit.stage.apply(variables, images, train=False)[0],
        exit.variables[0],
        images,
    )
    leaves = jax.tree.leaves(features)
    num_bytes = sum(x.size * x.dtype.itemsize for x in leaves)
    channels = max(leaves, key=lambda x: x.size).shape[-1]
    return default_tiles(images.shape[0], num_bytes // images.shape[0], platform, channels)


def default_tiles(
    batch: int, sample_bytes: int, platform: str | None = None, channels: int = 1
) -> tuple[int, ...]:
    """Tiles for a batch, each at most half of the one before, in powers of two.

    On a CPU at most 64, and fewer where features are large, so that a tile stays in the cache; the
    smallest is 4 or more, which leaves little padding. On a TPU at most half of the batch and as
    many as its vector memory holds, and at least 16; or 128, if the channels do not fill the lanes
    and the batch lies along them, because a smaller tile then takes as long. Elsewhere a quarter of
    the batch and a sixteenth. docs/lab/tried.md has the measurements, docs/lab/xla.md the estimates
    of XLA's compiler for TPUs.

    Args:
      batch: B.
      sample_bytes: of one sample's features after the first stage.
      platform: that the program will run on, `"cpu"`, `"cuda"` or `"tpu"`, or for a TPU the
        device's kind; default this process's.
      channels: of the features, their last axis.
    """
    if lanes.on_tpu(platform):
        kind = platform or jax.devices()[0].device_kind
        memory = VECTOR_MEMORY.get(kind, OTHER_VECTOR_MEMORY) << 20
        least = min(lanes.LANES if channels < lanes.LANES else 16, _power(batch))
        largest = _power(max(min(batch // 2, memory // 8 // sample_bytes), least))
        smallest = max(largest // 4, least)
        return (largest, smallest) if smallest < largest else (largest,)
    cpu = (platform or jax.default_backend()) == "cpu"
    largest = _power(min(batch, 64, max(TILE_BYTES // sample_bytes, 16)) if cpu else batch // 4)
    sizes = (largest, largest // 4, largest // 16) if cpu else (largest, largest // 4)
    return tuple(size for i, size in enumerate(sizes) if size >= (4 if i == 2 else 1))


def _power(size: int) -> int:
    """The largest power of two up to `size`, at least 1."""
    return 1 << max(size.bit_length() - 1, 0)
