"""A network over the parts of a data set.

A part is a range of images whose answers are kept together. Each goes through the runtime's stream
by itself, in which survivors of all its images share tiles. So its answers depend on the artifact
and on its images alone, and not on where a job was interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from eejax.offline.decoding import Chunk, Reader, Task, ahead
from eejax.offline.inputs import Inputs
from eejax.runtime import Runtime
from eejax.runtime.engine import TILE

# Decoders beside the threads of ONNX Runtime.
_DECODERS = 8
# Images of a batch of the stream, which books answers for each.
_BATCH = 256


class Part(NamedTuple):
    """The images `[first, first + count)` of a data set."""

    number: int
    first: int
    count: int


class Answers(NamedTuple):
    """Answers to n images.

    Attributes:
      labels: `[n]` int32.
      exits: `[n]` int32, 0-based.
      confidences: `[n]` float32, the label's probability.
      readable: `[n]` bool; what the others have above means nothing.
      errors: why, by the position of the others.
    """

    labels: np.ndarray
    exits: np.ndarray
    confidences: np.ndarray
    readable: np.ndarray
    errors: dict[int, str]


def parts(inputs: Inputs, size: int, shard: tuple[int, int] = (0, 1)) -> list[Part]:
    """The parts of a shard: all of a data set by default.

    Args:
      inputs: the data set.
      size: images in a part; the last may have fewer.
      shard: `(k, n)`: parts k, k + n, k + 2n and so on.

    Raises:
      ValueError: if the size is not positive, or not 0 <= k < n.
    """
    k, n = shard
    if size < 1:
        raise ValueError(f"parts of {size} images; give at least 1.")
    if not 0 <= k < n:
        raise ValueError(f"shard {k}/{n}; give k/n with k from 0 to n - 1.")
    firsts = list(enumerate(range(0, inputs.total, size)))
    return [Part(i, first, min(size, inputs.total - first)) for i, first in firsts[k::n]]


def answer(
    runtime: Runtime,
    inputs: Inputs,
    parts: Iterable[Part],
    thresholds: ArrayLike | None = None,
    progress: Callable[[int], Any] = lambda images: None,
) -> Iterator[tuple[Part, Answers]]:
    """Yields the answers to each part, in order.

    A part's logits are held in memory, and a few hundred images; never all.

    Args:
      runtime: the artifact.
      inputs: the data set.
      parts: in ascending order. The next is asked for while one is computed.
      thresholds: E - 1; those of the artifact by default.
      progress: told how many images have been read since it was last called.

    Raises:
      ValueError: if thresholds do not fit, or a file has changed since `inputs` was made.
      OSError: if a file cannot be read for a reason that is not its own.
    """
    reader = Reader(inputs)

    def tasks() -> Iterator[tuple[Part, Task]]:
        for part in parts:
            for task in reader.tasks(part.first, part.count):
                yield part, task

    threads = min(_DECODERS, os.cpu_count() or 1)
    with contextlib.closing(ahead(tasks(), threads)) as chunks:
        for part, group in itertools.groupby(chunks, key=lambda pair: pair[0]):
            told = (chunk for _, chunk in group)
            yield part, _part_answers(runtime, part, told, thresholds, progress)


def _part_answers(
    runtime: Runtime,
    part: Part,
    chunks: Iterator[Chunk],
    thresholds: ArrayLike | None,
    progress: Callable[[int], Any],
) -> Answers:
    readable: list[np.ndarray] = []
    errors: dict[int, str] = {}
    position = 0

    def batches() -> Iterator[np.ndarray]:
        nonlocal position
        images: list[np.ndarray] = []
        for chunk in chunks:
            errors.update({position + i: error for i, error in chunk.errors.items()})
            readable.append(chunk.readable)
            position += len(chunk.readable)
            images.append(chunk.images)
            if sum(map(len, images)) >= _BATCH:
                yield np.concatenate(images)
                images = []
            progress(len(chunk.readable))
        if sum(map(len, images)):
            yield np.concatenate(images)

    labels, exits = np.zeros((2, part.count), np.int32)
    confidences = np.zeros(part.count, np.float32)
    window = max(part.count, TILE)
    told = [
        (prediction.labels, prediction.exits, confidence(prediction.logits))
        for prediction in runtime.stream(batches(), thresholds, window=window)
    ]
    where = np.concatenate(readable)
    if told:
        labels[where], exits[where], confidences[where] = map(
            np.concatenate, zip(*told, strict=True)
        )
    return Answers(labels, exits, confidences, where, errors)


def confidence(logits: np.ndarray) -> np.ndarray:
    """The largest softmax probability `[n]` of logits `[n, C]`."""
    return 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
