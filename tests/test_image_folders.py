"""CINIC-10: an archive of folders of PNGs, made here in its layout."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
from made_data import SEED, rows, some
from PIL import Image

from experiments.data import formats, sources
from experiments.data import splits as data
from experiments.data.config import DataConfig

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def archive(parts, root="./"):
    """The bytes of a `.tar.gz` with `{split: (images, labels)}`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(root + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        add("README.md", b"no image")
        for split, (images, labels) in parts.items():
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                add(f"{split}/{NAMES[label]}/{i}.png", png.getvalue())
                add(f"{split}/{NAMES[label]}/._{i}.png", b"of another system")
    return stream.getvalue()


@pytest.mark.parametrize("root", ["", "./", "CINIC-10/"])
def test_images_are_read_by_split_and_class(tmp_path, root):
    train, valid, test = (some(20, 32, 32, 3, seed=seed) for seed in (1, 2, 3))
    path = tmp_path / "CINIC-10.tar.gz"
    path.write_bytes(archive({"train": train, "valid": valid, "test": test}, root))
    decoded = formats.read_image_folders([path])
    assert decoded.classes == NAMES
    assert decoded.train_labels.dtype == np.int32
    assert rows((decoded.train_images, decoded.train_labels)) == rows(train)
    assert rows((decoded.test_images, decoded.test_labels)) == rows(test)


def test_grey_images_become_colour(tmp_path):
    grey, labels = some(10, 32, 32, seed=5)
    path = tmp_path / "CINIC-10.tar.gz"
    path.write_bytes(archive({"train": (grey, labels), "test": (grey, labels)}))
    decoded = formats.read_image_folders([path])
    np.testing.assert_array_equal(decoded.train_images, np.repeat(grey[..., None], 3, axis=-1))


def test_cinic10_is_a_data_set_like_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    train, test = some(60, 32, 32, 3, seed=1), some(20, 32, 32, 3, seed=3)
    content = archive({"train": train, "test": test})
    folder = tmp_path / "cache" / "cinic10"
    folder.mkdir(parents=True)
    (folder / "CINIC-10.tar.gz").write_bytes(content)
    (kept,) = sources.SPECS["cinic10"].archives
    moved = kept._replace(md5=hashlib.md5(content).hexdigest())
    spec = sources.SPECS["cinic10"]._replace(archives=(moved,))
    monkeypatch.setitem(sources.SPECS, "cinic10", spec)
    config = DataConfig(
        name="cinic10", cache=tmp_path / "cache", download=False, calibrate=10, choose=10
    )
    ds = data.load(config, SEED)
    assert rows(ds.train, ds.calibrate, ds.choose) == rows(train)
    assert rows(ds.test) == rows(test)
    assert ds.classes == NAMES


def test_another_archive_is_refused_on_one_line(tmp_path):
    images, labels = some(10, 32, 32, 3)
    path = tmp_path / "CINIC-10.tar.gz"
    few = archive({"train": (images, labels), "test": (images[:3], labels[:3])})
    whole = archive({"train": (images, labels), "test": (images, labels)})
    for content in (b"no archive", few, archive({"train": (images, labels)}), whole[:2000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or another file") as caught:
            formats.read_image_folders([path])
        assert "\n" not in str(caught.value)
