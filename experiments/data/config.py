"""Configuration of the images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.checks import require, require_not_negative, require_positive
from experiments.data.decoding import Crop

DatasetName = Literal["auto", "cifar10", "cifar100", "cinic10", "fashion_mnist", "digits", "files"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and how they are split and augmented."""

    name: DatasetName = "auto"
    """Dataset. `auto` is CIFAR-10 where it is there or can be had, else scikit-learn's digits.
    `files` are images of your own, in --data.dir (docs/input.md)."""
    dir: Path | None = None
    """Directory of prepared tensorflow-datasets, which must hold the data set. Default:
    $TFDS_DATA_DIR or ~/tensorflow_datasets where they hold it, else the cache or a download.
    files: directory of image folders, Parquet files, or one prepared data set."""
    cache: Path | None = None
    """Where decoded images are kept. Default: $XDG_CACHE_HOME/eejax, else ~/.cache/eejax."""
    download: bool = True
    """Fetch what is missing. With --data.no-download nothing touches the network."""
    calibrate: int = 1_000
    """Images held out from training to fit the temperatures."""
    choose: int = 4_000
    """Images held out from training to choose the thresholds."""
    certify: int = 0
    """Images held out from training to certify a risk with (experiments.compare)."""
    test: int | None = None
    """files: report on this many images of the test split, drawn at random. Default: all."""
    test_split: str | None = None
    """files: the split that is reported. Default: validation, val, valid or test, the first that
    is there."""
    limit: int | None = None
    """Use at most this many training images (a quick look, not a result)."""
    flip: bool = True
    """Augmentation: mirror half of the images left-right, and in the next epoch the other half;
    streamed: half of the images of each batch, drawn anew."""
    shift: int = 2
    """Augmentation: shift by up to this many pixels, the border reflected."""
    cutout: int = 0
    """Augmentation: side in pixels of a square that is blanked at random; 0 is off."""
    image_size: int = 224
    """files: height and width that images are brought to."""
    crop: Crop = "centre"
    """files: what is kept of a training image: random, 8 to 100 % of its area; centre, the central
    square; whole, all of it. Other splits are cropped in the centre, or whole too."""
    feed: Literal["auto", "resident", "streamed"] = "auto"
    """resident: the training images are on the device, whole. streamed: they are read and decoded
    while the network trains. auto: streamed for files with random crops, or of more than
    --data.memory."""
    memory: float = 2.0
    """auto: GiB of decoded training images that may be resident."""
    threads: int | None = None
    """streamed: threads that decode, in each process. Default: the cores that may be used."""
    workers: int = 0
    """streamed: processes that decode; 0 for threads of the process that trains. For machines with
    so many cores that threads wait for Python; each takes seconds to start."""
    ahead: int = 2
    """streamed: dispatches (--train.steps-per-dispatch steps) that are prepared ahead."""

    @property
    def decode_threads(self) -> int:
        """Threads that decode, in each process."""
        return self.threads or max(cores() // max(self.workers, 1), 1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check(data: DataConfig) -> None:
    """Raises ValueError if a size is negative, or `dir` is no directory."""
    require_positive("data", data, "calibrate choose limit test image_size memory threads ahead")
    require_not_negative("data", data, "certify shift cutout workers")
    named = data.name != "files" or data.dir is not None
    require(named, "data.dir", data.dir, "the directory of the files")
    there = data.dir is None or data.dir.is_dir()
    require(there, "data.dir", data.dir, "a directory that is there")
