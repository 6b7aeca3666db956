"""Answers as files: how they are written, and a directory of parts that are committed one by one.

A part is written under another name, synced, and renamed, so a file of answers is whole or not
there. A record beside the parts binds them to the artifact, its thresholds and the images; a job
that differs in any of them is refused, and so are two such jobs that start at the same time.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eejax.offline.inputs import Inputs, kind
from eejax.offline.job import Answers, Part
from eejax.runtime import Manifest
from eejax.runtime.manifest import number, opened, sealed

FORMATS = ("csv", "jsonl", "parquet")
COLUMNS = ("image", "row", "label", "class", "exit", "confidence", "error")
# An underscore, so that readers of a directory of Parquet pass it over.
RECORD = "_job.json"
_KIND, _VERSION, _LARGEST = "eejax job", 1, 1 << 20
# A file under its temporary name that is older is nobody's.
_STALE = 3600  # seconds

# The columns of a table, each a list with None where there is nothing.
Table = dict[str, list[Any]]


def table(inputs: Inputs, classes: Sequence[str], part: Part, answers: Answers) -> Table:
    """The answers to a part, a row for each image; `COLUMNS` are its columns.

    `image` is the file and `row` the row in it, which is None for an image file. Exits are
    1-based.
    """
    images, rows = [], []
    for file, start, stop in inputs.ranges(part.first, part.count):
        single = kind(inputs.names[file]) == "image"
        # Names that are not UTF-8 can stand in no file of answers.
        name = inputs.names[file].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        images += [name.replace(os.sep, "/")] * (stop - start)
        rows += [None] if single else range(start, stop)

    def answered(values: np.ndarray) -> list[Any]:
        pairs = zip(values.tolist(), answers.readable.tolist(), strict=True)
        return [value if readable else None for value, readable in pairs]

    labels = answered(answers.labels)
    return {
        "image": images,
        "row": rows,
        "label": labels,
        "class": [None if label is None else classes[label] for label in labels],
        "exit": answered(answers.exits + 1),
        "confidence": answered(answers.confidences.astype(np.float64).round(6)),
        "error": [answers.errors.get(i) for i in range(part.count)],
    }


def encode(table: Table, form: str, header: bool = True) -> bytes:
    """A table as a file of answers; `header` is that of CSV."""
    if form == "parquet":
        pa, parquet = _pyarrow()
        types = (pa.string(), *(pa.int64(), pa.int32()), pa.string(), pa.int32())
        schema = pa.schema(list(zip(COLUMNS, (*types, pa.float64(), pa.string()), strict=True)))
        sink = io.BytesIO()
        parquet.write_table(pa.table(table, schema=schema), sink)
        return sink.getvalue()
    text = io.StringIO(newline="")
    rows = zip(*(table[name] for name in COLUMNS), strict=True)
    if form == "csv":
        writer = csv.writer(text, lineterminator="\n")
        if header:
            writer.writerow(COLUMNS)
        writer.writerows(rows)
    else:
        text.writelines(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows)
    return text.getvalue().encode()


def decode(data: bytes, form: str) -> Table:
    """The table of a file of answers.

    Raises:
      ValueError: if it is no such file.
    """
    if form == "parquet":
        pa, parquet = _pyarrow()
        return parquet.read_table(pa.BufferReader(data)).to_pydict()
    text = io.StringIO(data.decode(), newline="")
    if form == "jsonl":
        rows = [json.loads(line) for line in text]
        return {name: [row[name] for row in rows] for name in COLUMNS}
    rows = list(csv.reader(text))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError("it does not have the columns of answers.")
    columns = [[value or None for value in column] for column in zip(*rows[1:], strict=True)]
    found: Table = dict(zip(COLUMNS, columns or [[] for _ in COLUMNS], strict=True))
    for name, of in (("row", int), ("label", int), ("exit", int), ("confidence", float)):
        found[name] = [None if value is None else of(value) for value in found[name]]
    return found


def _pyarrow() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--format parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow, parquet


def record(manifest: Manifest, thresholds: np.ndarray, inputs: Inputs, size: int, form: str) -> Any:
    """What answers depend on, as JSON."""
    return {
        "artifact": manifest.sha256,
        "thresholds": [number(threshold) for threshold in thresholds.tolist()],
        "images": inputs.total,
        "files": len(inputs.names),
        "inputs": inputs.sha256,
        "column": inputs.column,
        "part size": size,
        "format": form,
    }


class Directory:
    """A directory of parts.

    Attributes:
      path: of the directory.
      form: of its files.
    """

    def __init__(self, path: str | Path, record: Mapping[str, Any]) -> None:
        """Makes it, or opens it again.

        Raises:
          ValueError: if it holds the answers of another job; one line says what differs.
        """
        self.path, self.form = Path(path), str(record["format"])
        count = -(-record["images"] // record["part size"])
        self._digits = max(5, len(str(count - 1)))
        self.path.mkdir(parents=True, exist_ok=True)
        self._bind(record)
        for left in self.path.glob(".*.new"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()

    def _bind(self, record: Mapping[str, Any]) -> None:
        place = self.path / RECORD
        if not place.exists():
            strange = sorted(p.name for p in self.path.glob("part-*"))
            if strange and not place.exists():
                raise ValueError(f"{self.path} holds {strange[0]} without {RECORD}; give another.")
            written = self._written(RECORD, sealed(record, _KIND, _VERSION))
            try:
                # Unlike a rename, this fails if another job was first.
                os.link(written, place)
            except FileExistsError:
                pass
            finally:
                written.unlink()
        if place.stat().st_size > _LARGEST:
            raise ValueError(f"{place} is no record of a job.")
        found = opened(place.read_bytes(), str(place), _KIND, _VERSION)
        for name in sorted(record.keys() | found.keys()):
            if record.get(name) != found.get(name):
                raise ValueError(
                    f"{self.path} holds answers of another job: {name} {found.get(name)}, and here "
                    f"{record.get(name)}. Give another directory."
                )

    def file(self, part: Part) -> Path:
        """Of a part."""
        return self.path / f"part-{part.number:0{self._digits}}.{self.form}"

    def finished(self, part: Part) -> bool:
        """Whether a part is there."""
        return self.file(part).exists()

    def commit(self, part: Part, table: Table) -> None:
        """Writes a part; it is whole, and on the disk, when it has its name."""
        place = self.file(part)
        os.replace(self._written(place.name, encode(table, self.form)), place)
        self._sync()

    def read(self, part: Part) -> Table:
        """A finished part.

        Raises:
          ValueError: if it is not what was committed.
        """
        place = self.file(part)
        try:
            found = decode(place.read_bytes(), self.form)
            rows = len(found["image"])
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{place} is damaged: {reason}; remove it to have it anew.") from error
        if rows != part.count:
            raise ValueError(
                f"{place} has {rows} rows and not {part.count}; remove it to have it anew."
            )
        return found

    def _written(self, name: str, data: bytes) -> Path:
        """A new file beside the one that it will become."""
        place = self.path / f".{name}.{secrets.token_hex(8)}.new"
        with open(place, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return place

    def _sync(self) -> None:
        # The name is in the directory, which Windows cannot sync.
        if hasattr(os, "O_DIRECTORY"):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
