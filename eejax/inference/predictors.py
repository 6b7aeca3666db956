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
from eejax.inference.step import Executor, Prediction, check_images, pad_batch
from eejax.network import EarlyExitNetwork
from eejax.policies.base import Policy, check_thresholds


def sharded(executor: Executor, mesh: Mesh, axis: str = "data") -> Executor:
    """The same executor over the devices of a mesh, each with its own share of the batch.

    Every device decides and packs for itself and waits for no other, since nothing in an executor
    is collective. (Under a plain sharded `jit` a condition would be that of the whole batch.)

    Args:
      executor: one of `EXECUTORS`.
      mesh: devices.
      axis: the mesh's axis that the batch is split over; variables and thresholds are replicated.

    Raises:
      ValueError: if the mesh has no such axis.
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

        def run_share(variables: Any, thresholds: Array, images: Array, count: Array) -> Prediction:
            count = jnp.clip(count - share * lax.axis_index(axis).astype(jnp.int32), 0, share)
            return executor(network, policy, variables, thresholds, images, count)

        split, whole = PartitionSpec(axis), PartitionSpec()
        run_all = jax.shard_map(
            run_share,
            mesh=mesh,
            in_specs=(whole, whole, split, whole),
            out_specs=split,
            # A loop's carry begins with the same zeros on every device and differs afterwards; the
            # check would want that spelled out for each of them.
            check_vma=False,
        )
        count = jnp.asarray(batch if count is None else count, jnp.int32)
        images = pad_batch(images, share * devices)
        prediction = run_all(variables, jnp.asarray(thresholds), images, count)
        return jax.tree.map(lambda x: x[:batch], prediction)

    return run


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The result of `predictor`: `predict(thresholds, images) -> Prediction`.

    Attributes:
      max_batch: images in the largest program.
      exits: E.
    """

    max_batch: int
    exits: int
    _compiled: Callable[[Array, Any, Any], Prediction]
    # What does not change from call to call is kept on the device: counts, and the thresholds of
    # the last call if they were a JAX array, which cannot be changed in place.
    _counts: dict[int, Array] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    _last: list[Array] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def __call__(self, thresholds: Iterable[float] | Array, images: Any) -> Prediction:
        """Predicts images `[B, ...]`, any B >= 1; returns NumPy arrays.

        Args:
          thresholds: E - 1.
          images: on the host, or on the device in sizes that are powers of two.

        Raises:
          ValueError: if there are no images, if the number of thresholds is wrong, or one is NaN.
        """
        on_device = self._on_device(thresholds)
        check_images(images)
        total = len(images)
        if total <= self.max_batch:
            prediction = Prediction(*map(np.asarray, self._dispatch(on_device, images)))
        else:
            # All pieces are dispatched before the first is waited for.
            pieces = [
                self._dispatch(on_device, images[start : start + self.max_batch])
                for start in range(0, total, self.max_batch)
            ]
            prediction = Prediction(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))
        if len(prediction.labels) == total:
            return prediction
        return Prediction(*(x[:total] for x in prediction))

    def _dispatch(self, thresholds: Array, images: Any) -> Prediction:
        count = len(images)
        if count not in self._counts:
            self._counts[count] = jnp.int32(count)
        images = pad_batch(images, 1 << (count - 1).bit_length())
        return self._compiled(thresholds, images, self._counts[count])

    def warm_up(self, image: Any, batches: Iterable[int]) -> None:
        """Compiles the programs for these batch sizes, and runs each once.

        Args:
          image: one image `[...]`, for its shape and dtype.
          batches: sizes of later calls.
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
    """Compiles an executor for batches of any size, `predict(thresholds, images)`.

    A batch is padded to the next power of two, and one above `max_batch` is served in pieces of
    that size, so that at most `log2(max_batch) + 1` programs are ever compiled. The padding costs
    no stage in `compact` and decides nothing in `cond`.

    Variables become constants of the programs, up to 64 MiB of them: dispatching a few hundred
    arrays takes longer than the smallest network's first stage. Larger ones stay arguments, kept on
    the device.

    Results are waited for and returned as NumPy arrays: cutting the padding off on the device would
    compile a program for each new size, which takes longer than most batches. Images that are on
    the device are padded there, at that price. To keep results on the device, jit an executor
    directly.

    `network` and `policy` are those of `Executor`.

    Args:
      variables: as the executor takes them.
      executor: one of `EXECUTORS`, or one of them `sharded`.
      max_batch: size of the largest program, a power of two.

    Raises:
      ValueError: if `max_batch` is not a power of two.
    """
    if max_batch < 1 or max_batch & (max_batch - 1):
        raise ValueError(f"max_batch is {max_batch}; give a power of two.")

    def run(variables: Any, thresholds: Array, images: Array, count: Any) -> Prediction:
        return executor(network, policy, variables, thresholds, images, count)

    return Predictor(max_batch, network.num_exits, bound(run, variables))
