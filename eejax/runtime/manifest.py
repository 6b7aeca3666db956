"""The manifest of an artifact: what is in the directory, and whether it is what was written.

Only the standard library and NumPy. Nothing in an artifact is unpickled, no path in it leaves the
directory, and every size is compared with a bound before anything is read. The hashes detect damage
and changes to a file; whoever can change the manifest too can change both, so compare the
manifest's own hash with one from elsewhere (`sha256` of `read`) where that matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = "eejax artifact"
VERSION = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 4 << 20  # bytes
LARGEST = 4 << 30  # bytes, of all files together
_SCORES, _CORRECT = "held_out/scores.bin", "held_out/correct.bin"
# A file's name, with or without a folder; so no path can leave the directory.
_NAME = re.compile(r"(?:[A-Za-z0-9_]+/)?[A-Za-z0-9_]+\.[a-z]+")


_NOT_READ = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError),
    *(OSError, RecursionError, OverflowError),
)


class HeldOut(NamedTuple):
    """What every exit made of the samples on which the thresholds were chosen.

    Attributes:
      scores: `[N, E]` float32, the policy's.
      correct: `[N, E]` bool, whether the exit's label was the sample's.
    """

    scores: np.ndarray
    correct: np.ndarray


# Compared by identity, since arrays have no truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """What an artifact holds.

    Attributes:
      directory: of the artifact.
      sha256: of the manifest's bytes.
      classes: the names of the C classes.
      image: `(height, width, channels)` of the uint8 images.
      thresholds: `[E - 1]` float32, which are used where no others are given.
      costs: `[E]`, the share of the whole network's multiply-accumulates that leaving at each exit
        costs.
      recorded: the number of recorded images.
      layers: what the artifact was exported with.
      content: everything, as JSON has it: also preprocessing, policy, certificate, metadata and
        versions.
    """

    directory: Path
    sha256: str
    classes: tuple[str, ...]
    image: tuple[int, int, int]
    thresholds: np.ndarray
    costs: np.ndarray
    recorded: int
    layers: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.costs)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the artifact's files beside the manifest."""
        return tuple(self.content["files"])

    def file(self, name: str) -> bytes:
        """The contents of a file, verified.

        Raises:
          ValueError: if the file is missing, not a plain file, or not what was written.
        """
        entry = self.content["files"].get(name)
        if entry is None:
            raise ValueError(f"{self.directory} holds no {name}; it was exported without it.")
        data = _plain_file(self.directory, name, entry["bytes"])
        if len(data) != entry["bytes"] or sha256(data) != entry["sha256"]:
            raise ValueError(f"{name} in {self.directory} is damaged: it is not what was written.")
        return data

    def held_out(self) -> HeldOut | None:
        """The held-out samples of the thresholds; None if the bundle had none.

        Raises:
          ValueError: if a file is damaged, or does not fit the other.
        """
        if _SCORES not in self.files:
            return None
        scores = np.frombuffer(self.file(_SCORES), "<f4")
        correct = np.frombuffer(self.file(_CORRECT), "u1")
        if scores.shape != correct.shape or len(scores) % self.num_exits or correct.max() > 1:
            raise ValueError(f"{_SCORES} and {_CORRECT} in {self.directory} do not fit each other.")
        shape = (-1, self.num_exits)
        return HeldOut(scores.reshape(shape), correct.reshape(shape).astype(bool))

    def part(self, name: str) -> Any:
        """A part of the content that a layer needs; ValueError if there is none."""
        if name not in self.content:
            raise ValueError(f"{self.directory} says nothing of its {name}.")
        return self.content[name]


def read(directory: str | Path) -> Manifest:
    """Reads and checks the manifest of an artifact; its files are verified when they are read.

    Args:
      directory: that `eejax.export` wrote.

    Raises:
      ValueError: if there is none, or it is damaged, or newer than this version; one line.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        raise ValueError(f"{directory} holds no {MANIFEST}; give a directory of `eejax export`.")
    try:
        data = _plain_file(directory, MANIFEST, LARGEST_MANIFEST)
        return _checked(directory, data, opened(data, MANIFEST, FORMAT, VERSION))
    # Deeply nested JSON ends in a RecursionError, a number too long for Python in a ValueError.
    except _NOT_READ as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise ValueError(f"the artifact in {directory} cannot be read: {reason}") from error


def held_out_files(held_out: HeldOut) -> dict[str, bytes]:
    """The files from which `Manifest.held_out` reads them."""
    return {
        _SCORES: held_out.scores.astype("<f4").tobytes(),
        _CORRECT: held_out.correct.astype("u1").tobytes(),
    }


def content_hash(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a content, whatever the order of its keys and the spaces between them."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode())


def sealed(content: Mapping[str, Any], kind: str, version: int) -> bytes:
    """A description with its kind, its version, and the hash of its content, for `opened`.

    Raises:
      TypeError, ValueError: if the content is not JSON.
    """
    whole = {"format": kind, "version": version, "content_sha256": content_hash(content)}
    return json.dumps({**whole, "content": content}, indent=1).encode()


def opened(data: bytes, name: str, kind: str, newest: int) -> dict[str, Any]:
    """The content that `sealed` wrote, of an artifact or of a bundle.

    Args:
      data: of the file.
      name: of the file, for messages.
      kind: that it must be.
      newest: version that can be read.

    Raises:
      ValueError: if it is damaged, of another kind, or newer; one line.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError(f"{name} is damaged: a name occurs twice.")
        return dict(pairs)

    def refuse(number: str) -> None:
        raise ValueError(f"{name} holds {number}, which JSON does not have.")

    try:
        whole = json.loads(data, object_pairs_hook=once, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if not isinstance(whole, dict) or whole.get("format") != kind:
        raise ValueError(f"{name} does not describe an {kind}.")
    version = whole.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"format version {version!r}; expected a whole number from 1.")
    if version > newest:
        raise ValueError(
            f"format version {version} is newer than {newest}, the newest that this eejax reads; "
            "update eejax."
        )
    content = whole.get("content")
    if not isinstance(content, dict) or content_hash(content) != whole.get("content_sha256"):
        raise ValueError(f"{name} is damaged: its content does not have its SHA-256.")
    if len(whole) != 4:
        raise ValueError(f"{name} has the fields {sorted(whole)}.")
    return content


def _checked(directory: Path, data: bytes, content: dict[str, Any]) -> Manifest:
    files, image = content["files"], content["image"]["shape"]
    for name, entry in files.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"a file is named {name!r}.")
        if type(entry["bytes"]) is not int or entry["bytes"] < 0:
            raise ValueError(f"{name} has {entry['bytes']} bytes.")
        if not isinstance(entry["sha256"], str):
            raise ValueError(f"{name} has the hash {entry['sha256']!r}.")
    total = sum(entry["bytes"] for entry in files.values())
    if total > LARGEST:
        raise ValueError(f"its files have {total:,} bytes; {LARGEST:,} are read at most.")
    if len(image) != 3 or not all(type(side) is int and 0 < side < 1 << 16 for side in image):
        raise ValueError(f"images are {image}; expected height, width and channels.")
    if content["image"]["dtype"] != "uint8":
        raise ValueError(f"images are {content['image']['dtype']}; expected uint8.")
    costs = np.asarray(content["costs"]["fractions"], np.float64)
    thresholds = np.asarray([float(t) for t in content["thresholds"]], np.float32)
    if costs.ndim != 1 or not len(costs) or thresholds.shape != (len(costs) - 1,):
        raise ValueError(f"{len(thresholds)} thresholds and {costs.shape} costs.")
    if np.isnan(thresholds).any() or not np.isfinite(costs).all():
        raise ValueError("thresholds or costs are not numbers.")
    classes = tuple(map(str, content["classes"]))
    image = (image[0], image[1], image[2])
    recorded = content["recorded"]
    if type(recorded) is not int or recorded < 1:
        raise ValueError(f"{recorded} recorded images.")
    digest = sha256(data)
    layers = tuple(map(str, content["layers"]))
    return Manifest(directory, digest, classes, image, thresholds, costs, recorded, layers, content)


def _plain_file(directory: Path, name: str, most: int) -> bytes:
    """The contents of a file of the directory, unless it is longer than `most` bytes."""
    path = directory / name
    for part in (*path.parents[: name.count("/")], path):
        if not os.path.lexists(part):
            raise ValueError(f"{name} is missing in {directory}.")
        if part.is_symlink():
            raise ValueError(
                f"{part.relative_to(directory)} is a link; expected it in {directory}."
            )
    try:
        with open(path, "rb", opener=_not_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{name} is not a file.")
            if found.st_size > most:
                raise ValueError(f"{name} has {found.st_size:,} bytes; expected {most:,} at most.")
            return file.read(found.st_size)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _not_waiting(path: str, flags: int) -> int:
    # A pipe in the place of a file would wait for someone to write.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def sha256(data: bytes) -> str:
    """The SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def number(value: float) -> float | str:
    """A threshold as JSON holds it: an infinite one as a word."""
    return float(value) if math.isfinite(value) else str(float(value))
