"""Splits of images in files, decoded once into an array file and mapped into memory.

A split is divided and evaluated as an array. Of images in files the array is a `.npy` file in the
cache, which the operating system reads as it is used: it needs no memory of its own, and a second
start decodes nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import warnings
from pathlib import Path

import numpy as np

from experiments.data.streaming import Streamed, decode_all
from experiments.files import digest

FORMAT = 1  # raise it when the content changes


def decoded(images: Streamed, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split as an array, from the cache if their files have not changed.

    Args:
      images: the split.
      folder: of the cache; if it cannot be written, with a warning, memory is used instead.

    Returns:
      Images `[N, H, W, C]` uint8 and labels `[N]` int32.

    Raises:
      ValueError: if an image cannot be decoded.
    """
    if not len(images):
        return np.empty(images.shape, np.uint8), np.empty(0, np.int32)
    decoder = images.decoder
    assert decoder is not None
    whole = decoder.crop == "whole"  # random crops are of training images alone
    source = images.source.fingerprint(images.rows.tolist())
    place = folder / digest([FORMAT, decoder.size, whole, source])
    try:
        return _opened(place)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError):  # it is damaged
        shutil.rmtree(place, ignore_errors=True)
    temporary = folder / f".{place.name}.{secrets.token_hex(4)}.part"
    try:
        temporary.mkdir(parents=True)
        path = temporary / "images.npy"
        array = np.lib.format.open_memmap(path, "w+", np.uint8, images.shape)
        with path.open("r+b") as file:  # a full disk would end the process while it is written
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        warnings.warn(
            f"the decoded images cannot be kept in {folder} ({error}), and the next start decodes "
            "them again; name another directory with --data.cache",
            stacklevel=2,
        )
        array = np.empty(images.shape, np.uint8)
        return array, decode_all(images, array)
    try:
        np.save(temporary / "labels.npy", decode_all(images, array))
        array.flush()
        del array
        with contextlib.suppress(OSError):  # if another process was first
            temporary.rename(place)
        return _opened(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _opened(place: Path) -> tuple[np.ndarray, np.ndarray]:
    images = np.load(place / "images.npy", mmap_mode="r")
    labels = np.load(place / "labels.npy")
    if len(images) != len(labels):
        raise ValueError(f"{place} is damaged")
    return images, labels
