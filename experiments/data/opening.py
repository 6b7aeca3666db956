"""Opens a data set in files, whose format follows from what is there."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import NamedTuple

from experiments.data.formats import reason
from experiments.data.parquet import Parquet
from experiments.data.records import Folder, Prepared, Source

# The names of the reported split, in order of preference: ImageNet's test images have no labels.
TEST_SPLITS = ("validation", "val", "valid", "test")


class Files(NamedTuple):
    """A data set in files: what is trained on, what is reported, and where from, in words."""

    train: Source
    test: Source
    words: str


def open_files(root: Path, test_split: str | None = None) -> Files:
    """Opens a data set; its format follows from what is in `root`.

    - `features.json`: prepared by tensorflow-datasets as array_record. `root` is the directory of
      a version, of a data set with one version or more (the newest is taken), or their parent if
      it holds one data set;
    - `*.parquet`, there or in `data/`: their names begin with the split;
    - otherwise folders of splits, each with a folder for each class.

    Args:
      root: the directory.
      test_split: the split that is reported; by default the first of validation, val, valid and
        test that is there.

    Raises:
      ValueError: if there is no such data set, or its splits do not fit; one line.
    """
    try:
        return _open_files(root, test_split)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"the images in {root} cannot be read: {reason(error)}; give a directory with train "
            "and another split: folders of classes, Parquet files, or array_record as "
            "tensorflow-datasets prepares it"
        ) from error


def _open_files(root: Path, test_split: str | None) -> Files:
    prepared = sorted(itertools.chain(*(root.glob(f"{'*/' * n}features.json") for n in range(3))))
    parquet = sorted((*root.glob("*.parquet"), *root.glob("data/*.parquet")))
    splits: dict[str, list[Path]]  # and their files
    if prepared:
        folder = max((file.parent for file in prepared), key=_version)
        names = {file.name.partition(".array_record")[0] for file in folder.glob("*.array_record*")}
        splits = {name.rpartition("-")[2]: [] for name in names}
        words = f"array_record files in {folder}"
    elif parquet:
        folder = root
        splits = {}
        for file in parquet:
            splits.setdefault(file.name.replace(".", "-").partition("-")[0], []).append(file)
        words = f"Parquet files in {root}"
    else:
        folder = root
        splits = {entry.name: [] for entry in os.scandir(root) if entry.is_dir()}
        words = f"image folders in {root}"

    names = TEST_SPLITS if test_split is None else (test_split,)
    test_name = next((name for name in names if name in splits), None)
    if "train" not in splits or test_name is None:
        raise ValueError(
            f"there are the splits {sorted(splits)}, not train and {' or '.join(names)}"
        )

    def source(name: str) -> Source:
        if prepared:
            return Prepared(folder, name)
        return Parquet(splits[name]) if parquet else Folder(folder / name)

    train, test = source("train"), source(test_name)
    if train.classes[: len(test.classes)] != test.classes or (
        not parquet and train.classes != test.classes
    ):
        raise ValueError(f"train has {len(train.classes)} classes, {test_name} others")
    return Files(train, test, f"{words}, reported on {test_name}")


def _version(folder: Path) -> list[int]:
    return [int(part) if part.isdecimal() else -1 for part in folder.name.split(".")]
