"""Images in Parquet files, and an order in which these can be read at random."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.records import Record, stats

WINDOW = 4096  # rows that are shuffled among each other
SLACK = 4  # row groups that are kept beyond a window


class Parquet:
    """Parquet files as the Hugging Face hub has them.

    Columns: `image`, the encoded file as `{bytes, path}` or as binary, or nested lists of uint8
    `[H, W, 3]`; and `label`, an integer.

    A file is read by row groups, so `groups` gives the row group of each row: who reads in random
    order reads few groups at a time. The newest `keep` of them stay in memory.
    """

    def __init__(self, files: Sequence[Path], keep: int = 16) -> None:
        """Reads the files' metadata.

        Raises:
          ValueError: if a column is missing.
        """
        import pyarrow.parquet as pq

        self.keep = keep
        self._files = [str(file) for file in files]
        sizes: list[int] = []
        self._places: list[tuple[int, int]] = []  # of each group: file, and its number there
        for number, file in enumerate(self._files):
            with pq.ParquetFile(file) as opened:
                names, metadata = opened.schema_arrow.names, opened.schema_arrow.metadata
                if not {"image", "label"} <= set(names):
                    raise ValueError(f"{file} has the columns {names}; give image and label")
                for i in range(opened.metadata.num_row_groups):
                    sizes.append(opened.metadata.row_group(i).num_rows)
                    self._places.append((number, i))
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.groups = np.repeat(np.arange(len(sizes)), sizes)
        self.classes = _class_names(metadata) or self._numbered_classes()
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._reading: dict[int, threading.Lock] = collections.defaultdict(threading.Lock)
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        unshared = ("_lock", "_reading", "_kept")
        return {name: value for name, value in vars(self).items() if name not in unshared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: Sequence[int]) -> list[Record]:
        records = []
        for row in rows:
            group = int(self.groups[row])
            images, labels = self._group(group)
            i = int(row) - int(self._starts[group])
            records.append(Record(_image(images[i]), int(labels[i])))
        return records

    def where(self, row: int) -> str:
        file = self._places[self.groups[row]][0]
        first = next(
            int(s) for s, (f, _) in zip(self._starts, self._places, strict=False) if f == file
        )
        return f"row {row - first} of {self._files[file]}"

    def fingerprint(self, rows: Sequence[int]) -> list[Any]:
        return [[*stats(map(Path, self._files))], np.asarray(rows).tolist()]

    def _group(self, group: int) -> tuple[Any, np.ndarray]:
        """Images and labels of a row group, which only one thread reads."""
        import pyarrow.parquet as pq

        with self._lock:
            reading = self._reading[group]
        with reading:
            with self._lock:
                if group in self._kept:
                    self._kept.move_to_end(group)
                    return self._kept[group]
            number, i = self._places[group]
            with pq.ParquetFile(self._files[number], memory_map=True) as opened:
                table = opened.read_row_group(i, ["image", "label"], use_threads=False)
            columns = table["image"].combine_chunks(), table["label"].to_numpy()
            with self._lock:
                self._kept[group] = columns
                while len(self._kept) > self.keep:
                    self._reading.pop(self._kept.popitem(last=False)[0], None)
            return columns

    def _numbered_classes(self) -> tuple[str, ...]:
        import pyarrow.parquet as pq

        labels = (pq.read_table(file, columns=["label"])["label"] for file in self._files)
        highest = max(int(column.to_numpy().max(initial=0)) for column in labels)
        return tuple(map(str, range(highest + 1)))


def _image(value: Any) -> bytes | np.ndarray:
    """The image of a cell, a pyarrow scalar."""
    import pyarrow as pa

    if pa.types.is_struct(value.type):
        value = value["bytes"]
    if not hasattr(value, "values"):
        return value.as_py()
    shape, flat = [], value.values
    while True:
        shape.append(len(flat))
        if not pa.types.is_nested(flat.type):
            break
        flat = flat.flatten()
    sizes = [n // before for before, n in itertools.pairwise([1, *shape])]
    return np.asarray(flat, np.uint8).reshape(sizes)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Names of the classes that Hugging Face's `datasets` writes into a file; () without them."""
    text = (metadata or {}).get(b"huggingface")
    features = json.loads(text)["info"]["features"] if text else {}
    return tuple(features.get("label", {}).get("names", ()))


class WindowOrder:
    """A random order in which only a few groups of records are in use at a time.

    The groups come in random order, and the records of about `window` at a time are shuffled among
    each other. Each epoch draws anew. So a row group of a Parquet file, which can only be read
    whole, is read once an epoch and process.
    """

    def __init__(self, groups: np.ndarray, seed: int, take: int, window: int = WINDOW) -> None:
        """Prepares the orders of epochs.

        Args:
          groups: `[N]`, the group of each record.
          seed: at least 0.
          take: records of an epoch; the last ones of its order are left out.
          window: records that are shuffled among each other, and then up to the end of a group.
        """
        self._groups, self._seed, self._take, self._window = groups, seed, take, window
        self._epoch = functools.lru_cache(2)(self._draw)

    def __call__(self, position: int) -> int:
        """The record at a position, counted over all epochs."""
        epoch, i = divmod(position, self._take)
        return int(self._epoch(epoch)[i])

    def _draw(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self._seed, epoch))
        rank = random.permutation(int(self._groups.max()) + 1)
        order = np.argsort(rank[self._groups], kind="stable")
        ranks = rank[self._groups[order]]
        # A window ends with the group in which it has reached its size.
        ends = np.flatnonzero(np.diff(ranks)) + 1
        start = 0
        while start < len(order):
            stop = next(
                (int(end) for end in ends[np.searchsorted(ends, start + self._window) :]), None
            )
            order[start:stop] = random.permutation(order[start:stop])
            start = len(order) if stop is None else stop
        return order

    def groups_in_use(self) -> int:
        """The most groups that a window has, if the smallest happen to come together."""
        sizes = np.sort(np.bincount(self._groups))
        return int(np.searchsorted(np.cumsum(sizes[sizes > 0]), self._window)) + 1
