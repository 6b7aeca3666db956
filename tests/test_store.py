"""Results that many processes prepare: each is committed once and whole, whoever comes second."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from experiments import store as stores
from experiments.store import Store, claimed, commit, draft, fetch, names, publish

ROOT = Path(__file__).resolve().parent.parent


def directory(store, name, words):
    place = store.workdir / f".{words}"
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "words").write_text(words)
    return commit(store, place, name)


def file(store, name, words):
    place = store.workdir / f".{words}"
    place.write_text(words)
    return commit(store, place, name)


def committed(store, name):
    found = fetch(store, name)
    return (found / "deep" / "words" if found.is_dir() else found).read_text()


@pytest.fixture(params=["directory", "bucket"])
def two(request, tmp_path):
    """The same results as two machines see them."""
    if request.param == "directory":
        yield Store(tmp_path), Store(tmp_path)
        return
    files = fsspec.filesystem("memory")
    for name in "ab":
        (tmp_path / name).mkdir()
    yield Store(tmp_path / "a", "memory://results"), Store(tmp_path / "b", "memory://results")
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("prepare", [directory, file])
def test_the_first_to_commit_wins(two, prepare):
    first, second = two
    assert names(first, "cells") == set()
    assert prepare(first, "cells/one", "first")
    assert not prepare(second, "cells/one", "second")
    assert committed(first, "cells/one") == committed(second, "cells/one") == "first"
    assert names(first, "cells") == names(second, "cells") == {"one"}
    # Nothing is left of the second.
    assert not (second.workdir / ".second").exists()


def test_a_result_beside_a_directory_is_one_of_its_files(two):
    first, second = two
    directory(first, "cells/one", "first")
    file(first, "cells/one/more", "more")
    fetch(second, "cells/one")
    assert "more" in names(second, "cells/one")
    assert fetch(second, "cells/one/more").read_text() == "more"
    assert names(second, "cells") == {"one"}


def test_what_is_not_there_is_said_so(two):
    with pytest.raises(FileNotFoundError):
        fetch(two[1], "cells/one").read_text()


def test_a_draft_that_fails_leaves_nothing(two):
    first, second = two

    def fail():
        with draft(first, "cells/one") as path:
            path.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(second, "cells") == set()
    assert not list((first.workdir / "cells").iterdir())
    with draft(first, "cells/one") as path:
        path.write_text("whole")
    assert committed(second, "cells/one") == "whole"


def test_reports_are_replaced(two):
    first, second = two
    for words in ("old", "new"):
        (first.workdir / "report").write_text(words)
        publish(first, "report")
    assert fetch(second, "report").read_text() == "new"


@pytest.mark.parametrize("prepare", [directory, file])
def test_of_many_at_once_exactly_one_wins(tmp_path, prepare):
    """Threads, whose system calls are as those of processes."""
    store, wins = Store(tmp_path), []
    together = threading.Barrier(16)

    def race(number):
        words = f"{number}"
        prepared = tmp_path / f".{words}"
        if prepare is directory:
            (prepared / "deep").mkdir(parents=True)
            (prepared / "deep" / "words").write_text(words)
        else:
            prepared.write_text(words)
        together.wait()
        if commit(store, prepared, "cells/one"):
            wins.append(words)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert committed(store, "cells/one") == wins[0]
    assert {path.name for path in tmp_path.iterdir()} == {"cells"}


def test_a_file_system_without_links_has_whole_files(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path)
    file(store, "one", "first")
    file(store, "one", "second")
    assert committed(store, "one") == "second"


def test_an_answer_that_is_lost_is_no_failure(tmp_path, monkeypatch):
    """As on NFS, where a call is repeated that had succeeded."""
    rename, link = os.rename, os.link

    def twice(call):
        def repeated(*args):
            call(*args)
            call(*args)

        return repeated

    monkeypatch.setattr(os, "rename", twice(rename))
    monkeypatch.setattr(os, "link", twice(link))
    store = Store(tmp_path)
    assert directory(store, "one", "first")
    assert file(store, "two", "first")
    assert not file(store, "two", "second")
    assert committed(store, "one") == committed(store, "two") == "first"


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        file(Store(tmp_path), "one", "first")


def test_two_that_prepare_the_same_do_not_meet(tmp_path):
    place = tmp_path / "cells" / "one"
    with claimed(place) as first, claimed(place) as second:
        assert first != second
        (first / "words").write_text("first")
        (second / "words").write_text("second")
        assert commit(Store(tmp_path), first, "cells/one")
        assert not commit(Store(tmp_path), second, "cells/one")
    assert (place / "words").read_text() == "first"
    assert list(place.parent.iterdir()) == [place]


def test_a_process_that_is_killed_leaves_its_work_to_the_next(tmp_path):
    place = tmp_path / "cells" / "one"
    code = (
        "import os, pathlib, signal, sys\n"
        "from experiments.store import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'checkpoint').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(place)], cwd=ROOT, timeout=60)
    assert ended.returncode == -9
    assert not place.exists()
    with claimed(place) as scratch:
        assert (scratch / "checkpoint").read_text() == "half"
        with claimed(place) as other:
            assert not list(other.iterdir())
    assert not list(place.parent.iterdir())


def test_an_exception_keeps_the_work(tmp_path):
    place = tmp_path / "one"

    def fail():
        with claimed(place) as scratch:
            (scratch / "checkpoint").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with claimed(place) as scratch:
        assert (scratch / "checkpoint").exists()


def test_without_locks_each_has_a_directory_of_its_own(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(stores.fcntl, "flock", refuse)
    place = tmp_path / "one"
    with claimed(place) as first, claimed(place) as second:
        assert first != second
        assert commit(Store(tmp_path), first, "one")
    assert place.is_dir()
