"""Images in files: formats, decoding, splits, and the order in which they are streamed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.data import decoding, held_out, splits, streaming
from experiments.data.config import DataConfig
from experiments.data.decoding import Decoder
from experiments.data.opening import open_files
from experiments.data.parquet import Parquet, WindowOrder
from experiments.data.records import Arrays, RecordError
from experiments.data.streaming import Chunks, Streamed
from experiments.pipelines.making import CLASSES, FORMATS, make

BATCH = 8
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """44 training images and 10 others, in each format."""
    place = tmp_path_factory.mktemp("files")
    make(place, 44, seed=3, width=40, height=36)
    return place


def config(place, **change):
    values = {"calibrate": 4, "choose": 6, "image_size": 16, "crop": "random", **change}
    return DataConfig(name="files", dir=place, **values)


def encoded(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def arrays(n=29, size=4):
    """Images whose first pixel is their number."""
    images = np.zeros((n, size, size, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return Streamed(Arrays(images, np.arange(n) % 3, ("a", "b", "c")), np.arange(n), None)


def chunks(images, batch=BATCH, seed=0, mine=None, size=2):
    return Chunks(images, batch, tuple(range(batch)) if mine is None else mine, size, seed)


def batches(of, start, stop, *, threads=2, workers=0):
    """Images `[steps, b, ...]` and labels of some steps."""
    iterator = streaming.stream(of, start, stop, threads=threads, workers=workers, ahead=2)
    images = np.zeros((stop - start, len(of.mine), *of.images.shape[1:]), np.uint8)
    labels = np.zeros(images.shape[:2], np.int32)
    for i in range(stop - start):
        streaming.fill(iterator, of, images[i], labels[i])
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.close()
    return images, labels


# Formats.


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_images_and_classes(root, kind):
    files, folder = open_files(root / kind), open_files(root / "folder")
    assert files.train.classes == CLASSES
    for split, count in ((files.train, 44), (files.test, 10)):
        assert len(split) == count

    def content(source):
        return sorted((r.image, r.label) for r in source.read(range(len(source))))

    assert content(files.train) == content(folder.train)
    assert content(files.test) == content(folder.test)
    # In any order, and more than once.
    assert files.train.read([5, 3, 5])[0] == files.train.read([5])[0]


def test_parquet_holds_arrays_and_bare_files_as_well(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    for split, images in (
        ("train", pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))),
        ("test", pa.array([encoded(p) for p in pixels])),
    ):
        table = pa.table({"image": images, "label": list(range(6))})
        pq.write_table(table, tmp_path / f"{split}-0.parquet", row_group_size=4)
    files = open_files(tmp_path)
    assert files.train.classes == tuple("012345")
    assert np.asarray(files.train.groups).tolist() == [0, 0, 0, 0, 1, 1]
    for i in (5, 0, 4):
        np.testing.assert_array_equal(files.train.read([i])[0].image, pixels[i])
        decoded = Decoder(5, "whole")(files.test.read([i])[0].image)
        assert decoded.shape == (5, 5, 3)


def test_a_parquet_source_keeps_few_row_groups(root):
    import pyarrow.parquet as pq

    table = pq.read_table(root / "parquet" / "train-00000-of-00001.parquet")
    place = root / "small.parquet"
    pq.write_table(table, place, row_group_size=4)
    source = Parquet([place], keep=2)
    first = [record.image for record in source.read(range(44))]
    assert len(source._kept) == 2
    assert [record.image for record in source.read(range(44))] == first
    place.unlink()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda place: None, "there are the splits"),
        (lambda place: (place / "train" / "a").mkdir(parents=True), "there are the splits"),
        (
            lambda place: [(place / s / "a").mkdir(parents=True) for s in ("train", "val")],
            "has no image",
        ),
        (lambda place: (place / "features.json").write_text("{}"), "cannot be read"),
        (lambda place: (place / "train-0.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, build, words):
    build(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        open_files(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


# Decoding.


def test_crops_are_the_whole_the_centre_or_a_random_part():
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    np.testing.assert_array_equal(Decoder(32, "whole")(encoded(pixels)), pixels)
    np.testing.assert_array_equal(Decoder(28, "centre")(encoded(pixels)), pixels[2:30, 2:30])
    np.testing.assert_array_equal(Decoder(28, "centre")(pixels), pixels[2:30, 2:30])
    # Without a generator, as in evaluation, a random crop is the centre.
    np.testing.assert_array_equal(Decoder(28, "random")(encoded(pixels)), pixels[2:30, 2:30])
    some = [Decoder(28, "random")(pixels, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(some[0], some[1])
    assert (some[0] != some[2]).any()


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2**32 - 1))
def test_boxes_lie_in_the_image(width, height, seed):
    random = np.random.default_rng(seed)
    for box in (decoding.central_box(width, height), decoding.random_box(width, height, random)):
        left, upper, right, lower = box
        assert 0 <= left < right <= width + 1e-6
        assert 0 <= upper < lower <= height + 1e-6


def test_a_large_jpeg_is_decoded_smaller_with_nearly_the_same_pixels(monkeypatch):
    patches = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    large = np.asarray(Image.fromarray(patches).resize((512, 512), Image.Resampling.BICUBIC))
    sizes = []
    original = Image.Image.convert

    def convert(self, mode):
        sizes.append(self.size)
        return original(self, mode)

    monkeypatch.setattr(Image.Image, "convert", convert)
    found = Decoder(64, "whole")(encoded(large, "jpeg"))
    assert sizes[0] == (64, 64)
    exact = Decoder(64, "whole")(large)
    assert np.abs(found.astype(int) - exact).mean() < 3


def test_grey_and_transparent_images_become_rgb_and_damage_is_an_error():
    grey = np.full((9, 9), 7, np.uint8)
    np.testing.assert_array_equal(Decoder(4, "whole")(encoded(grey)), np.full((4, 4, 3), 7))
    assert Decoder(4, "centre")(encoded(np.zeros((9, 9, 4), np.uint8))).shape == (4, 4, 3)
    assert Decoder(4, "whole")(grey[..., None]).shape == (4, 4, 3)
    whole = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "jpeg")
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="cannot be decoded"):
            Decoder(4, "whole")(content)


# Splits.


@pytest.mark.parametrize("kind", FORMATS)
def test_splits_are_disjoint_and_decoded_once(root, tmp_path, kind, monkeypatch):
    asked = config(root / kind, cache=tmp_path, certify=3)
    data = splits.load(asked, 0)
    assert [len(s.images) for s in (data.train, data.calibrate, data.choose, data.certify)] == [
        *(31, 4, 6, 3)
    ]
    everything = [np.asarray(data.train.images[:])]
    everything += [s.images for s in (data.calibrate, data.choose, data.certify)]
    whole = Streamed(open_files(root / kind).train, np.arange(44), Decoder(16, "centre"))[:]
    together = np.concatenate(everything)
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole))
    assert data.test.images.shape == (10, 16, 16, 3)
    assert sorted(data.test.labels) == list(range(10))
    assert 60 < min(data.mean) < max(data.mean) < 195
    # A second start decodes the training sample alone, and a seed draws the other splits only.
    monkeypatch.setattr(held_out, "decode_all", None)
    again = splits.load(asked, 0)
    np.testing.assert_array_equal(again.choose.images, data.choose.images)
    monkeypatch.undo()
    other = splits.load(asked, 1)
    assert (other.choose.images != data.choose.images).any()
    np.testing.assert_array_equal(other.test.images, data.test.images)


def test_a_file_that_changed_is_decoded_again(root, tmp_path):
    make(tmp_path / "own", 12, seed=0, width=20, height=20)
    asked = config(tmp_path / "own" / "folder", cache=tmp_path / "cache", calibrate=1, choose=1)
    before = splits.load(asked, 0).test
    for file in (tmp_path / "own" / "folder" / "val" / "class0").iterdir():
        file.write_bytes(encoded(np.zeros((30, 30, 3), np.uint8), "jpeg"))
    after = splits.load(asked, 0).test
    assert before.images[before.labels == 0].any()
    assert not after.images[after.labels == 0].any()


def test_size_and_crop_decide_whether_images_are_streamed(root, tmp_path):
    def kind(**change):
        return type(splits.load(config(root / "folder", cache=tmp_path, **change), 0).train)

    assert kind() is splits.StreamedSplit
    assert kind(feed="resident") is splits.Split
    assert kind(crop="centre") is splits.Split
    assert kind(crop="centre", memory=34 * 16 * 16 * 3 / 2**30) is splits.Split
    assert kind(crop="centre", memory=33 * 16 * 16 * 3 / 2**30) is splits.StreamedSplit


def test_a_damaged_image_is_named(root, tmp_path):
    make(tmp_path, 12, seed=0, width=20, height=20)
    (file,) = (tmp_path / "folder" / "val" / "class3").iterdir()
    file.write_bytes(b"no image")
    with pytest.raises(RecordError, match=str(file)):
        splits.load(config(tmp_path / "folder", cache=tmp_path, calibrate=1, choose=1), 0)


# The order, and who reads what.


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    of = chunks(arrays(n=32))
    images, labels = batches(of, 0, 8)
    numbers = images[..., 0, 0, 0]
    np.testing.assert_array_equal(labels, numbers % 3)
    for epoch in (numbers[:4], numbers[4:]):
        assert sorted(epoch.ravel()) == list(range(32))
    assert (numbers[:4] != numbers[4:]).any()
    other, _ = batches(chunks(arrays(n=32), seed=1), 0, 4)
    assert (other != images[:4]).any()


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 4)), st.integers(0, 9))
def test_samples_of_a_step_depend_on_seed_and_step_alone(seed, hosts, start):
    """Whatever the hosts, chunks, threads, and the step at which a run begins."""
    source = arrays()
    whole, _ = batches(chunks(source, seed=seed), 0, 10)
    share = BATCH // hosts
    parts = []
    for host in range(hosts):
        mine = tuple(range(host * share, (host + 1) * share))
        of = chunks(source, seed=seed, mine=mine, size=streaming.chunk_size(share))
        parts.append(batches(of, start, 10, threads=1 + host)[0])
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole[start:])


def test_random_crops_depend_on_seed_and_step_alone(root, tmp_path):
    images = splits.load(config(root / "folder", cache=tmp_path), 0).train.images
    whole, _ = batches(chunks(images, seed=5), 0, 8)
    second, _ = batches(chunks(images, seed=5, mine=(4, 5, 6, 7), size=1), 3, 8, threads=3)
    np.testing.assert_array_equal(second, whole[3:, 4:])
    # Other crops in another epoch.
    assert not {bytes(x) for x in whole[:4].reshape(32, -1)} & {
        bytes(x) for x in whole[4:].reshape(32, -1)
    }


class Counting(Arrays):
    """Notes what is read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rows = []

    def read(self, rows):
        self.rows += list(rows)
        return super().read(rows)


def test_a_run_that_begins_late_reads_nothing_of_what_came_before():
    pixels = arrays(n=64)[:]
    source = Counting(pixels, np.zeros(64, np.int32), ("a",))
    images = Streamed(source, np.arange(64), None)
    whole, _ = batches(chunks(images), 0, 8)
    source.rows.clear()
    late, _ = batches(chunks(images), 6, 8)
    assert sorted(source.rows) == sorted(whole[6:, :, 0, 0, 0].ravel())
    np.testing.assert_array_equal(late, whole[6:])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
)
def test_a_window_order_is_a_permutation_that_uses_few_groups_at_a_time(sizes, window, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    order = WindowOrder(groups, seed, len(groups), window)
    for epoch in (0, 3):
        drawn = [order(epoch * len(groups) + i) for i in range(len(groups))]
        assert sorted(drawn) == list(range(len(groups)))
        # Each group is in use during one window only.
        used = groups[drawn]
        for group in range(len(sizes)):
            first, last = np.flatnonzero(used == group)[[0, -1]]
            assert last - first < window + max(sizes)
        assert order.groups_in_use() <= window + 1


def test_windows_shuffle_across_groups():
    groups = np.repeat(np.arange(100), 10)
    order = WindowOrder(groups, 0, 1000, 200)
    first = groups[[order(i) for i in range(10)]]
    assert len(set(first)) > 5
    assert [order(i) for i in range(1000)] != [order(1000 + i) for i in range(1000)]


# Processes.

WORKER = """
import json, os, sys
import numpy as np
from experiments.data import streaming
from experiments.data.records import Arrays
from experiments.data.streaming import Chunks, Streamed


class Telling(Arrays):
    # In a worker, tells about its process in the pixels.
    def read(self, rows):
        if os.getpid() == int(os.environ["PARENT"]):
            return super().read(rows)
        bridge = sys.modules.get("jax._src.xla_bridge")
        started = bool(bridge and bridge._backends)
        import jax
        for i in rows:
            self.images[i, 0, :3, 0] = 1, started, jax.default_backend() == "cpu"
        return super().read(rows)


if __name__ == "__main__":
    os.environ["PARENT"] = str(os.getpid())
    os.environ["JAX_PLATFORMS"] = "tpu"
    numbers = np.arange(24)
    images = np.zeros((24, 4, 4, 1), np.uint8)
    images[:, 1, 0, 0] = numbers
    chunks = Chunks(Streamed(Telling(images, numbers, ()), numbers, None), 8, range(8), 2, seed=1)
    for workers in (0, 2):
        iterator = streaming.stream(chunks, 0, 3, threads=1, workers=workers, ahead=1)
        print(json.dumps(np.concatenate([x for x, _ in iterator])[..., 0].tolist()))
        iterator.close()
"""


def test_workers_read_the_same_and_never_start_an_accelerator(tmp_path):
    """In a worker no backend was started before its first read. A transformation that starts one
    gets the CPU's, though the platform of the main process is another."""
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    threads, workers = (np.asarray(json.loads(line)) for line in result.stdout.splitlines())
    np.testing.assert_array_equal(workers[:, 1:], threads[:, 1:])
    assert not threads[:, 0].any()
    in_worker, started, cpu = np.moveaxis(workers[:, 0, :3], 1, 0)
    assert in_worker.all()
    assert not started[:4].any()  # the first chunk of each of the two workers
    assert started[4:].all()
    assert cpu.all()


def test_an_error_in_a_thread_reaches_the_consumer():
    class Broken(Arrays):
        def read(self, rows):
            raise RecordError("record 3")

    images = arrays()
    images.source = Broken(images[:], np.zeros(len(images), np.int32), ("a",))
    iterator = streaming.stream(chunks(images), 0, 2, threads=1, workers=0, ahead=1)
    with pytest.raises(RecordError, match="record 3"):
        next(iterator)
    iterator.close()
