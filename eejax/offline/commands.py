"""The command `eejax predict`."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from eejax.offline.answers import COLUMNS, FORMATS, Directory, Table, encode, record, table
from eejax.offline.inputs import Inputs, find
from eejax.offline.job import Part, answer, parts
from eejax.runtime import Manifest, Runtime, load

_PART = 4096
# Between lines of progress where there is no terminal.
_PAUSE = 30.0  # seconds


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command; `command(action, name, about)` makes a parser."""
    predict = command(
        _predict, "predict", "Predict images; a line for each, with its exit and confidence."
    )
    predict.add_argument("directory", metavar="DIR", help="an artifact")
    predict.add_argument(
        "images",
        metavar="IMAGES",
        help="a folder; an image; an .npy of uint8 [N, ...]; a .parquet or .array_record file; or "
        "a .txt that lists such files",
    )
    predict.add_argument("--format", choices=FORMATS, default="csv", help="csv by default")
    predict.add_argument("--to", metavar="FILE", help="where to write; by default to the terminal")
    predict.add_argument(
        "--parts",
        metavar="DIR",
        help="write a file for each part of the images here; the same command, interrupted, goes "
        "on after the last; with --to, all parts are joined in the end",
    )
    predict.add_argument(
        "--shard",
        metavar="K/N",
        help="do parts K, K + N, ... alone, K from 0: one of N jobs; needs --parts",
    )
    predict.add_argument(
        "--part-size",
        type=int,
        default=_PART,
        metavar="IMAGES",
        help=f"images in a part; {_PART} by default",
    )
    predict.add_argument("--column", help="of Parquet files, if several can hold images")
    predict.add_argument(
        "--thresholds",
        type=_numbers,
        metavar="T,...",
        help="instead of the artifact's, as in --thresholds=-inf,0.5; inf is one, too",
    )
    predict.add_argument("--threads", type=int, help="by default one for each core")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _shard(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d{1,9}/\d{1,9}", text):
        raise ValueError(f"shard {text}; give K/N, such as 0/4, with K from 0 to N - 1.")
    k, n = map(int, text.split("/"))
    return k, n


def _predict(arguments: argparse.Namespace) -> int:
    """0, or 1 if images could not be read."""
    shard = _shard(arguments.shard or "0/1")
    if arguments.shard and not arguments.parts:
        raise ValueError("--shard needs --parts, the directory that all shards write to.")
    if arguments.shard and arguments.to:
        raise ValueError("--to joins all parts; give it without --shard when all are done.")
    if arguments.format == "parquet" and (arguments.to or not arguments.parts):
        raise ValueError(
            "Parquet is written as --parts, which are read as one; leave out --to, or take csv."
        )
    runtime = load(arguments.directory, arguments.threads)
    job = _Job(
        runtime,
        find(arguments.images, runtime.manifest.image, arguments.column),
        runtime.thresholds(arguments.thresholds),
        arguments.format,
        _Counted(runtime.manifest),
    )
    todo = parts(job.inputs, arguments.part_size, shard)
    if arguments.parts is None:
        with _output(arguments.to) as file:
            for part, rows in job.tables(todo, todo):
                file.write(encode(rows, job.form, header=not part.number))
        return job.counted.said()
    images = Path(arguments.images).resolve()
    if job.form == "parquet" and Path(arguments.parts).resolve().is_relative_to(images):
        raise ValueError(f"--parts {arguments.parts} lies among the images; give another.")
    bound = record(runtime.manifest, job.thresholds, job.inputs, arguments.part_size, job.form)
    directory = Directory(arguments.parts, bound)
    _complete(job, directory, todo)
    if arguments.to:
        header = len(encode({name: [] for name in COLUMNS}, job.form))
        with _output(arguments.to) as file:
            for part in todo:
                file.write(directory.file(part).read_bytes()[header if part.number else 0 :])
    return job.counted.said()


class _Job(NamedTuple):
    """A network, its images, and the answers so far."""

    runtime: Runtime
    inputs: Inputs
    thresholds: np.ndarray
    form: str
    counted: _Counted

    def tables(self, todo: Iterable[Part], of: Sequence[Part]) -> Iterator[tuple[Part, Table]]:
        """The answers to parts, with progress among `of`; they count as soon as they are used."""
        progress = self.counted.progress(of)
        for part, told in answer(self.runtime, self.inputs, todo, self.thresholds, progress):
            rows = table(self.inputs, self.runtime.manifest.classes, part, told)
            yield part, rows
            self.counted.count(rows)


def _complete(job: _Job, directory: Directory, todo: Sequence[Part]) -> None:
    """Commits the parts that are missing, and looks at the others."""
    left = [part for part in todo if not directory.finished(part)]
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} of {len(todo)} parts are there", file=sys.stderr)
    # Asked again for each, in case another job does the same.
    missing = (part for part in left if not directory.finished(part))
    done = set()
    for part, rows in job.tables(missing, left):
        directory.commit(part, rows)
        done.add(part)
    for part in todo:
        if part not in done:
            job.counted.count(directory.read(part))


@contextlib.contextmanager
def _output(name: str | None) -> Iterator[BinaryIO]:
    if name is None:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    with open(name, "wb") as file:
        yield file


class _Counted:
    """What the answers of a job come to, and how far it is."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._exits = np.zeros(manifest.num_exits, int)
        self._errors = 0

    def count(self, rows: Table) -> None:
        """Counts the answers of a part."""
        taken = np.array([e for e in rows["exit"] if e is not None], int)
        self._exits += np.bincount(taken - 1, minlength=len(self._exits))
        self._errors += sum(error is not None for error in rows["error"])

    def progress(self, todo: Sequence[Part]) -> Callable[[int], None]:
        """A function that is told of images, and tells how many are left."""
        total, done, begin = sum(part.count for part in todo), 0, time.monotonic()
        shown = begin
        terminal = sys.stderr.isatty()

        def progress(images: int) -> None:
            nonlocal done, shown
            done += images
            now = time.monotonic()
            if now - shown < (0.2 if terminal else _PAUSE) and not (terminal and done == total):
                return
            shown, rate = now, done / max(now - begin, 1e-9)
            left = f"{(total - done) / rate:,.0f} s left"
            end = "\r" if terminal and done < total else "\n"
            print(
                f"{done:,} of {total:,} images, {rate:,.0f} a second, {left}",
                end=end,
                file=sys.stderr,
                flush=True,
            )

        return progress

    def said(self) -> int:
        """Says what it came to; returns the exit status."""
        answered = max(int(self._exits.sum()), 1)
        shares = ", ".join(f"{100 * n / answered:.0f}" for n in self._exits)
        mean = float((self._exits * np.arange(1, len(self._exits) + 1)).sum() / answered)
        cost = float((self._exits * self._manifest.costs).sum() / answered)
        images = int(self._exits.sum()) + self._errors
        print(
            f"exits {shares} % of {images:,} images, {mean:.2f} on average, {cost:.2f} of the cost",
            file=sys.stderr,
        )
        if self._errors:
            print(f"{self._errors:,} images could not be read", file=sys.stderr)
        return 1 if self._errors else 0
