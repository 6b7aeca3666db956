"""The files of a data set, and how many images each holds.

Images are counted through all files in one order, so that a part of the data set is a range of
numbers, whatever the files are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Range(NamedTuple):
    """The images `[start, stop)` of a file."""

    file: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """F files of images.

    Attributes:
      root: the directory that names are relative to.
      names: `[F]`, in the order of the answers.
      rows: `[F]` int64, the images in each.
      sizes: `[F]` int64, in bytes.
      times: `[F]` int64, of their last modification, in seconds.
      image: `(height, width, channels)` that the network reads.
      column: of Parquet files; None for the only one that can hold images.
    """

    root: Path
    names: tuple[str, ...]
    rows: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    image: tuple[int, int, int]
    column: str | None = None

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.rows)

    @property
    def total(self) -> int:
        """The number of images."""
        return int(self._ends[-1])

    @functools.cached_property
    def sha256(self) -> str:
        """Of the files' names, sizes, times and numbers of images."""
        digest = hashlib.sha256()
        for entry in zip(self.names, self.rows, self.sizes, self.times, strict=True):
            digest.update("\0".join(map(str, entry)).encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()

    def path(self, file: int) -> Path:
        """Of a file."""
        return self.root / self.names[file]

    def ranges(self, first: int, count: int) -> Iterator[Range]:
        """Where the images `[first, first + count)` are."""
        file = int(np.searchsorted(self._ends, first, side="right"))
        end = first + count
        while first < end:
            before = int(self._ends[file] - self.rows[file])
            stop = min(end - before, int(self.rows[file]))
            if stop > first - before:
                yield Range(file, first - before, stop)
            first, file = before + stop, file + 1

    def check(self, file: int, found: os.stat_result) -> None:
        """Raises ValueError if a file is not what it was when it was counted."""
        if (found.st_size, int(found.st_mtime)) != (self.sizes[file], self.times[file]):
            raise ValueError(
                f"{self.path(file)} has changed since the job began; answers would be of other "
                "images."
            )


def find(place: str | Path, image: tuple[int, int, int], column: str | None = None) -> Inputs:
    """The images of a data set.

    Args:
      place: a directory, which is searched with those below it and must hold one kind of file; a
        file; or a list, a `.txt` with a path in each line, relative to the working directory.
        Files are images, `.npy` of uint8 `[N, height, width, channels]`, Parquet with a column of
        encoded images (bytes, or a struct with `bytes`, as Hugging Face writes them), or
        ArrayRecord as tensorflow-datasets writes it, beside its `features.json`.
      image: `(height, width, channels)` that the network reads. Encoded images are brought to it.
      column: of Parquet files, if several can hold images.

    Raises:
      ValueError: if there is nothing, or a file that cannot be read as its name says.
      ModuleNotFoundError: if a library is missing that reads such files.
    """
    place = Path(place)
    if not place.exists():
        raise ValueError(
            f"{place} does not exist; give a folder of images, an image, or an .npy, .parquet, "
            ".array_record or .txt file."
        )
    if place.is_dir():
        root, names = place, _walked(place)
    elif place.suffix == ".txt":
        root, names = Path(), tuple(_listed(place))
    else:
        root, names = place.parent, (place.name,)
    if not names:
        raise ValueError(f"{place} holds no images; known endings: {' '.join(sorted(ENDINGS))}.")
    rows, sizes, times = np.ones((3, len(names)), np.int64)
    count = functools.cache(lambda name: _count(root / name, image, column))
    for i, name in enumerate(names):
        found = os.stat(root / name)
        sizes[i], times[i] = found.st_size, int(found.st_mtime)
        if kind(name) != "image":
            rows[i] = count(name)
    if not rows.sum():
        raise ValueError(f"{place} holds no images: its files have no rows.")
    return Inputs(root, names, rows, sizes, times, image, column)


def kind(name: str) -> str:
    """How a file is read: npy, parquet or array_record by its name, image otherwise."""
    ending = os.path.splitext(name)[1].lower()
    if ending in (".npy", ".parquet"):
        return ending[1:]
    # tensorflow-datasets puts the number of the file behind it.
    return "array_record" if ".array_record" in os.path.basename(name) else "image"


def _expected(name: str) -> bool:
    """Whether a file is one of images, by its name."""
    return kind(name) != "image" or os.path.splitext(name)[1].lower() in ENDINGS


def _walked(place: Path) -> tuple[str, ...]:
    """The names of all files that can be read, below a directory."""
    names, kinds = [], set()
    for folder, _, files in os.walk(place):
        inner = os.path.relpath(folder, place)
        for file in files:
            if _expected(file):
                kinds.add(kind(file))
                names.append(file if inner == "." else os.path.join(inner, file))
    if len(kinds) > 1:
        raise ValueError(
            f"{place} holds files of the kinds {', '.join(sorted(kinds))}; give a directory of one "
            "kind, or a .txt that lists the files."
        )
    return tuple(sorted(names))


def _listed(place: Path) -> Iterable[str]:
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        if not (name := line.strip()):
            continue
        if not (_expected(name) and os.path.isfile(name)):
            raise ValueError(
                f"{place}, line {number}: {name} is no image, .npy, .parquet or .array_record file."
            )
        yield name


def _count(path: Path, image: tuple[int, int, int], column: str | None) -> int:
    """The images in a file that holds several."""
    match kind(path.name):
        case "npy":
            return len(opened_npy(path, image))
        case "parquet":
            with opened_parquet(path) as file:
                image_column(path, file.schema_arrow, column)
                return file.metadata.num_rows
        case _:
            tfds_features(path.parent)
            return len(opened_array_record(path))


def opened_npy(path: Path, image: tuple[int, int, int]) -> np.memmap:
    """The images of an .npy, mapped; ValueError if they do not fit."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    if images.dtype != np.uint8 or images.shape[1:] != image:
        wanted = ", ".join(map(str, image))
        raise ValueError(f"{path} holds {images.dtype} {images.shape}; give uint8 [N, {wanted}].")
    return images


def opened_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads in pieces of a megabyte, not row groups."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Parquet files need pyarrow: pip install pyarrow") from None
    return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def image_column(path: Path, schema: Any, column: str | None) -> str:
    """The name of the column that holds encoded images; ValueError if it is not clear."""
    import pyarrow as pa

    def encoded(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def fits(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and encoded(kind.field(at).type)
        return encoded(kind)

    fitting = [field.name for field in schema if fits(field.type)]
    if column in fitting or (column is None and len(fitting) == 1):
        return column or fitting[0]
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(
        f"{path} has the columns {listed}; name one of encoded images, bytes or a struct with "
        "bytes, with --column."
    )


def opened_array_record(path: Path) -> Any:
    """An `ArrayRecordDataSource`."""
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "ArrayRecord files need array_record: pip install array_record"
        ) from None
    try:
        return ArrayRecordDataSource(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as ArrayRecord: {error}") from error


@functools.cache
def tfds_features(folder: Path) -> tuple[Any, str]:
    """How tensorflow-datasets decodes a folder's examples, and the name of their image."""
    if not (folder / "features.json").exists():
        raise ValueError(
            f"{folder} has no features.json; ArrayRecord is read as tensorflow-datasets writes it."
        )
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "examples in ArrayRecord need tensorflow-datasets: pip install tensorflow-datasets"
        ) from None
    features: Any = tfds.features.FeaturesDict.from_config(str(folder))
    images = [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]
    if len(images) != 1:
        raise ValueError(f"the examples of {folder} hold {len(images)} images; expected one.")
    return tfds.features.FeaturesDict({images[0]: features[images[0]]}), images[0]
