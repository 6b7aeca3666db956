"""Where the images of a data set come from: prepared data, the cache, the publisher's archive.

In that order; decoded images stay in the cache as long as their source does not change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import requests

from experiments.data import cache, formats
from experiments.data.cache import Decoded
from experiments.data.config import DataConfig

_STALL = 30.0  # seconds without a byte after which a download is given up
_HEADERS = {"User-Agent": "eejax"}


class Archive(NamedTuple):
    """A file to download, and the checksum that its publisher gives."""

    url: str
    md5: str

    @property
    def file(self) -> str:
        """Its name."""
        return self.url.rpartition("/")[2]


class Spec(NamedTuple):
    """Facts of a data set that are known before it is read."""

    title: str
    image_shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    archives: tuple[Archive, ...] = ()
    read: Callable[[Sequence[Path]], Decoded] | None = None  # reads the archives; None: embedded


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_CINIC = "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

SPECS = {
    "cifar10": Spec(
        title="CIFAR-10",
        image_shape=(32, 32, 3),
        num_classes=10,
        archives=(Archive(_CIFAR + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
        read=functools.partial(
            formats.read_cifar,
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test="test_batch",
            meta="batches.meta",
        ),
    ),
    "cifar100": Spec(
        title="CIFAR-100",
        image_shape=(32, 32, 3),
        num_classes=100,
        archives=(Archive(_CIFAR + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
        read=functools.partial(
            formats.read_cifar,
            folder="cifar-100-python",
            train=("train",),
            test="test",
            meta="meta",
            prefix="fine_",
        ),
    ),
    "cinic10": Spec(
        title="CINIC-10",
        image_shape=(32, 32, 3),
        num_classes=10,
        archives=(Archive(_CINIC + "CINIC-10.tar.gz", "6ee4d0c996905fe93221de577967a372"),),
        read=formats.read_image_folders,
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
            formats.read_idx,
            classes=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
        ),
    ),
    "digits": Spec(title="scikit-learn's digits", image_shape=(8, 8, 1), num_classes=10),
}


def missing(name: str, config: DataConfig, *, look_in_cache: bool = True) -> str:
    """Where a data set is missing and what to do, on one line; "" if it can be had."""
    spec, root, folder = SPECS[name], _prepared_root(config), cache_folder(name, config)
    if spec.read is None or formats.find_prepared(root, name):
        return ""
    if config.dir is not None:
        # Neither the cache nor a download may stand in for a directory that was named.
        return (
            f"{spec.title} is not prepared as array_record in {root / name}, which --data.dir "
            "names: prepare it there, or name another directory, or leave --data.dir out to use "
            f"the cache {folder} or a download"
        )
    if _archived(name, config) or (look_in_cache and cache.exists(folder / "images.npz")):
        return ""
    why_not = "downloading is switched off (--data.no-download)"
    if config.download:
        url = spec.archives[0].url
        if not (reason := unreachable(url)):
            return ""
        why_not = f"cannot be downloaded from {url} ({reason})"
    files = ", ".join(archive.file for archive in spec.archives)
    return (
        f"{spec.title} is not prepared as array_record in {root / name}, is not in the cache "
        f"{folder}, and {why_not}: name the directory of prepared data with --data.dir or "
        f"TFDS_DATA_DIR, or put {files} into {folder}, or take --data.name digits"
    )


def obtain(name: str, config: DataConfig) -> Decoded:
    """Reads the images: from the cache if their source has not changed, else from the source.

    Args:
      name: a key of `SPECS` whose data are not embedded.
      config: where to look, and whether to download.

    Raises:
      FileNotFoundError, ConnectionError: if the images cannot be had.
      ValueError: if a source is damaged, or holds other data.
    """
    spec, folder = SPECS[name], cache_folder(name, config)
    assert spec.read is not None
    prepared = formats.find_prepared(_prepared_root(config), name)
    if not prepared and (problem := missing(name, config)):
        raise FileNotFoundError(problem)
    files = prepared or _archived(name, config)
    kept = folder / "images.npz"
    decoded = cache.read(kept, cache.fingerprint(files) if files else None)
    if decoded is not None:
        return decoded
    with contextlib.ExitStack() as stack:
        if prepared:
            decoded = formats.read_prepared(prepared[0].parent)
        else:
            # Once more: a damaged cache is no source.
            if problem := missing(name, config, look_in_cache=False):
                raise FileNotFoundError(problem)
            place = folder
            if not cache.is_writable(folder):
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            files = _fetch(spec, place, config.download)
            decoded = spec.read(files)
        _check(name, decoded)
        decoded = _in_order_of_content(decoded)
        cache.write(kept, decoded, cache.fingerprint(files))
    return decoded


@functools.cache
def unreachable(url: str, timeout: float = 3.0) -> str:
    """Why `url` cannot be had, or "" if it can; asks for its header only, once a process.

    Two callers in one run get one answer, also when the network is flaky.
    """
    answer: list[str] = []

    def ask() -> None:
        try:
            response = requests.head(url, timeout=timeout, headers=_HEADERS, allow_redirects=True)
            response.raise_for_status()
            answer.append("")
        except (OSError, ValueError) as error:
            answer.append(formats.reason(error))

    # A socket's timeout does not cover the look-up of its name, which can take half a minute.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] if answer else f"no answer within {timeout:g} s"


def _fetch(spec: Spec, folder: Path, download: bool) -> list[Path]:
    """Archives in `folder`, verified; those that are missing or damaged are downloaded."""
    pooch.get_logger().setLevel("WARNING")
    files = pooch.create(
        folder,
        base_url="",
        registry={archive.file: f"md5:{archive.md5}" for archive in spec.archives},
        urls={archive.file: archive.url for archive in spec.archives},
        retry_if_failed=1,
        allow_updates=download,
    )
    bar = sys.stderr.isatty()
    downloader: Any = pooch.HTTPDownloader(progressbar=bar, timeout=_STALL, headers=_HEADERS)
    try:
        return [Path(files.fetch(a.file, downloader=downloader)) for a in spec.archives]
    except requests.RequestException as error:
        raise ConnectionError(f"cannot download {spec.title}: {formats.reason(error)}") from error


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
    """Raises ValueError if the data differ from the specification."""
    spec = SPECS[name]
    labels = np.concatenate([decoded.train_labels, decoded.test_labels])
    shapes = {decoded.train_images.shape[1:], decoded.test_images.shape[1:]}
    content = (
        f"images of {shapes}, {len(decoded.classes)} classes, labels {labels.min()}..{labels.max()}"
    )
    if (
        shapes != {spec.image_shape}
        or len(decoded.classes) != spec.num_classes
        or not 0 <= labels.min() <= labels.max() < spec.num_classes
        or len(decoded.train_images) + len(decoded.test_images) != len(labels)
    ):
        raise ValueError(
            f"{decoded.source}: {content}; {spec.title} has images of {spec.image_shape} and "
            f"{spec.num_classes} classes"
        )


def _archived(name: str, config: DataConfig) -> list[Path]:
    """The archives in the cache, if all are there; else []."""
    paths = [cache_folder(name, config) / archive.file for archive in SPECS[name].archives]
    return paths if all(os.path.isfile(path) for path in paths) else []


def _prepared_root(config: DataConfig) -> Path:
    root = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser()


def cache_folder(name: str, config: DataConfig) -> Path:
    """Directory of a data set in the cache."""
    root = config.cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "eejax"
    return root.expanduser() / name
