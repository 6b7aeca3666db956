"""Decoded images on disk, so that only the first start of a data set pays for decoding it.

One uncompressed `.npz` a data set: the arrays, and a JSON that says which format this is and which
source files it was made from. One file, put in place by a rename, is never half of an old cache and
half of a new one, whichever processes write it at once. The zip format carries a CRC-32 for each
array, which is checked while it is read, at no cost worth naming.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMAT = 1  # raise it when what is stored, or the order of the images, changes


class Decoded(NamedTuple):
    """A data set as its publisher cut it."""

    train_images: np.ndarray  # uint8 [N, H, W, C]
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray  # uint8 [M, H, W, C]
    test_labels: np.ndarray  # int32 [M]
    classes: tuple[str, ...]
    source: str  # where the images came from, in words


def fingerprint(files: Sequence[Path]) -> list[list[str | int]]:
    """Name, size and time of change (ns) of each source file: what tells that a source changed."""
    stats = [(path.name, path.stat()) for path in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def exists(path: Path) -> bool:
    """Whether `path` is a cache that this version can read, by its header only: quick."""
    try:
        with np.load(path) as stored:
            return _header(stored)["format"] == FORMAT
    except Exception:  # as in `read`
        return False


def read(path: Path, source: list[list[str | int]] | None) -> Decoded | None:
    """Reads a cache.

    Args:
      path: the `.npz` file.
      source: the `fingerprint` of the source files as they are now; None where there are none to
        compare with, and the cache is all there is.

    Returns:
      None where there is no cache, where it is stale (made by another version, or from other source
      files), or where it is damaged: then it is removed, with a warning.
    """
    try:
        with np.load(path) as stored:
            header = _header(stored)
            if header["format"] != FORMAT or (source is not None and header["source"] != source):
                return None
            arrays = [stored[name] for name in Decoded._fields[:4]]
            _check(arrays)
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                header=text,
                train_images=decoded.train_images,
                train_labels=decoded.train_labels,
                test_images=decoded.test_images,
                test_labels=decoded.test_labels,
            )
    except OSError as error:
        warnings.warn(
            f"the decoded images cannot be kept in {path.parent} ({error}), and the next start "
            "decodes them again; name another directory with --data.cache",
            stacklevel=2,
        )


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: it becomes `path` if all goes well, and is removed if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(stored) -> dict:
    return json.loads(stored["header"].tobytes())


def _check(arrays: list[np.ndarray]) -> None:
    for images, labels in (arrays[:2], arrays[2:]):
        kinds = images.dtype, images.ndim, labels.dtype, labels.ndim
        if kinds != (np.uint8, 4, np.int32, 1) or len(images) != len(labels):
            raise ValueError(f"{images.dtype} {images.shape} with {labels.dtype} {labels.shape}")
