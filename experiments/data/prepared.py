"""Data sets that tensorflow-datasets has prepared, read without TensorFlow.

That works for its array_record files; a data set prepared as tfrecord, its default, is not found.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.cache import Decoded

_CHUNK = 1_000  # images; one call for many is twice as quick as one call each, threads are no help


def find(root: Path, name: str) -> list[Path]:
    """The files of the newest version of data set `name` under `root`; [] where there is none."""
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


def read(folder: Path, progress: Callable[[int, int], None] | None = None) -> Decoded:
    """Decodes both splits of a prepared data set (60,000 PNGs of 32x32: about 8 s on one core).

    Args:
      folder: of one version, as `find` has found it.
      progress: told (images so far, images in all).

    Raises:
      ValueError: the files cannot be read; one line says why.
    """
    try:
        with _quiet_absl():
            import tensorflow_datasets as tfds

            # `tfds.data_source(name)` ends in the same place, but insists on the one version that
            # the installed release knows.
            builder: Any = tfds.builder_from_directory(folder)
            sources = [builder.as_data_source(split=split) for split in ("train", "test")]
            total = sum(len(source) for source in sources)
            features = builder.info.features
            parts, done = [], 0
            for source in sources:
                images = np.empty((len(source), *features["image"].shape), np.uint8)
                labels = np.empty(len(source), np.int32)
                for start in range(0, len(source), _CHUNK):
                    indices = range(start, min(start + _CHUNK, len(source)))
                    for i, example in zip(indices, source.__getitems__(indices), strict=True):
                        images[i] = example["image"]
                        labels[i] = example["label"]
                    done += len(indices)
                    if progress is not None:
                        progress(done, total)
                parts += [images, labels]
            classes = tuple(features["label"].names)
    except Exception as error:  # the readers are C++, and raise RuntimeError or what they like
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the prepared data in {folder} cannot be read: {reason}; prepare them anew, or name "
            "another directory with --data.dir"
        ) from error
    words = f"tensorflow-datasets, {folder.parent.name} {folder.name}"
    return Decoded(*parts, classes=classes, source=words)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keeps warnings off the terminal that no user can act on (that Pillow decodes, not OpenCV)."""
    from absl import logging as absl_logging

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = absl_logging.get_absl_logger()
    logger.addFilter(errors_only)
    try:
        yield
    finally:
        logger.removeFilter(errors_only)
