"""The publishers' own archives: fetched, verified and read with the standard library and NumPy.

This is the way to CIFAR on a machine without TensorFlow, which tensorflow-datasets needs to prepare
it (though not to read what is prepared).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import pickle
import tarfile
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.cache import Decoded, replacing

Progress = Callable[[int, int], None]
"""Told (done, total); total is 0 where it is not known."""

_CHUNK = 1 << 20
_STALL = 30.0  # seconds without a byte after which a download is given up


class Archive(NamedTuple):
    """A file to fetch."""

    url: str
    md5: str  # as published; it tells damage, and a second file of the same MD5 is out of reach

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


@functools.cache
def unreachable(url: str, timeout: float = 3.0) -> str:
    """Why `url` cannot be had, or "" if it can. Asks for its header only.

    Asked once a process: two callers in one run get one answer, also when the network is flaky.
    """
    answer: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(_request(url, "HEAD"), timeout=timeout):
                answer.append("")
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.append(_reason(error))

    # A socket's timeout does not cover the look-up of its name, which can take half a minute.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] if answer else f"no answer within {timeout:g} s"


def fetch(archive: Archive, folder: Path, progress: Progress | None = None) -> Path:
    """Downloads an archive into `folder`, where it appears under its name only once verified.

    Args:
      archive: what to fetch.
      folder: an existing directory.
      progress: told (bytes so far, bytes in all).

    Raises:
      ConnectionError: the download failed; the message says why, on one line.
      ValueError: what came has another checksum. It has been removed.
    """
    target = folder / archive.file
    digest = hashlib.md5(usedforsecurity=False)
    with replacing(target) as temporary:
        done = total = 0
        try:
            with (
                urllib.request.urlopen(_request(archive.url, "GET"), timeout=_STALL) as response,
                open(temporary, "wb") as file,
            ):
                total = int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"cannot download {archive.url}: {_reason(error)}") from error
        if done < total:
            raise ConnectionError(
                f"cannot download {archive.url}: it ended after {done:,} of {total:,} bytes"
            )
        _refuse_other_md5(archive, archive.url, digest.hexdigest())
    return target


def verify(archive: Archive, path: Path) -> Path:
    """Checks an archive that is on disk already.

    Raises:
      ValueError: it has another checksum. It has been removed.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, _md5).hexdigest()
    try:
        _refuse_other_md5(archive, str(path), found)
    except ValueError:
        path.unlink(missing_ok=True)
        raise
    return path


def read_cifar(
    paths: Sequence[Path],
    *,
    folder: str,
    train: Sequence[str],
    test: str,
    labels: str,
    meta: str,
    names: str,
) -> Decoded:
    """Reads CIFAR-10 or CIFAR-100, Python version (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
      paths: the one `.tar.gz`.
      folder: the archive's directory.
      train: its files of training images.
      test: its file of test images.
      labels: the key of the labels in each of them.
      meta: its file of class names.
      names: the key of the class names in it.

    Raises:
      ValueError: the archive does not hold what it should, or a pickle asks for more than arrays.
    """
    (path,) = paths

    def batch(tar: tarfile.TarFile, name: str) -> tuple[np.ndarray, np.ndarray]:
        content = _unpickle(tar, f"{folder}/{name}")
        pixels = content["data"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            raise ValueError(f"{folder}/{name} holds no array of uint8")
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # colour planes come first
        return np.ascontiguousarray(images), np.asarray(content[labels], np.int32)

    try:
        with tarfile.open(path, "r:gz") as tar:
            parts = [batch(tar, name) for name in train]
            test_images, test_labels = batch(tar, test)
            classes = tuple(str(name) for name in _unpickle(tar, f"{folder}/{meta}")[names])
        return Decoded(
            np.concatenate([images for images, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
            test_images,
            test_labels,
            classes,
            f"the publisher's archive {path.name}",
        )
    except (KeyError, TypeError, ValueError, EOFError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} is not what its name says: {_reason(error)}") from error


def read_idx(paths: Sequence[Path], *, classes: tuple[str, ...]) -> Decoded:
    """Reads the four gzipped idx files of MNIST and its kin: train and test, images and labels.

    Raises:
      ValueError: a file is not of that format.
    """
    train_images, train_labels, test_images, test_labels = (
        _read_idx(path, dimensions) for path, dimensions in zip(paths, (3, 1, 3, 1), strict=True)
    )
    return Decoded(
        train_images[..., None],
        train_labels.astype(np.int32),
        test_images[..., None],
        test_labels.astype(np.int32),
        classes,
        f"the publisher's files {', '.join(path.name for path in paths)}",
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:4] != bytes((0, 0, 8, dimensions)):  # 8: unsigned bytes
            raise ValueError(f"it begins with {data[:4].hex()}")
        shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(int)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not what its name says: {_reason(error)}") from error


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes NumPy arrays and Python's basic types, and calls nothing else."""

    # The function that rebuilds an array has moved within NumPy; an array's own pickle names it.
    _allowed = {  # noqa: RUF012
        **{
            (module, "_reconstruct"): np.empty(0).__reduce__()[0]
            for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        },
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._allowed:
            raise ValueError(f"its pickle asks for {module}.{name}, which no image needs")
        return self._allowed[module, name]


def _unpickle(tar: tarfile.TarFile, name: str) -> dict:
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    try:
        return dict(_ArraysOnly(file, encoding="latin1").load())  # Python 2 wrote them
    except (pickle.UnpicklingError, AttributeError, IndexError) as error:
        raise ValueError(f"{name}: {error}") from error


def _md5():
    return hashlib.md5(usedforsecurity=False)  # there are machines that refuse MD5 otherwise


def _refuse_other_md5(archive: Archive, where: str, found: str) -> None:
    if found != archive.md5:
        raise ValueError(
            f"{where} is corrupt (MD5 {found}, expected {archive.md5}) and has been removed; "
            "start again to download it anew"
        )


def _request(url: str, method: str) -> urllib.request.Request:
    return urllib.request.Request(url, method=method, headers={"User-Agent": "eejax"})


def _reason(error: BaseException) -> str:
    """An error on one line, without the wrapping that urllib puts around it."""
    inner = getattr(error, "reason", None)
    text = str(inner if isinstance(inner, BaseException) else error) or type(error).__name__
    return " ".join(text.split())
