"""Data sets as arrays, divided into splits with one use each.

    train      fits the weights
    calibrate  fits the policies, temperatures among them
    choose     chooses the thresholds
    certify    certifies a risk; empty by default
    test       is reported

All but `test`, the official test set, come from the official training images. Training images that
do not fit on the device are `Streamed`; all other splits are arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import held_out, sources
from experiments.data.cache import Decoded
from experiments.data.config import DataConfig
from experiments.data.decoding import Decoder
from experiments.data.opening import open_files
from experiments.data.records import Arrays, Source
from experiments.data.sources import SPECS
from experiments.data.streaming import Streamed

FILES = "files"

# From so many training images, in random order, are mean and standard deviation taken if the images
# are in files.
_MOMENTS = 1_000


class Split(NamedTuple):
    """Images `[N, H, W, C]` uint8 and labels `[N]` int32."""

    images: np.ndarray
    labels: np.ndarray


class StreamedSplit(NamedTuple):
    """Training images that are decoded when they are indexed; their labels come with them."""

    images: Streamed


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, divided.

    Attributes:
      name: "cifar10", "digits", ..., never "auto".
      classes: names.
      train: training split, an array or streamed.
      calibrate, choose, certify, test: splits.
      notice: says that this is a fall-back; else "".
      source: where the images came from, in words.
      mean: of each channel of the training split, in 0..255; for files, of 1,000 of its images.
      std: likewise.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | StreamedSplit
    calibrate: Split
    choose: Split
    certify: Split
    test: Split
    notice: str
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def resolve(config: DataConfig) -> str:
    """The data set that `load` will read; takes a few seconds at most.

    Returns:
      "files" or a key of `SPECS`. "auto" is "cifar10" if that is prepared, in the cache, or can be
      downloaded, else "digits". A data set that was named is never replaced by another.

    Raises:
      FileNotFoundError: if the named data set cannot be had; one line says where it was looked for
        and what to do.
      ValueError: if there is no data set of that name.
    """
    name = "cifar10" if config.name == "auto" else config.name
    if name == FILES:
        return name
    if name not in SPECS:
        raise ValueError(f"no data set {name!r}; there are auto, {FILES}, {', '.join(SPECS)}")
    missing = sources.missing(name, config)
    if missing and config.name != "auto":
        raise FileNotFoundError(missing)
    return "digits" if missing else name


def load(config: DataConfig, seed: int) -> Dataset:
    """Reads a data set and divides it.

    The splits depend on the seed and the images alone, not on the file that the images came from.
    The test split does not depend on the seed.

    Args:
      config: which data, from where, and how much for each split.
      seed: of the splits.

    Raises:
      FileNotFoundError, ConnectionError: if the data cannot be had; one line says what to do. A
        download that fails half-way is an error for "auto" too: `resolve` promised the data set.
      ValueError: if the splits do not fit, or a source is damaged.
    """
    name = resolve(config)
    if name == FILES:
        return _load_files(config, seed)
    spec = SPECS[name]
    notice = ""
    if config.name == "auto" and name == "digits":
        notice = (
            "This run is NOT on CIFAR-10 but on scikit-learn's digits (1,797 images of 8x8 pixels) "
            f"and says nothing about CIFAR-10. {sources.missing('cifar10', config)}"
        )
    decoded = sources.obtain(name, config) if spec.read else _digits()
    train, calibrate, choose, certify = (
        Split(decoded.train_images[rows], decoded.train_labels[rows])
        for rows in _cut(name, decoded.train_labels, config, seed)
    )
    mean, std = _moments(train.images)
    if config.feed == "streamed":
        source = Arrays(*train, decoded.classes)
        train = StreamedSplit(Streamed(source, np.arange(len(source)), None))
    return Dataset(
        name=name,
        classes=decoded.classes,
        train=train,
        calibrate=calibrate,
        choose=choose,
        certify=certify,
        test=Split(decoded.test_images, decoded.test_labels),
        notice=notice,
        source=decoded.source,
        mean=mean,
        std=std,
    )


def _load_files(config: DataConfig, seed: int) -> Dataset:
    """As `load`, for images in files; splits are drawn by the numbers of the records."""
    assert config.dir is not None
    files = open_files(config.dir, config.test_split)
    sizes = (config.calibrate, config.choose, config.certify)
    _check_sizes(FILES, len(files.train), config)
    decoder = Decoder(config.image_size, config.crop)

    def array(source: Source, rows: np.ndarray) -> Split:
        return Split(
            *held_out.decoded(Streamed(source, rows, decoder), sources.cache_folder(FILES, config))
        )

    rng = np.random.Generator(np.random.PCG64(seed))
    rows = rng.permutation(len(files.train))
    *held, train = np.split(rows, np.cumsum(sizes))
    calibrate, choose, certify = (array(files.train, part) for part in held)
    # The same images for all seeds.
    test = np.sort(np.random.default_rng(0).permutation(len(files.test))[: config.test])
    images = Streamed(files.train, train[: config.limit], decoder)
    mean, std = _moments(images[:_MOMENTS])
    return Dataset(
        name=FILES,
        classes=files.train.classes,
        train=StreamedSplit(images) if streams(config, images) else array(files.train, images.rows),
        calibrate=calibrate,
        choose=choose,
        certify=certify,
        test=array(files.test, test),
        notice="",
        source=files.words,
        mean=mean,
        std=std,
    )


def streams(config: DataConfig, images: Streamed) -> bool:
    """Whether these training images, in files, are streamed and not kept on the device."""
    if config.feed != "auto":
        return config.feed == "streamed"
    return config.crop == "random" or np.prod(images.shape, dtype=float) > config.memory * 2**30


def stratified(
    labels: np.ndarray, sizes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Divides samples into groups of the given sizes, each with the classes in proportion.

    Args:
      labels: `[N]` int.
      sizes: of the groups; at most N together.
      rng: draws the groups.

    Returns:
      Indices of each group, and of the rest, in random order.
    """
    order = rng.permutation(len(labels))
    members = [order[labels[order] == label] for label in range(int(labels.max()) + 1)]
    group = np.full(len(labels), len(sizes))
    for i, size in enumerate(sizes):
        shares = _in_proportion(np.asarray([len(m) for m in members]), size)
        for j, share in enumerate(shares):
            group[members[j][:share]] = i
            members[j] = members[j][share:]
    return [order[group[order] == i] for i in range(len(sizes) + 1)]


def _in_proportion(counts: np.ndarray, size: int) -> np.ndarray:
    """Integers that add up to `size`, none above its count, in proportion by largest remainders."""
    total = max(int(counts.sum()), 1)
    shares, remainders = counts * size // total, counts * size % total
    shares[np.argsort(-remainders, kind="stable")[: size - shares.sum()]] += 1
    return shares


def _cut(name: str, labels: np.ndarray, config: DataConfig, seed: int) -> list[np.ndarray]:
    """Indices of train, calibrate, choose and certify."""
    _check_sizes(name, len(labels), config)
    sizes = (config.calibrate, config.choose, config.certify)
    rng = np.random.Generator(np.random.PCG64(seed))
    calibrate, choose, certify, train = stratified(labels, sizes, rng)
    return [train[: config.limit], calibrate, choose, certify]


def _check_sizes(name: str, images: int, config: DataConfig) -> None:
    """Raises ValueError if the held-out splits leave nothing of the training images."""
    if config.calibrate + config.choose + config.certify >= images:
        certify = f" and certify={config.certify:,}" if config.certify else ""
        raise ValueError(
            f"calibrate={config.calibrate:,} and choose={config.choose:,}{certify} leave nothing "
            f"to train on: {name} has {images:,} training images; make --data.calibrate and "
            "--data.choose smaller"
        )


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, exactly: from counts of the 256 values."""
    channels = np.moveaxis(images, -1, 0)
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])
    values = np.arange(256)
    mean = counts @ values / counts.sum(1)
    variance = counts @ values**2 / counts.sum(1) - mean**2
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(variance, 0)).tolist())


def _digits() -> Decoded:
    """scikit-learn's digits. They have no official test set: a quarter of them, always the same."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int32)
    rng = np.random.Generator(np.random.PCG64(0))
    test, train = stratified(labels, (len(labels) // 4,), rng)
    classes = tuple(str(digit) for digit in range(10))
    return Decoded(
        images[train], labels[train], images[test], labels[test], classes, "scikit-learn, embedded"
    )
