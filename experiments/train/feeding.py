"""What feeds the training steps: the images of a few steps, on the devices of a mesh.

The samples of step s depend on the run's key and on s alone, whatever the number of devices and
processes, so that a resumed run trains on the same samples.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
from jax import Array
from jax.sharding import Mesh

from eejax.training.placement import replicate
from experiments.data.splits import Split
from experiments.train.augment import epoch_order, mirrored

_order = jax.jit(epoch_order, static_argnums=(1, 2))


class Fed(NamedTuple):
    """The samples of some steps, as `train_steps` takes them: global arrays of the run's mesh.

    Attributes:
      images: uint8 `[N, ...]`, replicated; or `[S, B, ...]`, the batches of S steps, divided along
        B over the devices (`placement.batch_sharding(mesh, 1)`).
      labels: int32 `[N]` or `[S, B]`, likewise.
      order: int32 `[S, B]`, the samples of each step, replicated; None where the images come in
        batches.
      start: the row, of `order` or of the batches, of the first step. Rows after the last step are
        not read: S may be larger than what is left of an epoch, and should always be the same,
        because each shape of the arguments compiles a program.
    """

    images: Array
    labels: Array
    order: Array | None
    start: int


class Feed(Protocol):
    """Feeds a training, dispatch by dispatch."""

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        ...

    def __call__(self, step: int, count: int) -> Fed:
        """The samples of steps `step` to `step + count - 1`, which lie in one epoch.

        It is called with steps in order, without gaps, beginning at any step after a resume. Each
        process calls it alike and gives its own devices' share of the rows.
        """
        ...

    def close(self) -> None:
        """Ends what the feed started: processes, threads, files."""
        ...


class Resident:
    """A whole split on each device, in a new order each epoch.

    Attributes:
      per_epoch: steps; the images that make no whole batch are left out.
    """

    def __init__(self, split: Split, key: Array, batch: int, *, flip: bool, mesh: Mesh) -> None:
        """Copies the split to the devices.

        Args:
          split: images and labels.
          key: of the run, on the mesh: `placement.replicate(mesh, key)`.
          batch: samples a step.
          flip: whether images are mirrored in every other epoch. Not for digits or letters.
          mesh: of the run.
        """
        self.per_epoch = len(split.images) // batch
        self._key, self._batch, self._flip = key, batch, flip
        self._upright, self._labels = replicate(mesh, (split.images, split.labels))
        self._epoch, self._images, self._order = -1, self._upright, None

    def __call__(self, step: int, count: int) -> Fed:
        """As `Feed`."""
        del count
        epoch, start = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            epoch_key = jax.random.fold_in(jax.random.fold_in(self._key, 1), epoch)
            self._order = _order(epoch_key, len(self._labels), self._batch)
            if self._flip:
                key = jax.random.fold_in(self._key, 3)
                self._images = mirrored(key, self._upright, epoch)
            self._epoch = epoch
        return Fed(self._images, self._labels, self._order, start)

    def close(self) -> None:
        """Frees the images."""
        del self._images, self._upright, self._labels
