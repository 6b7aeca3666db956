"""Images in files, read by their number: image folders and ArrayRecord (Parquet: `parquet.py`).

A source is a sequence of records, as Grain takes them. It can be pickled, and opens its files when
it is first read, so that each process that reads has its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.data.formats import quiet_absl

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"))


class RecordError(ValueError):
    """A record cannot be decoded; the message says which one."""


class Record(NamedTuple):
    """An image, encoded or as an array, and its class."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """N records.

    Attributes:
      classes: their names.
      groups: `[N]` int, for files whose records are read in groups the group of each; else None.
    """

    classes: tuple[str, ...]

    @property
    def groups(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[Record]:
        """The records of these numbers, in their order."""
        ...

    def where(self, row: int) -> str:
        """Where a record is, in words."""
        ...

    def fingerprint(self, rows: Sequence[int]) -> list[Any]:
        """Plain data that changes when these records do: names, sizes and times of files."""
        ...


class Arrays:
    """Images that are in memory."""

    groups = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Sequence[int]) -> list[Record]:
        return [Record(self.images[i], int(self.labels[i])) for i in rows]

    def where(self, row: int) -> str:
        return f"image {row}"

    def fingerprint(self, rows: Sequence[int]) -> list[Any]:
        raise NotImplementedError("arrays are never kept on disk")


class Folder:
    """`CLASS/NAME.jpg` in a folder, at any depth below the class; labels follow their order."""

    groups = None

    def __init__(self, root: Path) -> None:
        """Lists the folder.

        Raises:
          ValueError: if a class has no image.
        """
        self._root = str(root)
        classes = sorted(f.name for f in os.scandir(root) if f.is_dir() and f.name[0] != ".")
        self.classes = tuple(classes)
        self._files: list[str] = []
        counts = []
        for name in classes:
            files = sorted(_images_below(os.path.join(self._root, name)))
            self._files += [os.path.relpath(file, self._root) for file in files]
            counts.append(len(files))
        if not all(counts):
            empty = classes[counts.index(0)]
            raise ValueError(f"the class {root / empty} has no image; put some there or remove it")
        self._labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: Sequence[int]) -> list[Record]:
        records = []
        for row in rows:
            with open(os.path.join(self._root, self._files[row]), "rb") as file:
                records.append(Record(file.read(), int(self._labels[row])))
        return records

    def where(self, row: int) -> str:
        return os.path.join(self._root, self._files[row])

    def fingerprint(self, rows: Sequence[int]) -> list[Any]:
        stats = ((self._files[i], os.stat(os.path.join(self._root, self._files[i]))) for i in rows)
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _images_below(folder: str) -> list[str]:
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):  # companion files that macOS writes
            continue
        if entry.is_dir():
            found += _images_below(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            found.append(entry.path)
    return found


class Prepared:
    """A split of a data set that tensorflow-datasets prepared as array_record files."""

    groups = None

    def __init__(self, folder: Path, split: str) -> None:
        """Opens the split.

        Raises:
          ValueError: if the features are not `image` and `label`.
        """
        with quiet_absl():
            import tensorflow_datasets as tfds

            builder: Any = tfds.builder_from_directory(folder)
            features = dict(builder.info.features.items())
            label = features.get("label")
            if "image" not in features or not isinstance(label, tfds.features.ClassLabel):
                raise ValueError(
                    f"{folder} has the features {list(features)}; give image and label"
                )
            self.classes = tuple(label.names)
            self._source = builder.as_data_source(
                split=split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        self._folder, self._split = folder, split

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: Sequence[int]) -> list[Record]:
        examples = self._source.__getitems__([int(row) for row in rows])
        return [Record(example["image"], int(example["label"])) for example in examples]

    def where(self, row: int) -> str:
        return f"record {row} of {self._split} in {self._folder}"

    def fingerprint(self, rows: Sequence[int]) -> list[Any]:
        files = sorted(self._folder.glob(f"*-{self._split}.*"))
        return [[*stats(files)], np.asarray(rows).tolist()]


def stats(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of change (ns) of each file."""
    found = [(file.name, file.stat()) for file in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]
