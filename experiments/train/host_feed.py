"""Feeds a training with images that are read and decoded while it trains."""

from __future__ import annotations

import collections
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from eejax.training.placement import batch_sharding
from experiments.data.config import DataConfig
from experiments.data.streaming import Chunks, Streamed, chunk_size, fill, stream
from experiments.train.feeding import Fed


class HostFeed:
    """Batches that are prepared ahead: read, decoded and copied to the devices beside the steps.

    Each process reads the rows of a batch that its own devices get.

    Attributes:
      per_epoch: steps; the images that make no whole batch are left out.
    """

    def __init__(
        self,
        images: Streamed,
        key: Array,
        config: DataConfig,
        mesh: Mesh,
        *,
        batch: int,
        epochs: int,
        steps_per_dispatch: int,
    ) -> None:
        """Prepares nothing yet: the first call tells where to begin.

        Args:
          images: of the training split.
          key: of the run, on the mesh.
          config: how many threads and processes, how far ahead, and whether images are mirrored.
          mesh: of the run.
          batch: B, samples a step.
          epochs: of the run.
          steps_per_dispatch: S, the most steps that one call asks for.
        """
        self.per_epoch = len(images) // batch
        self._total = self.per_epoch * epochs
        self._steps, self._batch, self._config = steps_per_dispatch, batch, config
        self._sharding = batch_sharding(mesh, 1)
        self._shape = (steps_per_dispatch, batch, *images.shape[1:])
        places = self._sharding.addressable_devices_indices_map(self._shape[:2]).values()
        mine = sorted({row for place in places if place for row in range(batch)[place[1]]})
        seed = int(np.asarray(jax.device_get(jax.random.key_data(jax.random.fold_in(key, 1))))[-1])
        self._chunks = Chunks(images, batch, tuple(mine), chunk_size(len(mine)), seed)
        self._mirror_key = jax.random.fold_in(key, 3)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="host-feed")
        self._prepared: collections.deque[tuple[int, int, Future[tuple[Array, Array]]]]
        self._prepared = collections.deque()
        self._iterator: Any = None
        self._next = -1

    def __call__(self, step: int, count: int) -> Fed:
        """As `Feed`."""
        if not self._prepared or self._prepared[0][:2] != (step, count):
            self._begin(step)
        *_, batches = self._prepared.popleft()
        images, labels = batches.result()
        self._ahead()
        if self._config.flip:
            images = mirrored_steps(self._mirror_key, images, np.int32(step))
        return Fed(images, labels, None, 0)

    def close(self) -> None:
        """Ends threads and processes."""
        self._stop()
        self._pool.shutdown()

    def _begin(self, step: int) -> None:
        """Prepares from `step` on, whatever was prepared before."""
        self._stop()
        config = self._config
        self._iterator = stream(
            self._chunks,
            step,
            self._total,
            threads=config.decode_threads,
            workers=config.workers,
            ahead=self._steps,
        )
        self._next = step
        self._ahead()

    def _ahead(self) -> None:
        while len(self._prepared) < self._config.ahead and self._next < self._total:
            step = self._next
            count = min(self._steps, self.per_epoch - step % self.per_epoch)
            self._prepared.append((step, count, self._pool.submit(self._prepare, count)))
            self._next += count

    def _prepare(self, count: int) -> tuple[Array, Array]:
        """The next `count` batches, as global arrays of S batches; the rest of them is zeros."""
        local = (self._steps, len(self._chunks.mine))
        images, labels = np.zeros((*local, *self._shape[2:]), np.uint8), np.zeros(local, np.int32)
        for step in range(count):
            fill(self._iterator, self._chunks, images[step], labels[step])
        place = functools.partial(jax.make_array_from_process_local_data, self._sharding)
        return place(images, self._shape), place(labels, self._shape[:2])

    def _stop(self) -> None:
        for *_, batches in self._prepared:
            batches.cancel()
        if self._iterator is not None:
            # The batches that are being prepared still read from it.
            self._pool.submit(self._iterator.close).result()
        self._prepared.clear()
        self._iterator = None


@jax.jit
def mirrored_steps(key: Array, images: Array, first: Array | np.int32) -> Array:
    """Mirrors half of the images left-right, drawn for each step by its number.

    Args:
      key: JAX key.
      images: uint8 `[S, B, H, W, C]`.
      first: int32, the number of the first step.

    Returns:
      uint8 `[S, B, H, W, C]`.
    """
    steps = first + jnp.arange(images.shape[0], dtype=jnp.int32)
    draw = functools.partial(jax.random.bernoulli, shape=images.shape[1:2])
    chosen = jax.vmap(lambda step: draw(jax.random.fold_in(key, step)))(steps)
    return jnp.where(chosen[..., None, None, None], images[..., ::-1, :], images)
