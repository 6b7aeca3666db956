"""Configuration of the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.checks import require, require_not_negative, require_positive

DatasetName = Literal["auto", "cifar10", "cifar100", "cinic10", "fashion_mnist", "digits"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and how they are split and augmented."""

    name: DatasetName = "auto"
    """Dataset. `auto` is CIFAR-10 where it is there or can be had, else scikit-learn's digits."""
    dir: Path | None = None
    """Directory of prepared tensorflow-datasets, which must hold the data set. Default:
    $TFDS_DATA_DIR or ~/tensorflow_datasets where they hold it, else the cache or a download."""
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
    limit: int | None = None
    """Use at most this many training images (a quick look, not a result)."""
    flip: bool = True
    """Augmentation: mirror half of the images left-right, and in the next epoch the other half."""
    shift: int = 2
    """Augmentation: shift by up to this many pixels, the border reflected."""
    cutout: int = 0
    """Augmentation: side in pixels of a square that is blanked at random; 0 is off."""


def check(data: DataConfig) -> None:
    """Raises ValueError if a size is negative, or `dir` is no directory."""
    require_positive("data", data, "calibrate choose limit")
    require_not_negative("data", data, "certify shift cutout")
    there = data.dir is None or data.dir.is_dir()
    require(there, "data.dir", data.dir, "a directory that is there")
