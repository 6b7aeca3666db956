"""Readers of the publishers' archives and of data prepared by tensorflow-datasets.

The archives are read with the standard library and NumPy: the way to CIFAR on a machine without
TensorFlow, which tensorflow-datasets needs to prepare data. Prepared data are read without
TensorFlow if they are array_record files; its default, tfrecord, is not found.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import pickle
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from experiments.data.cache import Decoded

_CHUNK = 1_000  # images; one call for many is twice as quick as one call each, threads are no help


def read_cifar(
    paths: Sequence[Path],
    *,
    folder: str,
    train: Sequence[str],
    test: str,
    meta: str,
    prefix: str = "",
) -> Decoded:
    """Reads CIFAR-10 or CIFAR-100, Python version (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
      paths: the one `.tar.gz`.
      folder: the archive's directory, with the files `train`, `test` and `meta`.
      train: files of training images.
      test: file of test images.
      meta: file of class names.
      prefix: of the keys `labels` and `label_names` in the files.

    Raises:
      ValueError: if the archive lacks a file, or a pickle asks for more than arrays.
    """
    (path,) = paths

    def batch(tar: tarfile.TarFile, name: str) -> tuple[np.ndarray, np.ndarray]:
        content = _unpickle(tar, f"{folder}/{name}")
        pixels = content["data"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            raise ValueError(f"{folder}/{name} holds no array of uint8")
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # colour planes come first
        return np.ascontiguousarray(images), np.asarray(content[f"{prefix}labels"], np.int32)

    try:
        with tarfile.open(path, "r:gz") as tar:
            parts = [batch(tar, name) for name in train]
            test_images, test_labels = batch(tar, test)
            names = _unpickle(tar, f"{folder}/{meta}")[f"{prefix}label_names"]
        return Decoded(
            np.concatenate([images for images, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
            test_images,
            test_labels,
            tuple(map(str, names)),
            f"the publisher's archive {path.name}",
        )
    except (KeyError, TypeError, ValueError, EOFError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged or another file: {reason(error)}") from error


def read_image_folders(paths: Sequence[Path]) -> Decoded:
    """Reads CINIC-10: PNGs in `train/CLASS/`, `valid/CLASS/` and `test/CLASS/` of one archive.

    Darlow, Crowley, Antoniou, Storkey, *CINIC-10 is not ImageNet or CIFAR-10*, 2018,
    https://arxiv.org/abs/1810.03505. `valid` is left out: splits are cut from `train`, as for other
    data sets. Grey images become RGB. The labels follow the alphabetical order of the classes.

    Args:
      paths: the one `.tar.gz`.

    Raises:
      ValueError: if the archive lacks a split, its splits have different classes, or an image
        cannot be decoded or differs in size.
    """
    from PIL import Image

    (path,) = paths
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                split, label, file = ("", "", *PurePosixPath(member.name).parts)[-3:]
                # A leading dot marks the companion files that tar writes on macOS.
                wanted = member.isfile() and file.endswith(".png") and not file.startswith(".")
                if wanted and split in found and (content := tar.extractfile(member)) is not None:
                    with Image.open(io.BytesIO(content.read()), formats=["PNG"]) as image:
                        found[split].append((label, np.asarray(image.convert("RGB"))))
        classes = {split: sorted({label for label, _ in rows}) for split, rows in found.items()}
        if not classes["train"] or classes["train"] != classes["test"]:
            raise ValueError(f"train has the classes {classes['train']}, test {classes['test']}")
        number = {label: i for i, label in enumerate(classes["train"])}
        parts = [
            array
            for rows in found.values()
            for array in (
                np.stack([image for _, image in rows]),
                np.asarray([number[label] for label, _ in rows], np.int32),
            )
        ]
    except (ValueError, EOFError, OSError, SyntaxError, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged or another file: {reason(error)}") from error
    words = f"the publisher's archive {path.name}"
    return Decoded(*parts, classes=tuple(number), source=words)


def read_idx(paths: Sequence[Path], *, classes: tuple[str, ...]) -> Decoded:
    """Reads the four gzipped idx files of MNIST and its kin: train and test, images and labels.

    Raises:
      ValueError: if a file has another format.
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
        raise ValueError(f"{path} is damaged or another file: {reason(error)}") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and Python's basic types, and calls nothing else."""

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


def reason(error: BaseException) -> str:
    """An error on one line."""
    return " ".join((str(error) or type(error).__name__).split())


def find_prepared(root: Path, name: str) -> list[Path]:
    """Files of the newest version of data set `name` under `root`; [] if there is none."""
    versions = [
        folder
        for folder in (root / name).glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)
    ]
    for folder in sorted(versions, key=lambda f: [int(n) for n in f.name.split(".")], reverse=True):
        files = sorted(path for path in folder.glob("*") if path.is_file())
        starts = [f"{name}-{split}.array_record" for split in ("train", "test")]
        if all(any(path.name.startswith(start) for path in files) for start in starts):
            return files
    return []


def read_prepared(folder: Path) -> Decoded:
    """Decodes both splits of a prepared data set (60,000 PNGs of 32x32: about 8 s on one core).

    Args:
      folder: of one version, from `find_prepared`.

    Raises:
      ValueError: if the files cannot be read; one line says why.
    """
    try:
        with quiet_absl():
            import tensorflow_datasets as tfds

            # `tfds.data_source(name)` ends in the same place, but insists on the one version that
            # the installed release knows.
            builder: Any = tfds.builder_from_directory(folder)
            sources = [builder.as_data_source(split=split) for split in ("train", "test")]
            features = builder.info.features
            parts = []
            for source in sources:
                images = np.empty((len(source), *features["image"].shape), np.uint8)
                labels = np.empty(len(source), np.int32)
                for start in range(0, len(source), _CHUNK):
                    indices = range(start, min(start + _CHUNK, len(source)))
                    for i, example in zip(indices, source.__getitems__(indices), strict=True):
                        images[i] = example["image"]
                        labels[i] = example["label"]
                parts += [images, labels]
            classes = tuple(features["label"].names)
    except Exception as error:  # the readers are C++ and raise many kinds
        raise ValueError(
            f"the prepared data in {folder} cannot be read: {reason(error)}; prepare them anew, or "
            "name another directory with --data.dir"
        ) from error
    words = f"tensorflow-datasets, {folder.parent.name} {folder.name}"
    return Decoded(*parts, classes=classes, source=words)


@contextlib.contextmanager
def quiet_absl() -> Iterator[None]:
    """Keeps warnings off the terminal that no user can act on (that Pillow decodes, not OpenCV)."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
