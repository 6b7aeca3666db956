"""Where the images of a data set come from: prepared data, the cache, the publisher's archive.

In that order; what was decoded once is in the cache, for as long as its source does not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.data import archives, cache, prepared
from experiments.data.archives import Archive, Progress
from experiments.data.cache import Decoded
from experiments.data.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read."""

    title: str
    image_shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    archives: tuple[Archive, ...] = ()
    read: Callable[[Sequence[Path]], Decoded] | None = None  # reads the archives; None: embedded


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

SPECS = {
    "cifar10": Spec(
        title="CIFAR-10",
        image_shape=(32, 32, 3),
        num_classes=10,
        archives=(Archive(_CIFAR + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
        read=functools.partial(
            archives.read_cifar,
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test="test_batch",
            labels="labels",
            meta="batches.meta",
            names="label_names",
        ),
    ),
    "cifar100": Spec(
        title="CIFAR-100",
        image_shape=(32, 32, 3),
        num_classes=100,
        archives=(Archive(_CIFAR + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
        read=functools.partial(
            archives.read_cifar,
            folder="cifar-100-python",
            train=("train",),
            test="test",
            labels="fine_labels",
            meta="meta",
            names="fine_label_names",
        ),
    ),
    "fashion_mnist": Spec(
        title="Fashion-MNIST",
        image_shape=(28, 28, 1),
        num_classes=10,
        archives=(
            Archive(_FASHION + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            Archive(_FASHION + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            Archive(_FASHION + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            Archive(_FASHION + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        read=functools.partial(
            archives.read_idx,
            classes=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
        ),
    ),
    "digits": Spec(title="scikit-learn's digits", image_shape=(8, 8, 1), num_classes=10),
}


def missing(name: str, config: DataConfig, *, look_in_cache: bool = True) -> str:
    """Where a data set was looked for in vain and what to do, on one line; "" if it can be had."""
    spec, root, folder = SPECS[name], _prepared_root(config), _cache_folder(name, config)
    if (
        spec.read is None
        or prepared.find(root, name)
        or _archived(name, config)
        or (look_in_cache and cache.exists(folder / "images.npz"))
    ):
        return ""
    why_not = "downloading is switched off (--data.no-download)"
    if config.download:
        url = spec.archives[0].url
        if not (reason := archives.unreachable(url)):
            return ""
        why_not = f"cannot be downloaded from {url} ({reason})"
    files = ", ".join(archive.file for archive in spec.archives)
    return (
        f"{spec.title} is not prepared as array_record in {root / name}, is not in the cache "
        f"{folder}, and {why_not}: name the directory of prepared data with --data.dir or "
        f"TFDS_DATA_DIR, or put {files} into {folder}, or take --data.name digits"
    )


def obtain(name: str, config: DataConfig, progress: Progress | None) -> Decoded:
    """Reads the images: from the cache if it is of the source as it is now, else from the source.

    Args:
      name: a key of `SPECS` whose data are not embedded.
      config: where to look, and whether to download.
      progress: as in `data.load`.

    Raises:
      FileNotFoundError, ConnectionError: they cannot be had.
      ValueError: a source is damaged, or is something else.
    """
    spec, folder = SPECS[name], _cache_folder(name, config)
    assert spec.read is not None
    in_tfds = prepared.find(_prepared_root(config), name)
    files = in_tfds or _archived(name, config)
    kept = folder / "images.npz"
    decoded = cache.read(kept, cache.fingerprint(files) if files else None)
    if decoded is not None:
        return decoded
    with contextlib.ExitStack() as stack:
        if in_tfds:
            decoded = prepared.read(in_tfds[0].parent, progress)
        else:
            problem = missing(name, config, look_in_cache=False)
            if problem:
                raise FileNotFoundError(problem)
            place = folder
            if not cache.is_writable(folder):
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            files = [
                archives.verify(archive, folder / archive.file)
                if os.path.isfile(folder / archive.file)
                else archives.fetch(archive, place, progress)
                for archive in spec.archives
            ]
            decoded = spec.read(files)
        _check(name, decoded)
        decoded = _in_order_of_content(decoded)
        cache.write(kept, decoded, cache.fingerprint(files))
    return decoded


def _in_order_of_content(decoded: Decoded) -> Decoded:
    """The same images in an order that does not depend on the file they came from.

    The archive and tensorflow-datasets hold the same images in different orders. Without this, the
    same seed would cut different splits on two machines.
    """

    def arrange(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        digests = [hashlib.blake2b(image, digest_size=16).digest() for image in images]
        order = sorted(range(len(labels)), key=lambda i: (digests[i], labels[i]))
        return images[order], labels[order]

    train = arrange(decoded.train_images, decoded.train_labels)
    test = arrange(decoded.test_images, decoded.test_labels)
    return Decoded(*train, *test, decoded.classes, decoded.source)


def _check(name: str, decoded: Decoded) -> None:
    """Refuses data that are not what the specification says."""
    spec = SPECS[name]
    labels = np.concatenate([decoded.train_labels, decoded.test_labels])
    shapes = {decoded.train_images.shape[1:], decoded.test_images.shape[1:]}
    found = (
        f"images of {shapes}, {len(decoded.classes)} classes, labels {labels.min()}..{labels.max()}"
    )
    if (
        shapes != {spec.image_shape}
        or len(decoded.classes) != spec.num_classes
        or not 0 <= labels.min() <= labels.max() < spec.num_classes
        or len(decoded.train_images) + len(decoded.test_images) != len(labels)
    ):
        raise ValueError(
            f"{decoded.source}: {found}; {spec.title} has images of {spec.image_shape} and "
            f"{spec.num_classes} classes"
        )


def _archived(name: str, config: DataConfig) -> list[Path]:
    """The archives in the cache, if all are there; else []."""
    paths = [_cache_folder(name, config) / archive.file for archive in SPECS[name].archives]
    return paths if all(os.path.isfile(path) for path in paths) else []


def _prepared_root(config: DataConfig) -> Path:
    root = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser()


def _cache_folder(name: str, config: DataConfig) -> Path:
    root = config.cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "eejax"
    return root.expanduser() / name
