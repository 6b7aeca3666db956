"""Images of a part, read and decoded ahead in a few threads.

What is wrong with an image becomes its error. What is wrong with the machine, such as a disk that
does not answer, ends the job, so that it can be run again.
"""

from __future__ import annotations

import collections
import functools
import io
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from eejax.offline.inputs import (
    Inputs,
    image_column,
    kind,
    opened_array_record,
    opened_npy,
    opened_parquet,
    tfds_features,
)

# Images a task: large enough for the overhead, small enough for the memory of large images.
CHUNK = 64


class Unreadable(NamedTuple):
    """Why an image cannot be read."""

    reason: str


# Encoded, decoded `[height, width]` or `[height, width, channels]`, or neither.
Item = bytes | np.ndarray | Unreadable


class Chunk(NamedTuple):
    """Some n images in a row.

    Attributes:
      images: those k of them that could be read, uint8 `[k, height, width, channels]`.
      readable: `[n]` bool.
      errors: of the others, by their position.
    """

    images: np.ndarray
    readable: np.ndarray
    errors: dict[int, str]


Task = Callable[[], Chunk]


def ahead(
    tasks: Iterable[tuple[Any, Task]], threads: int
) -> Generator[tuple[Any, Chunk], None, None]:
    """The results of tasks in their order, with a few of the next under way."""
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting: collections.deque[tuple[Any, Future[Chunk]]] = collections.deque()
        try:
            for key, task in tasks:
                waiting.append((key, pool.submit(task)))
                if len(waiting) > 2 * threads:
                    key, done = waiting.popleft()
                    yield key, done.result()
            while waiting:
                key, done = waiting.popleft()
                yield key, done.result()
        finally:
            for _, left in waiting:
                left.cancel()


class Reader:
    """Tasks that read ranges of a data set, asked for in ascending order.

    Files of images, .npy and ArrayRecord are read by the tasks. Rows of Parquet can only be reached
    one after the other, so the reader itself fetches their bytes and keeps its place.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._parquet: _ParquetRows | None = None

    def tasks(self, first: int, count: int) -> Iterator[Task]:
        """Tasks for the images `[first, first + count)`, of `CHUNK` or fewer each."""
        inputs, files = self._inputs, []
        for file, start, stop in inputs.ranges(first, count):
            path, how = inputs.path(file), kind(inputs.names[file])
            if how == "image":
                files.append(file)
                if len(files) < CHUNK:
                    continue
            if files:
                yield functools.partial(_image_files, inputs, files)
                files = []
            if how == "image":
                continue
            inputs.check(file, os.stat(path))
            # Here, because Python 3.11 parses headers, as any code, in one thread at a time alone.
            npy = _Npy.of(path, opened_npy(path, inputs.image)) if how == "npy" else None
            for at in range(start, stop, CHUNK):
                end = min(at + CHUNK, stop)
                if npy:
                    yield functools.partial(npy.read, at, end)
                elif how == "array_record":
                    yield functools.partial(_array_record, path, at, end, inputs.image)
                else:
                    items = self._rows_of(path).read(at, end - at)
                    yield functools.partial(decoded, items, inputs.image)
        if files:
            yield functools.partial(_image_files, inputs, files)

    def _rows_of(self, path: Path) -> _ParquetRows:
        if self._parquet is None or self._parquet.path != path:
            self._parquet = _ParquetRows(path, self._inputs.column)
        return self._parquet


class _ParquetRows:
    """The rows of a Parquet file, read forward."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path, self._file = path, opened_parquet(path)
        self._column = image_column(path, self._file.schema_arrow, column)
        metadata = self._file.metadata
        groups = range(metadata.num_row_groups)
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in groups])
        # Items from row `_at` on; more of the row group that ends at `_end` are in `_batches`.
        self._items: list[Item] = []
        self._at = self._end = 0
        self._batches: Iterator[Any] = iter(())

    def read(self, start: int, count: int) -> list[Item]:
        """Rows `[start, start + count)`."""
        if start < self._at or start >= self._end:
            self._open(start)
        while self._at + len(self._items) < start + count:
            self._drop(start)
            self._more()
        self._drop(start)
        items = self._items[:count]
        self._drop(start + count)
        return items

    def _drop(self, row: int) -> None:
        """Forgets what is before a row."""
        count = min(row - self._at, len(self._items))
        del self._items[:count]
        self._at += count

    def _open(self, row: int) -> None:
        """Goes to the beginning of the row group of a row."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        self._end = int(self._ends[group])
        self._at = self._end - self._file.metadata.row_group(group).num_rows
        self._items = []
        self._batches = self._file.iter_batches(
            CHUNK, row_groups=[group], columns=[self._column], use_threads=False
        )

    def _more(self) -> None:
        """Reads a batch; if that cannot be done, the rest of the row group is unreadable."""
        next_row = self._at + len(self._items)
        if next_row == self._end:
            items = self._items
            self._open(next_row)
            self._items, self._at = items, next_row - len(items)
        try:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError("its row group has fewer rows than it says")
            self._items += _encoded(batch.column(0))
        except (OSError, ValueError) as error:  # Arrow's errors are one or the other
            if getattr(error, "errno", None) is not None:
                raise
            self._items += [Unreadable(_line(error))] * (self._end - next_row)


def _encoded(column: Any) -> list[Item]:
    if hasattr(column.type, "get_field_index"):
        # Unlike `field`, this makes what is missing in a struct that is missing, too.
        column = column.flatten()[column.type.get_field_index("bytes")]
    missing = Unreadable("the row holds no bytes")
    return [missing if value is None else value for value in column.to_pylist()]


def _image_files(inputs: Inputs, files: Sequence[int]) -> Chunk:
    return decoded([_contents(inputs, file) for file in files], inputs.image)


def _contents(inputs: Inputs, number: int) -> Item:
    try:
        with open(inputs.path(number), "rb") as file:
            inputs.check(number, os.fstat(file.fileno()))
            return file.read()
    except PermissionError as error:
        return Unreadable(_line(error))


class _Npy(NamedTuple):
    """Where the images of an .npy lie."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    @classmethod
    def of(cls, path: Path, images: np.memmap) -> _Npy:
        return cls(path, images.offset, images.shape, "C" if images.flags.c_contiguous else "F")

    def read(self, start: int, stop: int) -> Chunk:
        # Mapped for the moment, so that its pages do not count as this process's memory.
        whole = np.memmap(self.path, np.uint8, "r", self.offset, self.shape, self.order)
        images = np.array(whole[start:stop])
        return Chunk(images, np.ones(len(images), bool), {})


def _array_record(path: Path, start: int, stop: int, image: tuple[int, int, int]) -> Chunk:
    features, name = tfds_features(path.parent)

    def item(source: Any, row: int) -> Item:
        try:
            return features.deserialize_example_np(source[row])[name]
        except Exception as error:  # whatever the reader, the parser and the decoder raise
            return Unreadable(_line(error))

    with opened_array_record(path) as source:
        return decoded([item(source, row) for row in range(start, stop)], image)


def decoded(items: Sequence[Item], image: tuple[int, int, int]) -> Chunk:
    """Decodes images and brings them to the size and number of channels that the network reads.

    Raises:
      ModuleNotFoundError: if Pillow is missing.
      ValueError: if images of so many channels cannot be decoded.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("image files need pillow: pip install pillow") from None
    height, width, channels = image
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise ValueError(f"images of {channels} channels; give them as .npy.")

    def fitted(item: bytes | np.ndarray) -> np.ndarray:
        if isinstance(item, np.ndarray):
            opened = Image.fromarray(item[..., 0] if item.shape[2:] == (1,) else item)
        else:
            opened = Image.open(io.BytesIO(item))
        with opened:
            converted = opened.convert(mode)
            if converted.size != (width, height):
                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(converted, np.uint8).reshape(image)

    images, errors = [], {}
    for i, item in enumerate(items):
        if isinstance(item, Unreadable):
            errors[i] = item.reason
            continue
        try:
            images.append(fitted(item))
        except Exception as error:  # Pillow raises what its decoders do, of many classes
            errors[i] = _line(error)
    readable = np.ones(len(items), bool)
    readable[list(errors)] = False
    return Chunk(np.stack(images) if images else np.empty((0, *image), np.uint8), readable, errors)


def _line(error: Exception) -> str:
    # Without addresses of objects, which are others in each run.
    text = re.sub(r" <[^>]* at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())
