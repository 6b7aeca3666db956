"""Which data set is used, and how it is cut into splits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import sources
from experiments.data import splits as data
from experiments.data.config import DataConfig
from experiments.data.sources import Archive

SEED = 3
DIGITS = DataConfig(name="digits", calibrate=150, choose=300)
SPLITS = ("train", "calibrate", "choose", "test")


@pytest.fixture(autouse=True)
def unplugged(tmp_path, monkeypatch):
    """A machine without data and without a network: nothing listens where archives should be."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "*")
    sources.unreachable.cache_clear()
    for name, spec in list(data.SPECS.items()):
        moved = tuple(Archive("http://127.0.0.1:9/" + a.file, a.md5) for a in spec.archives)
        monkeypatch.setitem(data.SPECS, name, spec._replace(archives=moved))


def rows(*splits):
    return sorted(
        (i.tobytes(), int(n)) for s in splits for i, n in zip(s.images, s.labels, strict=True)
    )


def resident(ds: data.Dataset) -> data.Split:
    """The training split, which is an array."""
    assert isinstance(ds.train, data.Split)
    return ds.train


# --- which data set ------------------------------------------------------------------------------


@pytest.mark.parametrize("download", [True, False])
def test_auto_without_cifar_is_digits_and_says_so(download):
    config = dataclasses.replace(DIGITS, name="auto", download=download)
    assert data.resolve(config) == "digits"
    ds = data.load(config, SEED)
    assert ds.name == "digits"
    assert "NOT on CIFAR-10" in ds.notice
    assert "digits" in ds.notice
    assert ("cannot be downloaded" if download else "--data.no-download") in ds.notice


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_named_data_set_is_never_replaced(name, tmp_path):
    config = dataclasses.replace(DIGITS, name=name, cache=tmp_path / "there")
    for attempt in (lambda: data.resolve(config), lambda: data.load(config, SEED)):
        with pytest.raises(FileNotFoundError) as caught:
            attempt()
        message = str(caught.value)
        assert "\n" not in message
        for said in (tmp_path / "tfds" / name, tmp_path / "there" / name, "http://", "--data.dir"):
            assert str(said) in message


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'mnist'; there are auto, files, cifar10, .*digits"):
        data.resolve(dataclasses.replace(DIGITS, name="mnist"))


def test_a_silent_network_is_given_up_quickly(monkeypatch):
    """A name server that does not answer: no timeout of a socket covers that."""
    answer = threading.Event()

    def look_up(*_, **__):
        answer.wait(10)
        raise OSError("unknown host")

    monkeypatch.setattr("requests.head", look_up)
    start = time.monotonic()
    reason = sources.unreachable("http://somewhere/file", timeout=0.1)
    assert reason == "no answer within 0.1 s"
    assert time.monotonic() - start < 5
    answer.set()


def test_the_default_directories_are_the_documented_ones(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data.resolve(DataConfig(name="cifar10", download=False))
    assert str(tmp_path / "tensorflow_datasets" / "cifar10") in str(caught.value)
    assert str(tmp_path / ".cache" / "eejax" / "cifar10") in str(caught.value)


def test_the_import_is_light():
    code = "import sys; from experiments.data import splits; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.split()
    assert not {"jax", "tensorflow_datasets", "sklearn", "absl", "PIL"} & set(loaded)


# --- the splits ----------------------------------------------------------------------------------


def test_digits_are_whole_and_in_range():
    ds = data.load(DIGITS, SEED)
    assert [len(getattr(ds, name).labels) for name in SPLITS] == [898, 150, 300, 449]
    assert len(rows(*(getattr(ds, name) for name in SPLITS))) == 1_797
    for name in SPLITS:
        split = getattr(ds, name)
        assert split.images.dtype == np.uint8
        assert split.images.shape[1:] == (8, 8, 1)
        assert split.labels.dtype == np.int32
    train = resident(ds)
    assert train.images.min() == 0
    assert train.images.max() == 255
    assert ds.classes == tuple("0123456789")
    assert ds.notice == ""
    assert "scikit-learn" in ds.source


def test_no_image_is_in_two_splits():
    from sklearn.datasets import load_digits

    ds = data.load(DIGITS, SEED)
    pixels, targets = load_digits(return_X_y=True)
    whole = data.Split(np.rint(pixels * 255 / 16).astype(np.uint8), np.asarray(targets))
    # As multisets: had one image been used twice, another one would be missing.
    assert rows(*(getattr(ds, name) for name in SPLITS)) == rows(whole)


def test_the_seed_decides_all_but_the_test_split():
    one, again, other = (data.load(DIGITS, seed) for seed in (SEED, SEED, SEED + 1))
    for name in SPLITS:
        np.testing.assert_array_equal(getattr(one, name).images, getattr(again, name).images)
    for name in SPLITS[:3]:
        assert rows(getattr(one, name)) != rows(getattr(other, name))
    np.testing.assert_array_equal(one.test.images, other.test.images)


def test_numpys_global_state_is_neither_used_nor_moved():
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    one = data.load(DIGITS, SEED)
    assert np.random.random() == expected  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(one.train.images, data.load(DIGITS, SEED).train.images)


def test_the_classes_are_in_proportion():
    ds = data.load(DIGITS, SEED)
    whole = np.bincount(np.concatenate([getattr(ds, name).labels for name in SPLITS]))
    for name in SPLITS[1:]:
        counts = np.bincount(getattr(ds, name).labels, minlength=10)
        assert np.all(np.abs(counts - counts.sum() * whole / whole.sum()) <= 1.5)
    assert np.any(np.diff(ds.choose.labels) < 0), "in random order, not class by class"


@settings(max_examples=60, deadline=None)
@given(draw=st.data())
def test_stratified_is_a_partition_in_proportion(draw):
    counts = draw.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    first = draw.draw(st.integers(0, len(labels)))
    second = draw.draw(st.integers(0, len(labels) - first))
    rng = np.random.Generator(np.random.PCG64(draw.draw(st.integers(0, 9))))
    groups = data.stratified(labels, (first, second), rng)
    assert [len(group) for group in groups] == [first, second, len(labels) - first - second]
    assert sorted(np.concatenate(groups)) == list(range(len(labels)))
    got = np.bincount(labels[groups[0]], minlength=len(counts))
    assert np.all(np.abs(got - first * np.asarray(counts) / sum(counts)) < 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate": 1_000, "choose": 4_000}, "digits has 1,348 training images"),
        ({"calibrate": 348, "choose": 1_000}, "leave nothing to train on"),
        ({"certify": 898}, "certify=898 leave nothing to train on"),
    ],
)
def test_impossible_sizes_are_said(change, message):
    with pytest.raises(ValueError, match=message):
        data.load(dataclasses.replace(DIGITS, **change), SEED)


def test_limit_keeps_that_many_training_images_and_the_other_splits():
    whole = data.load(DIGITS, SEED)
    some = data.load(dataclasses.replace(DIGITS, limit=100), SEED)
    assert len(resident(some).labels) == 100
    np.testing.assert_array_equal(some.train.images, whole.train.images[:100])
    np.testing.assert_array_equal(some.choose.images, whole.choose.images)
    assert some.mean != whole.mean
    more = data.load(dataclasses.replace(DIGITS, limit=10_000), SEED)
    assert len(resident(more).labels) == len(resident(whole).labels)


def test_a_certify_split_is_cut_from_the_training_images_alone():
    """What was held out before stays as it was, and what is left to train on keeps its order."""
    before = data.load(DIGITS, SEED)
    assert len(before.certify.labels) == 0, "none unless it is asked for"
    ds = data.load(dataclasses.replace(DIGITS, certify=250), SEED)
    for name in ("calibrate", "choose", "test"):
        for one, other in zip(getattr(ds, name), getattr(before, name), strict=True):
            np.testing.assert_array_equal(one, other)
    assert (len(resident(ds).labels), len(ds.certify.labels)) == (648, 250)
    assert rows(ds.train, ds.certify) == rows(before.train)
    left = iter(image.tobytes() for image in before.train.images)
    assert all(image.tobytes() in left for image in ds.train.images)
    shares = np.bincount(resident(before).labels) * 250 / 898
    assert np.all(np.abs(np.bincount(ds.certify.labels) - shares) <= 2)
    assert np.any(np.diff(ds.certify.labels) < 0), "in random order, not class by class"


def test_mean_and_std_are_those_of_the_training_images():
    ds = data.load(DIGITS, SEED)
    images = resident(ds).images
    np.testing.assert_allclose(ds.mean, images.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(ds.std, images.std(axis=(0, 1, 2)), rtol=1e-9)
    colour = np.random.default_rng(SEED).integers(0, 256, (1_500, 4, 4, 3), dtype=np.uint8)
    colour[..., 1] //= 2
    mean, std = data._moments(colour)
    np.testing.assert_allclose(mean, colour.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(std, colour.std(axis=(0, 1, 2)), rtol=1e-9)
