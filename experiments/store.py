"""The results of a comparison, which many processes on many machines read and write.

A result is a file or a directory under a name that says all it depends on. It is prepared under
another name, committed in one step, and never changed. If two processes prepare the same result,
the first to commit wins and the other's is removed. What one step means depends on where it is:

    POSIX    rename(2) replaces no directory that has files; link(2) replaces no file. Exactly one
             succeeds, and nobody sees half of a result.
    NFS      The same, on the server. Where the answer to a call is lost, the client may report a
             failure after a success; so a failure counts only if the result is not there. A client
             may remember for a minute that a name was not there; so `names` lists a directory and
             asks for no single name.
    buckets  There are no directories and no renames, but an object appears whole when its upload
             ends. S3 and Google Cloud Storage refuse an upload if the object is there, when they
             are asked to (fsspec: mode="create"). A directory is uploaded as one tar. With other
             stores fsspec may look first and upload then: two uploads at one moment both succeed,
             and the later one stays, which is as whole.

None of this is about machines that lose power: nothing is flushed to disk.

A bucket holds finished results alone. Each machine has a copy of those that it needs under
`workdir`, where trainings keep their checkpoints and append to their logs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

_TAKEN = errno.EEXIST, errno.ENOTEMPTY
_NO_LINKS = errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS


class Store(NamedTuple):
    """Where results are.

    Attributes:
      workdir: directory of this machine, or shared by all.
      bucket: URL that fsspec reads, such as s3://bucket/comparison, for machines that share no
        directory; None if `workdir` is all there is.
    """

    workdir: Path
    bucket: str | None = None


def names(store: Store, folder: str) -> set[str]:
    """The results that are committed in a folder, by their names there."""
    if store.bucket is None:
        place = store.workdir / folder
        found = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
    else:
        files, root = _bucket(store.bucket)
        try:
            listed = files.ls(f"{root}/{folder}", detail=False, refresh=True)
        except FileNotFoundError:
            listed = []
        found = {str(path).rsplit("/", 1)[-1].removesuffix(".tar") for path in listed}
    return {name for name in found if not name.startswith(".")}


def names_by_directory(store: Store, folder: str) -> dict[str, set[str]]:
    """The results in a folder, and for each what was committed in it if it is a directory."""
    if store.bucket is None:
        return {name: names(store, f"{folder}/{name}") for name in names(store, folder)}
    files, root = _bucket(store.bucket)
    found: dict[str, set[str]] = {}
    files.invalidate_cache()
    for path in files.find(f"{root}/{folder}"):
        name, _, file = str(path).removeprefix(f"{root}/{folder}/").partition("/")
        inside = found.setdefault(name.removesuffix(".tar"), set())
        if file:
            inside.add(file)
    return found


def commit(store: Store, prepared: Path, name: str) -> bool:
    """Makes a prepared file or directory the result of this name, unless there is one.

    Args:
      store: where to.
      prepared: in `workdir`, on the same file system; it is gone afterwards.
      name: path relative to the store.

    Returns:
      Whether it is this one that stays.
    """
    if store.bucket is not None and not _send(store.bucket, prepared, name):
        _remove(prepared)
        fetch(store, name)
        return False
    return _commit(prepared, store.workdir / name) or store.bucket is not None


@contextlib.contextmanager
def draft(store: Store, name: str) -> Iterator[Path]:
    """A name for a file to write, which is committed at the end, and removed after an exception."""
    temporary = _beside(store.workdir / name)
    try:
        yield temporary
        commit(store, temporary, name)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(store: Store, name: str) -> Path:
    """A committed result in `workdir`, downloaded from the bucket if it is not there yet.

    Raises:
      FileNotFoundError: if there is no such result.
    """
    target = store.workdir / name
    if store.bucket is None or target.exists():
        return target
    files, root = _bucket(store.bucket)
    copy = _beside(target)
    try:
        if files.exists(f"{root}/{name}.tar"):
            packed = _beside(target)
            try:
                files.get_file(f"{root}/{name}.tar", str(packed))
                with tarfile.open(packed) as archive:
                    archive.extractall(copy, filter="data")
            finally:
                packed.unlink(missing_ok=True)
        else:
            files.get_file(f"{root}/{name}", str(copy))
        _commit(copy, target)
    finally:
        _remove(copy)
    return target


def publish(store: Store, name: str) -> None:
    """Copies a file of `workdir` to the bucket in place of an older one; a report, not a result."""
    if store.bucket is not None:
        files, root = _bucket(store.bucket)
        files.put_file(str(store.workdir / name), f"{root}/{name}")


@contextlib.contextmanager
def claimed(place: Path) -> Iterator[Path]:
    """A directory to prepare `place` in, which no other process uses meanwhile.

    It is the one that an earlier process left when it was killed, if there is one, with what is in
    it: the kernel frees a lock when its process ends, also on NFS. While another process prepares
    the same result, it is a second directory; on a file system without locks it is always a new
    one. It is removed at the end unless it was committed; after an exception it stays.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        scratch = place.with_name(f".{place.name}.{number}.work")
        with _locked(scratch.with_suffix(".lock")) as state:
            if state == "taken":
                continue
            if state == "no locks":
                scratch = _beside(place).with_suffix(".work")
            scratch.mkdir(exist_ok=True)
            yield scratch
            _remove(scratch)
            return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Literal["mine", "taken", "no locks"]]:
    """Holds a lock, whose file is removed at the end."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield "taken"
                return
            except OSError:
                yield "no locks"
                return
            if not _is(file.fileno(), path):
                continue  # who held it removed the file meanwhile
            try:
                yield "mine"
            finally:
                path.unlink(missing_ok=True)
            return


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _commit(prepared: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    won = True
    try:
        if prepared.is_dir():
            os.rename(prepared, target)
        else:
            os.link(prepared, target)
    except OSError as error:
        if error.errno in _NO_LINKS and prepared.is_file():
            os.replace(prepared, target)  # without links the last one wins
        elif error.errno in (*_TAKEN, errno.ENOENT) and target.exists():
            # The answer to a call that succeeded may have been lost.
            won = not prepared.exists() or os.path.samefile(prepared, target)
        else:
            raise
    _remove(prepared)
    return won


def _send(bucket: str, prepared: Path, name: str) -> bool:
    files, root = _bucket(bucket)
    try:
        if not prepared.is_dir():
            files.put_file(str(prepared), f"{root}/{name}", mode="create")
            return True
        packed = _beside(prepared)
        try:
            with tarfile.open(packed, "w") as archive:
                archive.add(prepared, arcname=".")
            files.put_file(str(packed), f"{root}/{name}.tar", mode="create")
        finally:
            packed.unlink(missing_ok=True)
    except FileExistsError:
        return False
    return True


def _bucket(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
      ImportError: if the package for this kind of URL is missing; the message names it.
    """
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)
    return files, root.rstrip("/")


def _beside(path: Path) -> Path:
    """A name that nobody else has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
