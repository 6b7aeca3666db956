"""Decoded images on disk, so that a data set is decoded only once.

One uncompressed `.npz` a data set: the arrays, and a JSON header with the format and the source
files. The file is put in place by a rename, so it is whole even if several processes write it at
once. The zip format has a CRC-32 for each array, which is checked while it is read.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.files import replacing

FORMAT = 1  # raise it when the content, or the order of the images, changes


class Decoded(NamedTuple):
    """A data set as its publisher divides it.

    Attributes:
      train_images: `[N, H, W, C]` uint8.
      train_labels: `[N]` int32.
      test_images: `[M, H, W, C]` uint8.
      test_labels: `[M]` int32.
      classes: names.
      source: where the images came from, in words.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    source: str


_ARRAYS = Decoded._fields[:4]


def fingerprint(files: Sequence[Path]) -> list[list[str | int]]:
    """Name, size and time of change (ns) of each source file; they differ if a source changed."""
    stats = [(path.name, path.stat()) for path in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def exists(path: Path) -> bool:
    """Whether `path` is a cache that this version can read; reads only its header."""
    try:
        with np.load(path) as stored:
            return _header(stored)["format"] == FORMAT
    except Exception:  # as in `read`
        return False


def read(path: Path, source: list[list[str | int]] | None) -> Decoded | None:
    """Reads a cache.

    Args:
      path: the `.npz` file.
      source: current `fingerprint` of the source files; None if there are none to compare with.

    Returns:
      None if there is no cache, if it is stale (made by another version, or from other source
      files), or if it is damaged: then it is removed, with a warning.
    """
    try:
        with np.load(path) as stored:
            header = _header(stored)
            if header["format"] != FORMAT or (source is not None and header["source"] != source):
                return None
            arrays = [stored[name] for name in _ARRAYS]
            return Decoded(*arrays, classes=tuple(header["classes"]), source=header["words"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged zip raises nearly anything
        warnings.warn(
            f"the cache {path} cannot be read ({error!r}); the images are decoded anew",
            stacklevel=2,
        )
        if not isinstance(error, PermissionError):
            with contextlib.suppress(OSError):
                path.unlink()
        return None


def write(path: Path, decoded: Decoded, source: list[list[str | int]]) -> None:
    """Writes a cache; a directory that cannot be written is a warning."""
    header = {
        "format": FORMAT,
        "source": source,
        "classes": decoded.classes,
        "words": decoded.source,
    }
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays: dict[str, Any] = {name: getattr(decoded, name) for name in _ARRAYS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, header=text, **arrays)
    except OSError as error:
        warnings.warn(
            f"the decoded images cannot be kept in {path.parent} ({error}), and the next start "
            "decodes them again; name another directory with --data.cache",
            stacklevel=2,
        )


def is_writable(folder: Path) -> bool:
    """Whether files can be written in `folder`, which is created if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _header(stored) -> dict:
    return json.loads(stored["header"].tobytes())
