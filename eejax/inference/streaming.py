"""A dataset, or an endless iterator, with full tiles in every stage.

Few samples reach the deep stages, so one batch's survivors leave most of a tile empty there.
`stream` keeps them until survivors of the next batch arrive: the buffers of `compaction` stay on
the device from one call to the next, and a stage takes full tiles only. Predictions are yielded in
the order of the images, and the number of images under way is bounded: when the oldest image would
wait for longer than the window allows, everything is flushed, in smaller tiles.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from eejax.compiling import bound
from eejax.inference import compaction
from eejax.inference.compaction import Buffer, Targets
from eejax.inference.step import (
    Exit,
    Prediction,
    Samples,
    bind_exits,
    first_samples,
    output_shapes,
    pad_batch,
)
from eejax.inference.tiles import check_tiles, choose_tiles
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy, check_thresholds

Streamer = Callable[[Iterable[float] | Array, Iterable[Any]], Iterator[Prediction]]


def stream(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    *,
    chunk: int = 256,
    tiles: tuple[int, ...] | None = None,
    window: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Streamer:
    """Compiles a stream: `streamer(thresholds, batches)` yields a `Prediction` for each batch.

    Batches are arrays `[b, ...]` of any sizes; they are cut into chunks of one size, so that one
    program serves all. A chunk is computed while the results of the one before are collected.

    `network`, `policy` and `variables` are those of `Executor`.

    Args:
      chunk: images a call of the program; on every device a multiple of the largest tile, or a
        power of two where `tiles` are not given.
      tiles: samples a tile, decreasing, each a divisor of the one before; default from the chunk
        and the size of the features.
      window: the largest number of images under way, which bounds memory and waiting; default 16
        chunks.
      mesh: devices, each of which packs its own share of a chunk; default one device.
      axis: the mesh's axis that chunks are split over.

    Raises:
      ValueError: if a chunk is not a multiple of a tile on every device, if `tiles` does not nest,
        or if the window is smaller than three chunks.
    """
    devices = 1 if mesh is None else mesh.shape[axis]
    share, rest = divmod(chunk, devices)
    check_tiles(tiles)
    if rest or share < 1 or (share % tiles[0] if tiles else share & (share - 1)):
        sizes = f"a multiple of {tiles[0] * devices}" if tiles else "a power of two on each"
        raise ValueError(f"chunk is {chunk}, for {devices} device(s); give {sizes}.")
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = device.device_kind if device.platform == "tpu" else device.platform
    window = 16 * chunk if window is None else window
    if window < 3 * chunk:
        raise ValueError(f"window is {window}; give at least {3 * chunk}, three chunks.")

    def begin(variables: Variables, images: Array, indices: Array) -> list[Buffer]:
        exits = bind_exits(network, policy, variables, jnp.zeros(network.num_exits - 1))
        return _empty_queues(exits, tiles, first_samples(policy, images, indices), platform)

    def feed(
        variables: Variables,
        queues: Sequence[Buffer],
        images: Array,
        indices: Array,
        counts: Array,
        thresholds: Array,
        flush: Array,
    ) -> tuple[list[Buffer], Buffer]:
        exits = bind_exits(network, policy, variables, thresholds)
        active = Buffer(first_samples(policy, images, indices), counts)
        return _feed(exits, tiles, queues, active, flush, platform)

    if mesh is not None:
        split, whole = PartitionSpec(axis), PartitionSpec()
        # Without the check for the same reason as in `sharded`.
        shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=split, check_vma=False)
        feed = shard(feed, in_specs=(whole, split, split, split, split, whole, whole))
        begin = shard(begin, in_specs=(whole, split, split))
    compiled, start = bound(feed, variables, donate_argnums=(1,)), bound(begin, variables)

    def run(thresholds: Iterable[float] | Array, batches: Iterable[Any]) -> Iterator[Prediction]:
        checked = jnp.asarray(check_thresholds(thresholds, network.num_exits))
        results = _Results(window)
        queues, pending, flush, num_fed = None, None, False, 0
        for images, count, is_last in _chunks(results.noting(batches), chunk):
            if flush or num_fed + chunk - results.oldest > window:
                yield from results.collect(pending)
                pending = None
            # The next chunk must find room, however many samples of this one stay in the queues.
            flush = is_last or num_fed + 2 * chunk - results.oldest > window
            indices = (np.arange(num_fed, num_fed + chunk) % window).astype(np.int32)
            counts = np.clip(count - share * np.arange(devices), 0, share).astype(np.int32)
            if queues is None:
                queues = start(images, indices)
            queues, outputs = compiled(queues, images, indices, counts, checked, flush)
            num_fed += count
            yield from results.collect(pending)
            pending = outputs
        yield from results.collect(pending)

    return run


def rebatched(predict: Callable[..., Prediction], batch: int = 256) -> Streamer:
    """A stream through a predictor of any kind, in full batches; yields as `stream` does.

    Nothing is merged between batches.

    Args:
      predict: `predict(thresholds, images) -> Prediction`.
      batch: images a call.
    """

    def run(thresholds: Iterable[float] | Array, batches: Iterable[Any]) -> Iterator[Prediction]:
        results = _Results(batch)
        for images, count, _ in _chunks(results.noting(batches), batch):
            if count:
                prediction = predict(thresholds, images[:count])
                indices = (results.oldest + np.arange(count)) % batch
                logits, exits = np.asarray(prediction.logits), np.asarray(prediction.exits)
                results.add(logits, exits, indices)
            yield from results.ready()

    return run


def _feed(
    exits: Sequence[Exit],
    tiles: tuple[int, ...] | None,
    queues: Sequence[Buffer],
    chunk: Buffer,
    flush: Array,
    platform: str | None = None,
) -> tuple[list[Buffer], Buffer]:
    """Runs one chunk through all stages on one device.

    Args:
      exits: all of the network.
      tiles: or None for the default.
      queues: active samples of all stages but the first, left by earlier chunks. Counts of buffers
        have the shape `[1]` here, so that devices of a mesh can be joined along it.
      chunk: `Samples` for the first stage.
      flush: bool, whether to leave nothing in the queues.
      platform: as for `tiles.default_tiles`.

    Returns:
      The queues for the next chunk, and the outputs.
    """
    tiles = choose_tiles(tiles, exits[0], chunk.rows.features, platform)
    _, logits = output_shapes(exits[0], chunk.rows)
    size = len(chunk.rows.indices) + len(exits) * tiles[0]
    outputs, left = compaction.empty_outputs(logits, size), []
    active, *queues = (Buffer(rows, count[0]) for rows, count in (chunk, *queues))
    for exit, queue in zip(exits, (*queues, Buffer(None, jnp.int32(0))), strict=True):
        # The first stage leaves nothing: chunks are multiples of a tile, but for the last one,
        # which is flushed.
        targets = Targets(queue, outputs)
        num_run, (survivors, outputs) = compaction.run_stage(exit, active, targets, tiles, flush)
        left.append(_without_first(active, num_run, tiles[0]))
        active = survivors
    return left[1:], outputs._replace(count=outputs.count[None])


def _without_first(queue: Buffer, num_run: Array, tile: int) -> Buffer:
    """A queue without its first samples; those that are left, fewer than a tile, move up."""

    def move(x: Array) -> Array:
        rest = lax.dynamic_slice_in_dim(x, num_run, tile)
        return lax.dynamic_update_slice_in_dim(x, rest, 0, 0)

    return Buffer(jax.tree.map(move, queue.rows), (queue.count - num_run)[None])


def _empty_queues(
    exits: Sequence[Exit],
    tiles: tuple[int, ...] | None,
    samples: Samples,
    platform: str | None = None,
) -> list[Buffer]:
    """Empty queues on one device for all stages but the first; `samples` are a chunk.

    At a flush stage e can be reached by a whole chunk and by what was left for the stages before
    it, less than a tile for each; and a tile is written whole.
    """
    chunk, queues = len(samples.indices), []
    tiles = choose_tiles(tiles, exits[0], samples.features, platform)
    for e, exit in enumerate(exits[:-1]):
        samples, _ = output_shapes(exit, samples)
        queue = compaction.empty_buffer(samples, chunk + (e + 2) * tiles[0], platform)
        queues.append(queue._replace(count=queue.count[None]))
    return queues


def _chunks(batches: Iterable[Any], chunk: int) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Batches of any sizes as `(images [chunk, ...], number of valid images, whether it is last)`.

    The last chunk is padded, and may be empty; without any batch there is no chunk.
    """
    waiting: list[np.ndarray] = []
    count = 0
    for batch in batches:
        batch = np.asarray(batch)
        if not len(batch) and waiting:
            continue
        waiting.append(batch)
        count += len(batch)
        while count > chunk:  # not when just full: it may be the last
            joined = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield joined[:chunk], chunk, False
            waiting, count = [joined[chunk:]], count - chunk
    if waiting:
        yield pad_batch(np.concatenate(waiting), chunk), count, True


class _Results:
    """Takes results in any order, and yields predictions in the order and sizes of the batches."""

    def __init__(self, window: int):
        self.window = window
        self.oldest = 0  # the number of the first image without a result
        # Results of images under way, by the image's number modulo the window.
        self._known = np.zeros(window, bool)
        self._logits = np.zeros((window, 0), np.float32)
        self._exits = np.zeros(window, np.int32)
        # In order: results that are complete, and sizes of the batches to yield.
        self._complete: list[tuple[np.ndarray, np.ndarray]] = []
        self._sizes: collections.deque[int] = collections.deque()

    def noting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, whose sizes are noted."""
        for batch in batches:
            self._sizes.append(len(batch))
            yield batch

    def collect(self, outputs: Buffer | None) -> Iterator[Prediction]:
        """Adds the outputs of a call, waiting for them, and yields what is complete."""
        if outputs is not None:
            logits, exits, indices = map(np.asarray, outputs.rows)
            counts = np.asarray(outputs.count)
            # Devices' shares follow each other.
            valid = (np.arange(len(indices) // len(counts)) < counts[:, None]).reshape(-1)
            self.add(logits[valid], exits[valid], indices[valid])
        yield from self.ready()

    def add(self, logits: np.ndarray, exits: np.ndarray, indices: np.ndarray) -> None:
        """Adds results; `indices` are the images' numbers modulo the window."""
        if not self._logits.shape[1]:
            self._logits = np.zeros((self.window, logits.shape[1]), logits.dtype)
        self._logits[indices], self._exits[indices], self._known[indices] = logits, exits, True
        order = (self.oldest + np.arange(self.window)) % self.window
        known = self._known[order]
        order = order[: self.window if known.all() else int(known.argmin())]
        self._known[order] = False
        self._complete.append((self._logits[order], self._exits[order]))
        self.oldest += len(order)

    def ready(self) -> Iterator[Prediction]:
        """Predictions of the batches that are complete."""
        count = sum(len(exits) for _, exits in self._complete)
        while self._sizes and self._sizes[0] <= count:
            size = self._sizes.popleft()
            pieces = self._complete or [(self._logits[:0], self._exits[:0])]
            logits, exits = map(np.concatenate, zip(*pieces, strict=True))
            self._complete = [(logits[size:], exits[size:])] if len(exits) > size else []
            count -= size
            labels = logits[:size].argmax(-1).astype(np.int32) if size else exits[:0]
            yield Prediction(labels, exits[:size], logits[:size])
