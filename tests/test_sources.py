"""Where images come from: the publishers' archives, prepared data, and the cache between runs.

No network and no real data: `made_data` makes archives, prepared files and a local server.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import warnings

import numpy as np
import pytest
from absl import logging as absl_logging
from made_data import (
    CLASSES,
    SEED,
    TEST,
    TRAIN,
    Site,
    batch,
    cifar10_files,
    cifar_tar,
    idx,
    prepare,
    python2_pickle,
    rows,
    some,
)

from experiments.data import formats, sources
from experiments.data import splits as data
from experiments.data.config import DataConfig, DatasetName
from experiments.data.sources import Archive


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No test sees this machine's data, cache, proxies, or what another test learnt."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    sources.unreachable.cache_clear()


def read(name, path):
    reader = data.SPECS[name].read
    assert reader is not None
    return reader([path])


def config(tmp_path, name: DatasetName = "cifar10", **change):
    settings = {"calibrate": 20, "choose": 30, "cache": tmp_path / "cache", **change}
    return DataConfig(name=name, **settings)


@pytest.fixture
def site(monkeypatch):
    """The publishers' sites, on the loopback, with CIFAR-10 on offer."""
    site = Site()
    site.files["cifar-10-python.tar.gz"] = cifar_tar(cifar10_files())
    offer(site, monkeypatch)
    yield site
    site.server.shutdown()
    site.server.server_close()


def offer(site, monkeypatch, name="cifar10"):
    """Points the specification of a data set at the site, with the checksums of what it serves."""
    spec = data.SPECS[name]
    moved = tuple(
        Archive(site.url + a.file, hashlib.md5(site.files[a.file]).hexdigest())
        for a in spec.archives
    )
    monkeypatch.setitem(data.SPECS, name, spec._replace(archives=moved))


# --- the archives --------------------------------------------------------------------------------


def test_cifar10_is_downloaded_verified_read_and_kept(site, tmp_path):
    c = config(tmp_path)
    assert data.resolve(c) == "cifar10"
    assert data.resolve(c) == "cifar10"
    assert [command for command, _ in site.asked] == ["HEAD"], "ask once, and do not download"
    ds = data.load(c, SEED)
    assert ds.name == "cifar10"
    assert ds.notice == ""
    assert ds.classes == CLASSES
    assert "cifar-10-python.tar.gz" in ds.source
    assert rows(ds.train, ds.calibrate, ds.choose) == rows(TRAIN)
    assert rows(ds.test) == rows(TEST)
    names = sorted(path.name for path in (tmp_path / "cache" / "cifar10").iterdir())
    assert names == ["cifar-10-python.tar.gz", "images.npz"], "a temporary file was left"
    # The second start needs neither the network nor the archive.
    site.asked.clear()
    (tmp_path / "cache" / "cifar10" / "cifar-10-python.tar.gz").unlink()
    again = data.load(c, SEED)
    np.testing.assert_array_equal(again.train.images, ds.train.images)
    assert again.source == ds.source
    assert site.asked == []


def test_cifar100_reads_the_fine_labels(tmp_path):
    names = [f"fine {i}" for i in range(100)]
    images, labels = some(120, 32, 32, 3)
    labels = np.arange(120, dtype=np.int32) % 100
    meta = python2_pickle({"fine_label_names": names, "coarse_label_names": ["coarse"]})
    files = {part: batch(images, labels, "fine_labels") for part in ("train", "test")}
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(cifar_tar({**files, "meta": meta}, "cifar-100-python"))
    decoded = read("cifar100", path)
    np.testing.assert_array_equal(decoded.train_images, images)
    np.testing.assert_array_equal(decoded.test_labels, labels)
    assert decoded.classes == tuple(names)
    assert decoded.test_labels.dtype == np.int32


def test_fashion_mnist_is_read_from_its_four_files(site, tmp_path, monkeypatch):
    train, test = some(60, 28, 28, seed=3), some(20, 28, 28, seed=4)
    for part, (images, labels) in {"train": train, "t10k": test}.items():
        site.files[f"{part}-images-idx3-ubyte.gz"] = idx(images)
        site.files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels)
    offer(site, monkeypatch, "fashion_mnist")
    ds = data.load(config(tmp_path, "fashion_mnist"), SEED)
    assert ds.test.images.shape == (20, 28, 28, 1)
    assert ds.test.labels.dtype == np.int32
    assert rows(ds.train, ds.calibrate, ds.choose) == rows(train)
    assert ds.classes[0] == "T-shirt/top"
    assert ds.classes[9] == "Ankle boot"


@pytest.mark.parametrize(("kind", "size"), [(8, 19), (8, 21), (9, 20)])
def test_idx_of_another_size_or_type_is_refused(tmp_path, kind, size):
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "labels.gz"
    labels.write_bytes(idx(np.zeros(5)))
    images.write_bytes(idx(np.zeros((5, 2, 2))))
    paths = [images, labels, images, labels]
    assert formats.read_idx(paths, classes=CLASSES).train_images.shape == (5, 2, 2, 1)
    head = bytes((0, 0, kind, 3)) + struct.pack(">3I", 5, 2, 2)
    images.write_bytes(gzip.compress(head + bytes(size)))
    with pytest.raises(ValueError, match=r"train-images.* is damaged or another file"):
        formats.read_idx(paths, classes=CLASSES)


def test_a_download_of_another_checksum_is_removed_and_said_so(site, tmp_path):
    site.files["cifar-10-python.tar.gz"] += b"?"
    with pytest.raises(ValueError, match=r"MD5 hash.*does not match.*Deleted") as caught:
        data.load(config(tmp_path), SEED)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "cifar10").iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(site, tmp_path):
    site.cut = 100
    with pytest.raises(ConnectionError, match="cannot download CIFAR-10") as caught:
        data.load(config(tmp_path), SEED)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "cifar10").iterdir()) == []


def test_a_corrupt_archive_on_disk_is_fetched_anew(site, tmp_path):
    folder = tmp_path / "cache" / "cifar10"
    folder.mkdir(parents=True)
    path = folder / "cifar-10-python.tar.gz"
    path.write_bytes(b"half an archive")
    with pytest.raises(ValueError, match="updates are disallowed"):
        data.load(config(tmp_path, download=False), SEED)
    assert site.asked == []
    assert rows(data.load(config(tmp_path), SEED).test) == rows(TEST)


def test_an_archive_put_into_the_cache_by_hand_needs_no_network(site, tmp_path):
    folder = tmp_path / "cache" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "cifar-10-python.tar.gz").write_bytes(site.files["cifar-10-python.tar.gz"])
    ds = data.load(config(tmp_path, download=False), SEED)
    assert rows(ds.test) == rows(TEST)
    assert site.asked == []


class Malice:
    """Makes a directory when it is unpickled by a reader that knows no better."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_calls_anything_is_refused(tmp_path, protocol):
    target = tmp_path / "ran"
    payload = pickle.dumps({"data": Malice(target), "labels": [0]}, protocol)
    pickle.loads(payload)
    target.rmdir()  # so it does run, where it may
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(cifar_tar(cifar10_files() | {"data_batch_3": payload}))
    with pytest.raises(ValueError, match=r"its pickle asks for \w+\.mkdir"):
        read("cifar10", path)
    assert not target.exists()


@pytest.mark.parametrize(
    "payload", [b"cnumpy\nload\n.", b"cbuiltins\neval\n.", b"]q.", b"", b"\x80"]
)
def test_other_pickles_are_refused_on_one_line(tmp_path, payload):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(cifar_tar(cifar10_files() | {"test_batch": payload}))
    with pytest.raises(ValueError, match="is damaged or another file") as caught:
        read("cifar10", path)
    assert "\n" not in str(caught.value)


def test_data_of_another_shape_are_refused(site, tmp_path, monkeypatch):
    files = cifar10_files() | {"batches.meta": python2_pickle({"label_names": ["one"]})}
    site.files["cifar-10-python.tar.gz"] = cifar_tar(files)
    offer(site, monkeypatch)
    with pytest.raises(ValueError, match=r"1 classes.*CIFAR-10 has"):
        data.load(config(tmp_path), SEED)
    assert not (tmp_path / "cache" / "cifar10" / "images.npz").exists()


# --- what tensorflow-datasets has prepared -------------------------------------------------------


def test_prepared_data_are_decoded_in_silence(tmp_path, caplog, monkeypatch):
    prepare(tmp_path / "elsewhere")
    calls = []
    read_prepared = formats.read_prepared

    def counted(folder):
        calls.append(folder)
        with formats.quiet_absl():
            absl_logging.warning("a remark of tensorflow-datasets")
        return read_prepared(folder)

    monkeypatch.setattr(formats, "read_prepared", counted)
    c = config(tmp_path, dir=tmp_path / "elsewhere", download=False)
    assert data.resolve(c) == "cifar10"
    ds = data.load(c, SEED)
    assert rows(ds.train, ds.calibrate, ds.choose) == rows(TRAIN)
    assert rows(ds.test) == rows(TEST)
    assert ds.classes == CLASSES
    assert "tensorflow-datasets, cifar10 3.0.2" in ds.source
    assert len(calls) == 1
    assert caplog.records == []
    absl_logging.warning("afterwards")
    assert len(caplog.records) == 1, "the silence ends"
    calls.clear()
    again = data.load(c, SEED)
    assert calls == [], "the second start decodes nothing"
    np.testing.assert_array_equal(again.train.images, ds.train.images)


def test_the_splits_do_not_depend_on_the_source(site, tmp_path, monkeypatch):
    prepare(tmp_path / "tfds")
    one = data.load(config(tmp_path, download=False), SEED)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    two = data.load(config(tmp_path, cache=tmp_path / "other"), SEED)
    assert one.source != two.source
    for name in ("train", "calibrate", "choose", "test"):
        for a, b in zip(getattr(one, name), getattr(two, name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_newest_complete_version_is_taken(tmp_path):
    prepare(tmp_path, version="3.0.9")
    newest = prepare(tmp_path, version="3.0.10")
    (tmp_path / "cifar10" / "3.0.11").mkdir()  # prepared as tfrecord, say
    (tmp_path / "cifar10" / "3.0.12.incompleteAB12").mkdir()
    assert {path.parent for path in formats.find_prepared(tmp_path, "cifar10")} == {newest}
    assert formats.find_prepared(tmp_path, "cifar100") == []


def test_a_truncated_prepared_file_is_an_error_of_one_line(tmp_path):
    folder = prepare(tmp_path / "tfds")
    path = folder / "cifar10-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        data.load(config(tmp_path), SEED)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the cache -----------------------------------------------------------------------------------


def test_changed_prepared_data_are_decoded_anew(tmp_path):
    folder = prepare(tmp_path / "tfds")
    data.load(config(tmp_path), SEED)
    kept = tmp_path / "cache" / "cifar10" / "images.npz"
    before = kept.stat().st_ino
    data.load(config(tmp_path), SEED)
    assert kept.stat().st_ino == before
    for path in folder.iterdir():
        os.utime(path, ns=(0, 0))
    data.load(config(tmp_path), SEED)
    assert kept.stat().st_ino != before


def test_a_named_directory_that_lacks_the_data_set_is_an_error(site, tmp_path):
    """Neither the cache of another directory nor a download stands in for it."""
    prepare(tmp_path / "tfds")
    assert data.load(config(tmp_path), SEED).name == "cifar10"
    (tmp_path / "empty").mkdir()
    c = config(tmp_path, dir=tmp_path / "empty")
    for attempt in (lambda: data.resolve(c), lambda: data.load(c, SEED)):
        with pytest.raises(FileNotFoundError, match=r"not prepared.*--data.dir") as caught:
            attempt()
        assert str(tmp_path / "empty" / "cifar10") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert data.resolve(config(tmp_path, "auto", dir=tmp_path / "empty")) == "digits"


def test_a_damaged_cache_is_said_removed_and_rebuilt(tmp_path):
    prepare(tmp_path / "tfds")
    good = data.load(config(tmp_path), SEED)
    kept = tmp_path / "cache" / "cifar10" / "images.npz"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one pixel
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be read .* decoded anew"):
        again = data.load(config(tmp_path), SEED)
    np.testing.assert_array_equal(again.train.images, good.train.images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(config(tmp_path), SEED)


def test_a_damaged_cache_without_a_source_does_not_stay_in_the_way(site, tmp_path):
    c = config(tmp_path, "auto", download=False)
    cifar = data.load(config(tmp_path), SEED)
    folder = tmp_path / "cache" / "cifar10"
    (folder / "cifar-10-python.tar.gz").unlink()
    assert data.load(c, SEED).name == cifar.name
    content = bytearray((folder / "images.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "images.npz").write_bytes(content)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(FileNotFoundError, match="switched off"),
    ):
        data.load(c, SEED)
    assert data.resolve(c) == "digits"


@pytest.mark.parametrize("from_archive", [False, True])
def test_a_cache_that_cannot_be_written_is_one_warning(site, tmp_path, from_archive):
    if not from_archive:
        prepare(tmp_path / "tfds")
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="cannot be kept in .*--data.cache") as caught:
        ds = data.load(config(tmp_path), SEED)
    # Protobuf may have its own, which the suite ignores.
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert rows(ds.test) == rows(TEST)
