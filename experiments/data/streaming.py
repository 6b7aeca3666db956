"""Training images read and decoded while the network trains, through Grain.

What step s reads and draws depends on the seed and on s alone. The work is divided into chunks of a
few images, each of one step; a chunk is a pure function of its number, so any number of threads,
processes and hosts makes the same batches, and a run begins at any step without reading what came
before. (With Parquet files it reads one window of row groups, see `WindowOrder`.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data.config import cores
from experiments.data.decoding import Decoder
from experiments.data.parquet import SLACK, Parquet, WindowOrder
from experiments.data.records import RecordError, Source

if TYPE_CHECKING:  # which imports JAX
    import grain

CHUNK = 16  # images, at most


class Streamed:
    """Images `[N, H, W, C]` uint8 that are decoded when they are indexed, and never all at once.

    Attributes:
      source: records in files.
      rows: `[N]` int, the records, in random order.
      decoder: makes an image of a record; None where images are arrays of one shape.
      shape: as of an array.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, source: Source, rows: np.ndarray, decoder: Decoder | None) -> None:
        self.source, self.rows, self.decoder = source, rows, decoder
        if decoder is None:
            _, height, width, channels = self.read(rows[:1].tolist())[0].shape
        else:
            height = width = decoder.size
            channels = 3
        self.shape = (len(rows), height, width, channels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        rows = self.rows[index]
        if np.ndim(rows) == 0:
            return self.read([int(rows)])[0][0]
        return next(_pieces(self, rows, max(len(rows), 1)))[0]

    def read(
        self, rows: Sequence[int], randoms: Sequence[np.random.Generator] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decoded records.

        Args:
          rows: n numbers of records.
          randoms: a generator for each, for random crops; without them, central crops.

        Returns:
          Images `[n, H, W, C]` and labels `[n]` int32.

        Raises:
          RecordError: if a record cannot be decoded.
        """
        images = []
        records = self.source.read(rows)
        for i, record in enumerate(records):
            image = record.image
            if self.decoder is not None:
                try:
                    image = self.decoder(image, None if randoms is None else randoms[i])
                except ValueError as error:
                    raise RecordError(f"{self.source.where(rows[i])}: {error}") from error
            images.append(image)
        return np.stack(images), np.asarray([record.label for record in records], np.int32)


def decode_all(images: Streamed, out: np.ndarray, piece: int = 256) -> np.ndarray:
    """Decodes all images into `out` `[N, H, W, C]`, without random crops.

    Returns:
      Labels `[N]` int32.
    """
    labels = np.empty(len(images), np.int32)
    start = 0
    for decoded, numbers in _pieces(images, images.rows, piece):
        out[start : start + len(decoded)], labels[start : start + len(decoded)] = decoded, numbers
        start += len(decoded)
    return labels


def _pieces(
    images: Streamed, rows: np.ndarray, piece: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of `rows`, up to `piece` at a time, decoded by threads."""
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(rows), piece):
            part = rows[start : start + piece].tolist()
            chunks = [part[i : i + CHUNK] for i in range(0, len(part), CHUNK)]
            found, labels = zip(*pool.map(images.read, chunks), strict=True)
            yield np.concatenate(found), np.concatenate(labels)


@dataclass(frozen=True)
class Chunks:
    """The chunks of this host.

    Attributes:
      images: N training images.
      batch: B, of all hosts together.
      mine: rows of a batch that this host reads.
      size: images of a chunk; divides the number of `mine`.
      seed: of the order and of the crops.
    """

    images: Streamed
    batch: int
    mine: tuple[int, ...]
    size: int
    seed: int

    @property
    def per_step(self) -> int:
        """Chunks of a step."""
        return len(self.mine) // self.size

    @functools.cached_property
    def order(self) -> Callable[[int], Any]:
        """Position among all samples of a training to the number of an image."""
        take = len(self.images) // self.batch * self.batch
        groups = self.images.source.groups
        if groups is not None:
            return WindowOrder(groups[self.images.rows], self.seed, take)
        import grain

        shuffled = grain.MapDataset.range(len(self.images)).shuffle(seed=self.seed)
        return shuffled.slice(slice(take)).repeat().__getitem__

    def __call__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Images `[size, H, W, C]` and labels `[size]` of a chunk."""
        step, part = divmod(number, self.per_step)
        rows = self.mine[part * self.size : (part + 1) * self.size]
        positions = [step * self.batch + row for row in rows]
        records = [int(self.images.rows[self.order(position)]) for position in positions]
        return self.images.read(records, [_generator(self.seed, p) for p in positions])

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "order"}


def _generator(seed: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0]))


def stream(
    chunks: Chunks, start: int, stop: int, *, threads: int, workers: int, ahead: int
) -> grain.DatasetIterator[tuple[np.ndarray, np.ndarray]]:
    """Iterates over the chunks of steps `start` to `stop - 1`, prepared ahead of time.

    Args:
      chunks: of this host.
      start: first step, counted over all epochs.
      stop: the step after the last.
      threads: in each process that decodes.
      workers: processes that decode; 0 for threads of this process. They never use an
        accelerator.
      ahead: steps that are prepared ahead.
    """
    import grain
    from absl import flags

    images = chunks.images
    if isinstance(images.source, Parquet) and isinstance(chunks.order, WindowOrder):
        images.source.keep = chunks.order.groups_in_use() + SLACK
    wanted = max(ahead * chunks.per_step, threads)
    numbers = grain.MapDataset.range(start * chunks.per_step, stop * chunks.per_step)
    dataset = numbers.map(chunks).to_iter_dataset(
        grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(wanted // (workers or 1), threads)
        )
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of absl, whose commands parse them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(
            workers, per_worker_buffer_size=max(wanted // workers, 1)
        )
        dataset = dataset.mp_prefetch(options, worker_init_fn=_without_accelerator)
    return iter(dataset)


def _without_accelerator(index: int, count: int) -> None:
    """Keeps JAX in a worker, which Grain imports, from ever starting an accelerator's backend."""
    del index, count
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def chunk_size(rows: int) -> int:
    """The most images of a chunk, if `rows` rows of a batch are divided into equal chunks."""
    return max(size for size in range(1, CHUNK + 1) if rows % size == 0)


def fill(
    iterator: Iterator[tuple[np.ndarray, np.ndarray]],
    chunks: Chunks,
    images: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Writes this host's rows of the next step.

    Args:
      iterator: of `stream`.
      chunks: what it iterates over.
      images: `[b, H, W, C]` uint8, b the number of `chunks.mine`.
      labels: `[b]` int32.
    """
    for part in range(chunks.per_step):
        rows = slice(part * chunks.size, (part + 1) * chunks.size)
        images[rows], labels[rows] = next(iterator)
