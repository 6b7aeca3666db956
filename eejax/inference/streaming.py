"""A dataset, or an endless iterator, with full tiles in every stage.

Few samples reach the deep stages, so that one batch's survivors leave most of a tile empty there.
`stream` keeps them waiting for those of the next batch: the buffers of `compaction` stay on the
device from one call to the next, and a stage takes full tiles only. Answers come back in the order
of the images, and what is under way is bounded: where the oldest image would wait for longer than
the window allows, everything is worked off, in smaller tiles.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eejax.inference import packing
from eejax.inference.executors import Prediction
from eejax.inference.packing import Answers, Rows
from eejax.inference.predictors import bound
from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.policies.base import Policy, check_thresholds

Streamer = Callable[[Iterable[float] | Array, Iterable[Any]], Iterator[Prediction]]


class Queue(NamedTuple):
    """What waits for one stage on one device.

    Attributes:
      rows: `Rows`, a buffer, the waiting ones first; None where nothing comes after.
      count: `[1]` int32, how many they are.
    """

    rows: PyTree
    count: Array


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
    program serves all. A chunk is computed while the answers of the one before are collected.

    Args:
      network, policy, variables: as for `inference.full`.
      chunk: images a call of the program; on every device a multiple of the largest tile, or a
        power of two where `tiles` are not given.
      tiles: samples a tile, falling, each a divisor of the one before; default from the chunk and
        the size of the features.
      window: at most so many images are under way, which bounds memory and how long an answer can
        be waited for; default 16 chunks.
      mesh: devices, each of which packs its own share of a chunk; default one device.
      axis: the mesh's axis that chunks are split over.

    Raises:
      ValueError: a chunk that is no multiple of a tile on every device, tiles that do not nest, or
        a window under three chunks.
    """
    devices = 1 if mesh is None else mesh.shape[axis]
    share, rest = divmod(chunk, devices)
    if tiles is not None:
        packing.check_tiles(tiles)
    if rest or share < 1 or (share % tiles[0] if tiles else share & (share - 1)):
        wanted = f"a multiple of {tiles[0] * devices}" if tiles else "a power of two on each"
        raise ValueError(f"chunk is {chunk}, for {devices} device(s); give {wanted}.")
    window = 16 * chunk if window is None else window
    if window < 3 * chunk:
        raise ValueError(f"window is {window}; give at least {3 * chunk}, three chunks.")

    def feed(variables: Variables, queues: Any, images: Any, places: Any, *rest: Any) -> Any:
        return _feed(network, policy, tiles, variables, queues, images, places, *rest)

    def begin(variables: Variables, images: Array, places: Array) -> tuple[Queue, ...]:
        return _no_queues(network, policy, tiles, variables, images, places)

    if mesh is not None:
        split, whole = PartitionSpec(axis), PartitionSpec()
        places_in = NamedSharding(mesh, split)
        feed = jax.shard_map(
            feed,
            mesh=mesh,
            in_specs=(whole, split, split, split, split, whole, whole),
            out_specs=split,
            check_vma=False,  # as in `inference.sharded`
        )
        begin = jax.shard_map(
            begin, mesh=mesh, in_specs=(whole, split, split), out_specs=split, check_vma=False
        )
    else:
        places_in = None
    compiled, start = bound(feed, variables, donate_argnums=(1,)), bound(begin, variables)

    def run(thresholds: Iterable[float] | Array, batches: Iterable[Any]) -> Iterator[Prediction]:
        limits = jnp.asarray(check_thresholds(thresholds, network.num_exits))
        outbox = _Outbox(window)
        queues, pending, flushed, fed = None, None, False, 0
        for images, count, last in _chunks(outbox.noting(batches), chunk):
            if flushed or fed + chunk - outbox.oldest > window:
                yield from outbox.collect(pending)
                pending = None
            # The next chunk must find room, whatever this one leaves waiting.
            flushed = last or fed + 2 * chunk - outbox.oldest > window
            places = np.arange(fed, fed + chunk, dtype=np.int64) % window
            places = places.astype(np.int32)
            if places_in is not None:
                places = jax.device_put(places, places_in)
            counts = np.clip(count - share * np.arange(devices), 0, share).astype(np.int32)
            if queues is None:
                queues = start(images, places)
            queues, answers = compiled(queues, images, places, counts, limits, flushed)
            fed += count
            yield from outbox.collect(pending)
            pending = answers
        yield from outbox.collect(pending)

    return run


def rebatched(predict: Callable[..., Prediction], batch: int = 256) -> Streamer:
    """A stream through a predictor of any kind, in full batches; answers as `stream` gives them.

    Nothing is merged between batches.

    Args:
      predict: `predict(thresholds, images) -> Prediction`.
      batch: images a call.
    """

    def run(thresholds: Iterable[float] | Array, batches: Iterable[Any]) -> Iterator[Prediction]:
        outbox = _Outbox(batch)
        fed = 0
        for images, count, _ in _chunks(outbox.noting(batches), batch):
            if count:
                found = predict(thresholds, images[:count])
                places = np.arange(fed, fed + count) % batch
                outbox.fill(np.asarray(found.logits), np.asarray(found.exits), places)
            fed += count
            yield from outbox.ready()

    return run


def _feed(
    network: EarlyExitNetwork,
    policy: Policy,
    tiles: tuple[int, ...] | None,
    variables: Variables,
    queues: tuple[Queue, ...],
    images: Array,
    places: Array,
    count: Array,
    thresholds: Array,
    flush: Array,
) -> tuple[tuple[Queue, ...], Answers]:
    """One chunk through all stages on one device; `queues[e - 1]` waits for stage e."""
    exits = network.num_exits
    tiles = _tiles(network, variables, images, tiles)
    limits = packing.limits_of(thresholds)
    waiting = Queue(Rows(images, (), policy.init(len(places)), places), count)
    answers, left = None, []
    for e, segment in enumerate(packing.segments(network, variables)):
        run = packing.stage(segment, policy, limits, exits)
        if answers is None:
            logits = jax.eval_shape(functools.partial(run, e), waiting.rows, segment.variables)[1]
            answers = packing.empty_answers(logits, len(places) + exits * tiles[0])
        onward = queues[e] if e < exits - 1 else Queue(None, jnp.zeros(1, jnp.int32))
        # Images are all taken: chunks are multiples of a tile, but for the last, which is flushed.
        done, rows, kept, answers = packing.work_off(
            run,
            e,
            segment.variables,
            waiting.rows,
            waiting.count[0],
            onward.rows,
            onward.count[0],
            answers,
            tiles,
            flush,
        )
        if e:
            left.append(_moved_up(waiting, done, tiles[0]))
        waiting = Queue(rows, kept[None])
    assert answers is not None
    return tuple(left), answers._replace(count=answers.count[None])


def _tiles(
    network: EarlyExitNetwork, variables: Variables, images: Any, tiles: tuple[int, ...] | None
) -> tuple[int, ...]:
    first = packing.segments(network, variables)[0]
    row = packing.row_bytes(first, images)
    return packing.default_tiles(len(images), row) if tiles is None else tiles


def _moved_up(queue: Queue, done: Array, tile: int) -> Queue:
    """A queue without its first `done` rows; fewer than a tile are left, and they move up."""

    def move(x: Array) -> Array:
        rest = lax.dynamic_slice_in_dim(x, done, tile)
        return lax.dynamic_update_slice_in_dim(x, rest, 0, 0)

    return Queue(jax.tree.map(move, queue.rows), queue.count - done)


def _no_queues(
    network: EarlyExitNetwork,
    policy: Policy,
    tiles: tuple[int, ...] | None,
    variables: Variables,
    images: Array,
    places: Array,
) -> tuple[Queue, ...]:
    """Empty queues of one device, for all stages but the first.

    When everything is worked off, stage e can be reached by a chunk and by what waited for the
    stages before it, under a tile for each; and a tile is written whole.
    """
    rows = Rows(images, (), policy.init(len(places)), places)
    tiles = _tiles(network, variables, images, tiles)
    queues = []
    limits = jnp.zeros(network.num_exits)
    for e, segment in enumerate(packing.segments(network, variables)[:-1]):
        run = packing.stage(segment, policy, limits, network.num_exits)
        rows = jax.eval_shape(functools.partial(run, e), rows, segment.variables)[0]
        room = packing.empty(rows, len(places) + (e + 2) * tiles[0])
        queues.append(Queue(room, jnp.zeros(1, jnp.int32)))
    return tuple(queues)


def _chunks(batches: Iterable[Any], chunk: int) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Batches of any sizes as `(images [chunk, ...], how many are real, whether it is the last)`.

    The last one is padded, and may be empty; without any batch nothing comes.
    """
    waiting: list[np.ndarray] = []
    have = 0
    for batch in batches:
        batch = np.asarray(batch)
        if not len(batch) and waiting:
            continue
        waiting.append(batch)
        have += len(batch)
        while have > chunk:  # not when just full: it may be the last
            joined = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield joined[:chunk], chunk, False
            waiting, have = [joined[chunk:]], have - chunk
    if waiting:
        joined = np.concatenate(waiting)
        padding = [(0, chunk - have)] + [(0, 0)] * (joined.ndim - 1)
        yield np.pad(joined, padding), have, True


class _Outbox:
    """Answers in any order in, predictions in the order and the sizes of the batches out."""

    def __init__(self, window: int):
        self.window = window
        self.oldest = 0  # the first image without an answer
        # Of what is under way, by an image's number modulo the window.
        self._answered = np.zeros(window, bool)
        self._logits = np.zeros((window, 0), np.float32)
        self._exits = np.zeros(window, np.int32)
        # Answered, as all before it is: pieces in order, and the sizes of the batches to come.
        self._released: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque()
        self._sizes: collections.deque[int] = collections.deque()

    def noting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, whose sizes are remembered."""
        for batch in batches:
            self._sizes.append(len(batch))
            yield batch

    def collect(self, answers: Answers | None) -> Iterator[Prediction]:
        """Takes the answers of a call, waiting for them, and yields what is complete."""
        if answers is not None:
            logits, exits, places, counts = map(np.asarray, answers)
            # One device's share comes after another's.
            real = np.arange(len(places) // len(counts)) < counts[:, None]
            real = real.reshape(-1)
            self.fill(logits[real], exits[real], places[real])
        yield from self.ready()

    def fill(self, logits: np.ndarray, exits: np.ndarray, places: np.ndarray) -> None:
        """Takes answers; `places` are the images' numbers modulo the window."""
        if not self._logits.shape[1]:
            self._logits = np.zeros((self.window, logits.shape[1]), logits.dtype)
        self._logits[places], self._exits[places] = logits, exits
        self._answered[places] = True
        order = (self.oldest + np.arange(self.window)) % self.window
        answered = self._answered[order]
        count = self.window if answered.all() else int(answered.argmin())
        order = order[:count]
        self._answered[order] = False
        self._released.append((self._logits[order], self._exits[order]))
        self.oldest += count

    def ready(self) -> Iterator[Prediction]:
        """Predictions of the batches whose images are all answered."""
        have = sum(len(exits) for _, exits in self._released)
        while self._sizes and self._sizes[0] <= have:
            size = self._sizes.popleft()
            logits, exits = (
                map(np.concatenate, zip(*self._released, strict=True))
                if self._released
                else (self._logits[:0], self._exits[:0])
            )
            rest = [(logits[size:], exits[size:])] if len(exits) > size else []
            self._released = collections.deque(rest)
            have -= size
            labels = logits[:size].argmax(-1).astype(np.int32) if size else exits[:0]
            yield Prediction(labels, exits[:size], logits[:size])
