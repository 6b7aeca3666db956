"""The end of a contender that talks to `experiments.pipelines`; imports the standard library alone.

A contender runs in a process of its own, with the interpreter of its framework. It reads lines
`WARM COUNT`, and answers each with the seconds that COUNT batches took after WARM others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Work(NamedTuple):
    """What all contenders do: shuffle, read, decode, crop at random, resize, batch.

    Attributes:
      root: of the data set in one format.
      format: "folder", "parquet" or "array_record".
      batch: images.
      size: H and W of the result.
      workers: processes, 0 for threads.
      antialias: whether TensorFlow resizes with antialiasing, as Pillow always does.
    """

    root: Path
    format: str
    batch: int
    size: int
    workers: int
    antialias: bool


def work() -> Work:
    """The command line of a contender."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("format")
    for name in ("batch", "size", "workers", "antialias"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    return Work(**{**vars(given), "antialias": bool(given.antialias)})


def serve(begin: Callable[[], tuple[Iterator[Any], Callable[[], Any]]]) -> None:
    """Answers until the end of the input.

    Args:
      begin: a fresh iterator over batches, images `[B, H, W, C]` and labels, without end, and what
        ends it.
    """
    for line in sys.stdin:
        warm, count = map(int, line.split())
        batches, end = begin()
        for _ in range(warm):
            next(batches)
        began = time.perf_counter()
        for _ in range(count):
            images, _ = next(batches)
        seconds = time.perf_counter() - began
        kind = str(images.dtype).rpartition(".")[2]
        answer = {"seconds": seconds, "shape": list(images.shape), "dtype": kind}
        end()
        print("answer", json.dumps(answer), flush=True)


def labelled_files(root: Path) -> tuple[list[str], list[int]]:
    """The files of an image folder's training split, and their labels."""
    classes = sorted(path.name for path in (root / "train").iterdir())
    files = [str(f) for name in classes for f in sorted((root / "train" / name).iterdir())]
    return files, [classes.index(Path(f).parent.name) for f in files]
