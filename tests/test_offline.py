"""Offline inference: what is read, what is answered, and that every image is answered once."""

import csv
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from onnx_models import reference, small_bundle, some_images
from PIL import Image

from eejax import commands, offline, runtime
from eejax.artifact import export
from eejax.offline import answers, decoding
from eejax.offline.inputs import Range
from eejax.offline.ray import Predictor

SEED = 20261128
SIDES = (12, 12, 3)
COUNT = 150
IMAGES = some_images(31, COUNT)
PROCESS = Path(__file__).with_name("offline_process.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("offline") / "artifact"
    export(small_bundle(), place, layers=["onnx"])
    return place


@pytest.fixture(scope="module")
def expected():
    return reference(small_bundle(), IMAGES, small_bundle().thresholds)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def folder(path, images=IMAGES):
    """Images as files, some of them a folder below."""
    for i, image in enumerate(images):
        file = path / f"{i:03}.png" if i < 100 else path / "more" / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def parquet(path, items, rows=40, struct=True):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = [{"bytes": item, "path": None} for item in items] if struct else list(items)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    table = {"img": pa.array(column, kind), "label": pa.array(range(len(items)))}
    parquet.write_table(pa.table(table), path, row_group_size=rows)
    return path


def array_record(path, items):
    """As tensorflow-datasets writes it, without TensorFlow."""
    pytest.importorskip("array_record")
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=SIDES),
            "label": tfds.features.ClassLabel(num_classes=9),
        }
    )
    features.save_config(str(path.parent))
    serializer = ExampleSerializer(features.get_serialized_info())
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for item in items:
        writer.write(serializer.serialize_example({"image": item, "label": 1}))
    writer.close()
    return path


def made(kind, path):
    """The images in files of a kind."""
    encoded = [png(image) for image in IMAGES]
    if kind == "folder":
        return folder(path / "photos")
    if kind == "npy":
        np.save(path / "images.npy", IMAGES)
        return path / "images.npy"
    if kind == "bytes":
        return parquet(path / "images.parquet", encoded, struct=False)
    if kind == "struct":
        return parquet(path / "images.parquet", encoded)
    if kind == "records":
        return array_record(path / "images-test.array_record-00000-of-00001", encoded)
    np.save(path / "some.npy", IMAGES[:70])
    (path / "one.png").write_bytes(encoded[70])
    parquet(path / "rest.parquet", encoded[71:])
    names = [f"{path / name}\n" for name in ("some.npy", "one.png", "rest.parquet")]
    (path / "list.txt").write_text("\n".join(names))
    return path / "list.txt"


KINDS = ("folder", "npy", "bytes", "struct", "records", "list")


def predict(*argv):
    return commands.main(["predict", *map(str, argv), "--threads", "1"])


def rows(data):
    return list(csv.DictReader(io.StringIO(data if isinstance(data, str) else data.decode())))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_answered_as_the_network_does(kind, place, expected, tmp_path):
    images, to = made(kind, tmp_path), tmp_path / "answers.csv"
    assert predict(place, images, "--to", to, "--part-size", 64) == 0
    found = rows(to.read_bytes())
    assert [int(row["exit"]) - 1 for row in found] == expected.exits.tolist()
    assert [int(row["label"]) for row in found] == expected.logits.argmax(-1).tolist()
    shifted = np.exp(expected.logits - expected.logits.max(-1, keepdims=True))
    confidences = [float(row["confidence"]) for row in found]
    np.testing.assert_allclose(confidences, 1 / shifted.sum(-1), atol=1e-4)
    assert {row["error"] for row in found} == {""}
    keys = [(row["image"], row["row"]) for row in found]
    assert len(set(keys)) == COUNT
    if kind == "folder":
        assert keys[99:101] == [("099.png", ""), ("more/100.png", "")]
    elif kind == "list":
        names = [str(tmp_path / name) for name in ("some.npy", "one.png", "rest.parquet")]
        assert keys[69:72] == [(names[0], "69"), (names[1], ""), (names[2], "0")]
    else:
        assert keys == [(images.name, str(i)) for i in range(COUNT)]


@pytest.mark.parametrize("form", answers.FORMATS)
def test_shards_add_up_to_the_whole_in_every_format(form, place, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    images, whole = made("npy", tmp_path), tmp_path / "whole"
    argv = [place, images, "--part-size", 20, "--format", form]
    assert predict(*argv, "--parts", whole) == 0
    for k in (2, 0, 1):
        assert predict(*argv, "--parts", tmp_path / "sharded", "--shard", f"{k}/3") == 0
    files = sorted(path.name for path in whole.iterdir())
    assert files == ["_job.json", *(f"part-{i:05}.{form}" for i in range(8))]
    for name in files:
        assert (whole / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()
    if form == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(whole).to_pydict()
        assert table["row"] == list(range(COUNT))
        return
    # The command on all parts joins them, and finds nothing to do.
    capsys.readouterr()
    assert predict(*argv, "--parts", tmp_path / "sharded", "--to", tmp_path / "joined") == 0
    assert "8 of 8 parts are there" in capsys.readouterr().err
    assert predict(*argv, "--to", tmp_path / "plain") == 0
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "plain").read_bytes()


@hypothesis.given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    size=st.integers(1, 50),
    n=st.integers(1, 5),
)
def test_every_image_is_in_one_part_of_one_shard(sizes, size, n):
    names = tuple(map(str, range(len(sizes))))
    zeros = np.zeros(len(sizes), np.int64)
    inputs = offline.Inputs(Path(), names, np.array(sizes), zeros, zeros, SIDES)
    shards = [offline.parts(inputs, size, (k, n)) for k in range(n)]
    found = []
    for part in sorted(part for shard in shards for part in shard):
        ranges = list(inputs.ranges(part.first, part.count))
        assert sum(r.stop - r.start for r in ranges) == part.count <= size
        found += [(r.file, i) for r in ranges for i in range(r.start, r.stop)]
    assert found == [(file, i) for file, rows in enumerate(sizes) for i in range(rows)]
    numbers = sorted(part.number for shard in shards for part in shard)
    assert numbers == list(range(len(numbers)))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.fixture(scope="module")
def table_of_bytes(tmp_path_factory):
    """Parquet files with row groups of several sizes, and the values of their pixels."""
    path = tmp_path_factory.mktemp("parquet")
    images = [np.full(SIDES, i, np.uint8) for i in range(250)]
    encoded = [png(image) for image in images]
    return {size: parquet(path / f"{size}.parquet", encoded, size) for size in (1, 30, 70, 1000)}


@hypothesis.given(
    size=st.sampled_from((1, 30, 70, 1000)),
    bounds=st.lists(st.integers(0, 250), min_size=2, max_size=8, unique=True).map(sorted),
)
@hypothesis.settings(max_examples=30)
def test_rows_of_parquet_are_those_that_were_asked_for(table_of_bytes, size, bounds):
    inputs = offline.find(table_of_bytes[size], SIDES)
    reader = decoding.Reader(inputs)
    # Ranges with gaps between them.
    for start, stop in zip(bounds[::2], bounds[1::2], strict=False):
        chunks = [task() for task in reader.tasks(start, stop - start)]
        found = np.concatenate([chunk.images for chunk in chunks])
        assert found[:, 0, 0, 0].tolist() == list(range(start, stop))


def test_images_that_cannot_be_read_are_rows(place, expected, tmp_path, capsys):
    photos = folder(tmp_path / "photos", IMAGES[:9])
    whole = (photos / "004.png").read_bytes()
    bad = {1: b"", 2: b"no image", 4: whole[:200], 8: whole.replace(b"IDAT", b"IDOT")}
    for i, data in bad.items():
        (photos / f"{i:03}.png").write_bytes(data)
    to = tmp_path / "answers.jsonl"
    assert predict(place, photos, "--to", to, "--format", "jsonl") == 1
    assert "4 images could not be read" in capsys.readouterr().err
    found = [json.loads(line) for line in to.read_text().splitlines()]
    assert {i for i, row in enumerate(found) if row["error"]} == set(bad)
    for i, row in enumerate(found):
        assert row["exit"] == (None if i in bad else expected.exits[i] + 1)
        assert (row["label"] is None) == (row["class"] is None) == (i in bad)
    assert found[2]["error"] == "UnidentifiedImageError: cannot identify image file"

    items: list[bytes | None] = [png(image) for image in IMAGES[:9]]
    items[3] = None
    items[5] = b"no image"
    file = parquet(tmp_path / "images.parquet", items)
    argv = [place, file, "--parts", tmp_path / "parts", "--part-size", 4]
    assert predict(*argv, "--to", to) == 1
    found = rows(to.read_bytes())
    assert [i for i, row in enumerate(found) if row["error"]] == [3, 5]
    assert found[3]["error"] == "the row holds no bytes"
    # Finished parts count, too.
    capsys.readouterr()
    assert predict(*argv) == 1
    assert "2 images could not be read" in capsys.readouterr().err


def test_all_images_of_a_part_can_be_unreadable(place, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        (photos / f"{i}.png").write_bytes(b"")
    assert predict(place, photos, "--to", tmp_path / "answers.csv") == 1
    assert len(rows((tmp_path / "answers.csv").read_bytes())) == 3


def test_a_damaged_row_group_is_unreadable_and_the_others_are_not(tmp_path):
    file = parquet(tmp_path / "images.parquet", [png(image) for image in IMAGES[:90]], 30)
    inputs = offline.find(file, SIDES)
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        column = opened.metadata.row_group(1).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
    times, data = os.stat(file), bytearray(file.read_bytes())
    data[start : start + 20] = bytes(20)
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    reader = decoding.Reader(inputs)
    for first in (0, 45):
        chunks = [task() for task in reader.tasks(first, 45)]
        readable = np.concatenate([chunk.readable for chunk in chunks])
        assert readable.tolist() == [not 30 <= first + i < 60 for i in range(45)]


def test_a_file_that_may_not_be_read_is_a_row_and_a_failing_disk_ends_the_job(
    place, tmp_path, monkeypatch, capsys
):
    photos, error = folder(tmp_path / "photos", IMAGES[:5]), PermissionError(13, "denied")

    def opened(path, mode):
        if Path(path).name == "003.png":
            raise error
        return open(path, mode)

    monkeypatch.setattr(decoding, "open", opened, raising=False)
    argv = [place, photos, "--parts", tmp_path / "parts", "--part-size", 2]
    error = OSError(5, "Input/output error")
    assert predict(*argv) == 2
    assert "Input/output error" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) in (
        ["_job.json"],
        ["_job.json", "part-00000.csv"],
    )
    error = PermissionError(13, "denied")
    assert predict(*argv, "--to", tmp_path / "answers.csv") == 1
    found = rows((tmp_path / "answers.csv").read_bytes())
    assert [bool(row["error"]) for row in found] == [False, False, False, True, False]


def test_a_file_that_changes_while_a_job_runs_ends_it(place, tmp_path):
    photos = folder(tmp_path / "photos", IMAGES[:4])
    file = parquet(tmp_path / "images.parquet", [png(image) for image in IMAGES[:4]])
    np.save(tmp_path / "images.npy", IMAGES[:4])
    artifact = runtime.load(place, 1)
    for path, change in [
        (photos, photos / "002.png"),
        (file, file),
        (tmp_path / "images.npy", tmp_path / "images.npy"),
    ]:
        inputs = offline.find(path, SIDES)
        os.utime(change, (1, 1))
        with pytest.raises(ValueError, match="has changed since the job began"):
            list(offline.answer(artifact, inputs, offline.parts(inputs, 4)))


def test_reading_ahead_is_bounded():
    pulled = 0

    def tasks():
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled, lambda: decoding.Chunk(np.empty(0), np.empty(0), {})

    results = decoding.ahead(tasks(), 3)
    for number in range(1, 60):
        assert next(results)[0] == number
        assert pulled <= number + 2 * 3
    results.close()


def test_an_error_of_a_task_comes_out_and_the_threads_end():
    def tasks():
        for i in range(50):
            yield i, lambda i=i: 1 // (5 - i)

    results = decoding.ahead(tasks(), 2)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        list(results)


@pytest.mark.parametrize("form", answers.FORMATS)
def test_answers_are_read_as_they_were_written(form):
    pytest.importorskip("pyarrow")
    table = {
        "image": ["a.png", 'with, "quotes"\nand a line', "é.npy"],
        "row": [None, None, 3],
        "label": [1, None, 0],
        "class": ["cat", None, "dog, small"],
        "exit": [1, None, 3],
        "confidence": [0.25, None, 1.0],
        "error": [None, "OSError: broken", None],
    }
    assert answers.decode(answers.encode(table, form), form) == table
    empty = {name: [] for name in table}
    assert answers.decode(answers.encode(empty, form), form) == empty


def test_a_name_that_is_no_text_is_written(place, tmp_path):
    name = tmp_path / os.fsdecode(b"photos")
    name.mkdir()
    try:
        Path(os.fsdecode(os.fsencode(name) + b"/\xff.png")).write_bytes(png(IMAGES[0]))
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    assert predict(place, name, "--to", tmp_path / "answers.csv") == 0
    assert (
        rows((tmp_path / "answers.csv").read_bytes())[0]["image"] == "\N{REPLACEMENT CHARACTER}.png"
    )


def refused(capsys, said, *argv):
    capsys.readouterr()
    assert predict(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("eejax: ")
    assert err.count("\n") == 1
    assert said in err


def test_mistakes_are_one_line(place, tmp_path, capsys):
    images, parts = made("npy", tmp_path), tmp_path / "parts"
    for shard in ("3/3", "-1/3", "0/0", "1", "a/b", "1/3/5", "1.0/3", ""):
        refused(capsys, "give", place, images, "--parts", parts, f"--shard={shard or '/'}")
    refused(capsys, "--shard needs --parts", place, images, "--shard", "0/2")
    refused(
        capsys,
        "--to joins all parts",
        *(place, images, "--shard", "0/2", "--parts", parts, "--to", tmp_path / "x"),
    )
    refused(capsys, "Parquet is written as --parts", place, images, "--format", "parquet")
    refused(capsys, "give at least 1", place, images, "--part-size", "0")
    refused(capsys, "give 2 numbers", place, images, "--parts", parts, "--thresholds", "1")
    photos = folder(tmp_path / "photos", IMAGES[:2])
    among = ["--parts", photos / "parts", "--format", "parquet"]
    refused(capsys, "lies among the images", place, photos, *among)
    assert not parts.exists()
    np.save(photos / "labels.npy", np.zeros(3))
    refused(capsys, "of the kinds image, npy", place, photos)
    (tmp_path / "list.txt").write_text(f"{images}\n{tmp_path / 'nothing.png'}\n")
    refused(capsys, "list.txt, line 2: ", place, tmp_path / "list.txt")
    np.save(tmp_path / "none.npy", IMAGES[:0])
    refused(capsys, "its files have no rows", place, tmp_path / "none.npy")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    refused(capsys, "", place, tmp_path / "broken.parquet")
    (tmp_path / "alone.array_record").write_bytes(b"")
    refused(capsys, "features.json", place, tmp_path / "alone.array_record")


def test_an_interrupt_is_one_line(place, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    images = made("npy", tmp_path)
    monkeypatch.setattr(answers.Directory, "commit", interrupted)
    assert predict(place, images, "--parts", tmp_path / "parts") == 130
    assert capsys.readouterr().err == "eejax: interrupted\n"


def test_the_column_of_images_is_found_or_named(place, tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file, data = tmp_path / "images.parquet", [png(image) for image in IMAGES[:3]]
    parquet.write_table(pa.table({"left": data, "right": data[::-1], "label": [1, 2, 3]}), file)
    refused(capsys, "label (int64); name one of encoded images", place, file)
    refused(capsys, "left (binary), right (binary)", place, file, "--column", "label")
    for column in ("left", "right"):
        argv = [place, file, "--column", column, "--to", tmp_path / column]
        assert predict(*argv) == 0
    left, right = (rows((tmp_path / name).read_bytes()) for name in ("left", "right"))
    assert [row["confidence"] for row in left] == [row["confidence"] for row in right[::-1]]


def test_answers_of_another_job_are_refused(place, tmp_path, capsys):
    images, parts = made("npy", tmp_path), tmp_path / "parts"
    argv = [images, "--parts", parts, "--part-size", 50]
    assert predict(place, *argv, "--shard", "0/2") == 0
    before = {path.name: path.read_bytes() for path in parts.iterdir()}

    other = tmp_path / "other"
    export(small_bundle(), other, layers=["onnx"], certificate={"risk": 0.1})
    refused(capsys, "answers of another job: artifact ", other, *argv)
    refused(capsys, ": thresholds [", place, *argv, "--thresholds", "inf,0.5")
    refused(capsys, ": part size 50, and here 40", place, *argv[:3], "--part-size", 40)
    refused(capsys, ": format csv, and here jsonl", place, *argv, "--format", "jsonl")
    times = os.stat(images)
    os.utime(images, (1, 1))
    refused(capsys, ": inputs ", place, *argv)
    os.utime(images, ns=(times.st_atime_ns, times.st_mtime_ns))
    np.save(tmp_path / "longer.npy", some_images(1, COUNT + 1))
    refused(capsys, ": images 150, and here 151", place, tmp_path / "longer.npy", *argv[1:])
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before

    # The artifact's own thresholds, by name; and another number of shards.
    own = ",".join(map(repr, runtime.read(place).thresholds.astype(float).tolist()))
    assert predict(place, *argv, f"--thresholds={own}", "--shard", "0/1") == 0
    assert len(list(parts.iterdir())) == 1 + 3

    (parts / "_job.json").write_text("{}")
    refused(capsys, "does not describe an eejax job", place, *argv)
    (parts / "_job.json").unlink()
    refused(capsys, "holds part-00000.csv without _job.json", place, *argv)


def test_of_two_jobs_that_start_at_once_one_is_refused(tmp_path, monkeypatch):
    record = {"format": "csv", "images": 10, "part size": 5, "artifact": "a"}
    link = os.link

    def late(source, target):
        monkeypatch.setattr(os, "link", link)
        answers.Directory(tmp_path, {**record, "artifact": "b"})
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match="artifact b, and here a"):
        answers.Directory(tmp_path, record)
    assert [path.name for path in tmp_path.iterdir()] == ["_job.json"]


def test_a_part_that_is_not_whole_is_refused_and_made_anew_when_it_is_removed(
    place, tmp_path, capsys
):
    images, parts, to = made("npy", tmp_path), tmp_path / "parts", tmp_path / "answers.csv"
    argv = [place, images, "--parts", parts, "--part-size", 50, "--to", to]
    assert predict(*argv) == 0
    whole, part = to.read_bytes(), parts / "part-00001.csv"
    lines = part.read_bytes().splitlines(keepends=True)
    for data, said in [
        (b"".join(lines[:-1]), "has 49 rows and not 50"),
        (b"", "is damaged"),
        (b"".join(lines)[:-20], "is damaged"),
        (b"\xff", "is damaged"),
    ]:
        part.write_bytes(data)
        assert predict(*argv) == 2
        assert said in capsys.readouterr().err
        # What was joined before is left alone.
        assert to.read_bytes() == whole
    part.unlink()
    old, new = parts / ".part-00001.csv.0.new", parts / ".part-00001.csv.1.new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert predict(*argv) == 0
    assert to.read_bytes() == whole
    # A file of an hour ago is nobody's; another may be about to be renamed.
    assert (old.exists(), new.exists()) == (False, True)


def started(*argv, steps=0):
    return subprocess.Popen(
        [sys.executable, str(PROCESS), str(steps), "predict", *map(str, argv), "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(PROCESS.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def ended(process):
    """Its exit status."""
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGKILL), err.decode()
    return process.returncode


def test_a_job_that_is_killed_at_any_step_goes_on(place, tmp_path):
    """At each restart it is killed at a drawn sync, rename or link, until it is done."""
    draw = random.Random(SEED)
    images = made("npy", tmp_path)
    assert predict(place, images, "--to", tmp_path / "whole.csv", "--part-size", 15) == 0
    argv = [place, images, "--parts", tmp_path / "parts", "--part-size", 15]
    # A record takes 2 steps, a part 3: syncs of the file and of the directory, and a rename.
    kills = 0
    while ended(started(*argv, steps=draw.randint(1, 8))):
        kills += 1
        assert kills < 40, f"seed {SEED}"
        for path in (tmp_path / "parts").glob("part-*.csv"):
            assert len(rows(path.read_bytes())) == 15, f"seed {SEED}"
    assert kills >= 3
    assert predict(*argv, "--to", tmp_path / "joined.csv") == 0
    assert (tmp_path / "joined.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_jobs_that_are_killed_at_any_moment_answer_every_image_once(place, tmp_path):
    """Three shards side by side, twice each by mistake; a drawn one is killed, again and again."""
    draw = random.Random(SEED)
    images, parts = made("npy", tmp_path), tmp_path / "parts"
    assert predict(place, images, "--to", tmp_path / "whole.csv", "--part-size", 1) == 0
    argv = [place, images, "--parts", parts, "--part-size", 1]
    jobs = [(k, started(*argv, "--shard", f"{k}/3")) for k in (0, 1, 2, 0, 1, 2)]
    try:
        for target in sorted(draw.sample(range(5, COUNT), 6)):
            end = time.monotonic() + 60
            while len(list(parts.glob("part-*.csv"))) < target:
                assert time.monotonic() < end
                time.sleep(0.001)
            at = draw.randrange(len(jobs))
            k, job = jobs[at]
            job.kill()
            ended(job)
            jobs[at] = k, started(*argv, "--shard", f"{k}/3")
        for _, job in jobs:
            assert ended(job) == 0
    finally:
        for _, job in jobs:
            job.kill()
    names = sorted(path.name for path in parts.glob("part-*"))
    assert names == [f"part-{i:05}.csv" for i in range(COUNT)]
    assert predict(*argv, "--to", tmp_path / "joined.csv") == 0
    assert (tmp_path / "joined.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_progress_is_told(place, tmp_path, capsys, monkeypatch):
    images = made("npy", tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert predict(place, images, "--to", tmp_path / "answers.csv") == 0
    err = capsys.readouterr().err
    assert "150 of 150 images, " in err
    assert " a second, 0 s left\n" in err
    counts = np.bincount(reference(small_bundle(), IMAGES, small_bundle().thresholds).exits)
    mean = (counts * [1, 2, 3]).sum() / COUNT
    cost = (counts * runtime.read(place).costs).sum() / COUNT
    assert f"% of 150 images, {mean:.2f} on average, {cost:.2f} of the cost" in err


def test_a_batch_of_ray_data_is_answered(place, expected):
    """What Ray calls; tests/test_ray.py has it call it."""
    predictor = Predictor(place, column="img")
    found = predictor({"img": IMAGES, "label": np.arange(COUNT)})
    assert list(found) == ["label", "predicted", "exit", "confidence"]
    assert found["exit"].tolist() == (expected.exits + 1).tolist()
    assert found["predicted"].tolist() == expected.logits.argmax(-1).tolist()
    assert found["label"].tolist() == list(range(COUNT))
    with pytest.raises(ValueError, match="the batch has the columns image; name the images' by"):
        predictor({"image": IMAGES})
    with pytest.raises(ValueError, match="give 2 numbers"):
        Predictor(place, [1.0])


def test_ranges_go_on_in_the_next_file():
    zeros = np.zeros(3, np.int64)
    inputs = offline.Inputs(Path(), ("a", "b", "c"), np.array([3, 0, 4]), zeros, zeros, SIDES)
    assert list(inputs.ranges(2, 3)) == [Range(0, 2, 3), Range(2, 0, 2)]
    assert inputs.total == 7


def test_the_page_on_large_data_sets(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifact").symlink_to(place)
    folder(tmp_path / "photos", IMAGES[:30])
    page = (Path(__file__).parents[1] / "docs" / "deploying.md").read_text()
    section = page.split("## Large data sets")[1].split("\n## ")[0]
    lines = re.findall(r"^eejax (.*)$", section, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        # Shards have a part each.
        assert commands.main([*shlex.split(line, comments=True), "--part-size", "15"]) == 0
    assert len(rows((tmp_path / "answers.csv").read_bytes())) == 30
    header = (tmp_path / "answers.csv").read_text().splitlines()[0].split(",")
    assert [name for name in header if f"`{name}`" not in section] == []
