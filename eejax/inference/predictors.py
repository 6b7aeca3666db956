"""Executors compiled for use from Python, with batches of any size, on one device or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from eejax.compiling import bound
from eejax.inference.executors import Executor, Prediction
from eejax.network import EarlyExitNetwork
from eejax.policies.base import Policy, check_thresholds


def sharded(executor: Executor, mesh: Mesh, axis: str = "data") -> Executor:
    """The same executor over the devices of a mesh, each with its own share of the batch.

    Every device decides and packs for itself and waits for no other, since nothing in an executor
    is collective. (Under a plain sharded `jit` a condition would be that of the whole batch.)

    Args:
      executor: `full`, `cond`, `compact` or `loop`.
      mesh: devices.
      axis: the mesh's axis that the batch is split over; variables and thresholds are replicated.

    Raises:
      ValueError: an axis that the mesh does not have.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis {axis!r} of a mesh with {tuple(mesh.shape)}; give one of them.")
    devices = mesh.shape[axis]

    def run(
        network: EarlyExitNetwork,
        policy: Policy,
        variables: Any,
        thresholds: Array,
        images: Array,
        count: Any = None,
    ) -> Prediction:
        batch = images.shape[0]
        share = -(-batch // devices)
        padding = [(0, share * devices - batch)] + [(0, 0)] * (images.ndim - 1)

        def on_one(variables: Any, thresholds: Array, images: Array, count: Array) -> Prediction:
            mine = jnp.clip(count - share * lax.axis_index(axis).astype(jnp.int32), 0, share)
            return executor(network, policy, variables, thresholds, images, mine)

        split, whole = PartitionSpec(axis), PartitionSpec()
        everywhere = jax.shard_map(
            on_one,
            mesh=mesh,
            in_specs=(whole, whole, split, whole),
            out_specs=split,
            # A loop's carry begins with the same zeros everywhere and differs afterwards, which
            # the check would want spelled out at each of them.
            check_vma=False,
        )
        wanted = jnp.asarray(batch if count is None else count, jnp.int32)
        found = everywhere(variables, jnp.asarray(thresholds), jnp.pad(images, padding), wanted)
        return jax.tree.map(lambda x: x[:batch], found)

    return run


@dataclasses.dataclass(frozen=True)
class Predictor:
    """What `predictor` makes: `predict(thresholds, images) -> Prediction`.

    Attributes:
      max_batch: images in the largest program.
      exits: E.
    """

    max_batch: int
    exits: int
    _compiled: Callable[[Array, Any, Any], Prediction]
    # What does not change from call to call is kept on the device: counts, and the thresholds of
    # the last call if they were an array of JAX, which nobody can change in place.
    _counts: dict[int, Array] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    _last: list[Array] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def __call__(self, thresholds: Iterable[float] | Array, images: Any) -> Prediction:
        """Answers images `[B, ...]`, any B >= 1, in NumPy arrays.

        Args:
          thresholds: E - 1.
          images: on the host, or on the device in sizes that are powers of two.

        Raises:
          ValueError: no images, a wrong number of thresholds, or one that is NaN.
        """
        limits = self._on_device(thresholds)
        total = len(images)
        if total == 0:
            raise ValueError("a batch of no images; give at least one.")
        if total <= self.max_batch:
            answered = self._dispatch(limits, images, total)
            answered = Prediction(*map(np.asarray, answered))
            if len(answered.labels) == total:
                return answered
            return Prediction(*(part[:total] for part in answered))
        # All are under way before the first is waited for.
        pieces = []
        for start in range(0, total, self.max_batch):
            piece = images[start : start + self.max_batch]
            pieces.append(self._dispatch(limits, piece, len(piece)))
        done = [Prediction(*map(np.asarray, piece)) for piece in pieces]
        whole = [np.concatenate(parts) for parts in zip(*done, strict=True)]
        return Prediction(*(part[:total] for part in whole))

    def _dispatch(self, limits: Array, images: Any, count: int) -> Prediction:
        if count & (count - 1):
            size = 1 << count.bit_length()
            padding = [(0, size - count)] + [(0, 0)] * (images.ndim - 1)
            images = (jnp if isinstance(images, Array) else np).pad(images, padding)
        if count not in self._counts:
            self._counts[count] = jnp.int32(count)
        return self._compiled(limits, images, self._counts[count])

    def warm_up(self, image: Any, batches: Iterable[int]) -> None:
        """Compiles ahead of time what these batch sizes need, and runs it once.

        Args:
          image: one image; its shape `[...]` and dtype count.
          batches: sizes, as later calls will have them.
        """
        for batch in batches:
            images = np.zeros((batch, *image.shape), image.dtype)
            self(np.full(self.exits - 1, np.inf, np.float32), images)

    def _on_device(self, thresholds: Iterable[float] | Array) -> Array:
        if self._last and self._last[0] is thresholds:
            return self._last[1]
        values = jnp.asarray(check_thresholds(thresholds, self.exits))
        if isinstance(thresholds, Array):
            self._last[:] = thresholds, values
        return values


def predictor(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Any,
    executor: Executor,
    *,
    max_batch: int = 256,
) -> Predictor:
    """A compiled executor for batches of any size, `predict(thresholds, images)`.

    A batch is padded to the next power of two, and one above `max_batch` is served in pieces of
    that size, so that at most `log2(max_batch) + 1` programs are ever compiled, whatever arrives.
    The padding costs no stage in `compact` and decides nothing in `cond`.

    The variables become constants of the programs, up to 64 MiB of them: handing over a few hundred
    arrays takes longer than the smallest network's first stage. Larger ones stay arguments, kept on
    the device.

    It waits for the answers and hands them over as NumPy arrays: cutting the padding off on the
    device would compile a program for each new size, which takes longer than most batches. Images
    that are on the device already are padded there, at that price. Whoever wants to go on on the
    device compiles an executor directly.

    Args:
      network: E exits.
      policy: what scores them.
      variables: as `network.init` gives, or what else the executor takes.
      executor: `full`, `cond`, `compact`, `loop`, or one of them `sharded`.
      max_batch: the largest program, a power of two.

    Raises:
      ValueError: `max_batch` is no power of two.
    """
    if max_batch < 1 or max_batch & (max_batch - 1):
        raise ValueError(f"max_batch is {max_batch}; give a power of two.")

    def run(variables: Any, thresholds: Array, images: Array, count: Any) -> Prediction:
        return executor(network, policy, variables, thresholds, images, count)

    return Predictor(max_batch, network.num_exits, bound(run, variables))
