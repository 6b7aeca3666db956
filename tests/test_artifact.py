"""Artifacts: written all or nothing, refused when damaged, and on the command line."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import random
import shutil
import tracemalloc
from typing import Any

import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images
from PIL import Image

from eejax import bundle as bundles
from eejax import commands, policies, runtime
from eejax.artifact import export
from eejax.runtime import manifest

SEED = 20261128


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("artifact") / "small"
    certificate = {"risk": 0.05, "delta": 0.1, "data": "digits, 500 images"}
    export(small_bundle(), place, layers=["onnx"], certificate=certificate)
    return place


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place, tmp_path / "copy")


def rewritten(place, change):
    """Changes the content and writes the manifest with the right hash again."""
    whole = json.loads((place / "manifest.json").read_text())
    change(whole["content"])
    whole["content_sha256"] = manifest.content_hash(whole["content"])
    (place / "manifest.json").write_text(json.dumps(whole))


def test_the_manifest_says_what_is_inside(place):
    bundle, found = small_bundle(), manifest.read(place)
    assert found.classes == bundle.classes
    assert found.image == (12, 12, 3)
    assert found.num_exits == 3
    np.testing.assert_array_equal(found.thresholds, bundle.thresholds)
    np.testing.assert_allclose(found.costs, bundle.costs.fractions)
    assert found.content["certificate"]["risk"] == 0.05
    assert found.content["policy"]["parameters"]["temperatures"] == [0.5, 1.0, 2.0]
    assert found.content["metadata"] == {"seed": 1}
    stages = [f"onnx/stage{e}.onnx" for e in (1, 2, 3)]
    records = [f"recorded/{name}.bin" for name in ("exits", "images", "logits")]
    assert found.files == ("onnx/single.onnx", *stages, *records)


def test_what_was_written_is_verified(place):
    found = runtime.verify(runtime.load(place, 1))
    assert found.passed
    assert (found.images, found.labels, found.exits) == (32, 0, 0)
    assert found.difference < 1e-4


def test_another_network_is_not_verified(copy, tmp_path):
    """Whole files with right hashes, of which one is of a network with other weights."""
    other = tmp_path / "other"
    bundle = small_bundle()
    weaker = dataclasses.replace(bundle, policy=policies.max_prob)
    export(weaker, other, layers=["onnx"])
    data = (other / "onnx" / "single.onnx").read_bytes()
    (copy / "onnx" / "single.onnx").write_bytes(data)
    entry = {"bytes": len(data), "sha256": manifest.sha256(data)}
    rewritten(copy, lambda content: content["files"].update({"onnx/single.onnx": entry}))
    assert not runtime.verify(runtime.load(copy, 1)).passed
    assert commands.main(["verify", str(copy)]) == 1


def test_infinite_thresholds_are_kept(tmp_path):
    bundle = dataclasses.replace(small_bundle(), thresholds=np.array([np.inf, -np.inf]))
    export(bundle, tmp_path / "a", layers=["onnx"])
    assert runtime.read(tmp_path / "a").thresholds.tolist() == [np.inf, -np.inf]


def test_an_artifact_is_replaced_and_nothing_else(copy, tmp_path):
    (copy / "onnx" / "stage4.onnx").write_bytes(b"of the user")
    with pytest.raises(ValueError, match=r"holds onnx/stage4\.onnx; give a directory of its own"):
        export(small_bundle(), copy, layers=["onnx"])
    (copy / "onnx" / "stage4.onnx").unlink()
    export(small_bundle(), copy, layers=["onnx"])
    assert runtime.read(copy).content["certificate"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="Remove it, or give another directory"):
        export(small_bundle(), copy, layers=["onnx"])


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    bundle, place = small_bundle(), tmp_path / "a"
    random_policy = dataclasses.replace(bundle, policy=policies.random(0))
    with pytest.raises(NotImplementedError, match="no rule for bitcast"):
        export(random_policy, place)
    with pytest.raises(ValueError, match=r"give uint8 \[N, 12, 12, 3\]"):
        export(bundle, place, images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="give some of onnx, stablehlo, export"):
        export(bundle, place, layers=["torch"])
    with pytest.raises(ValueError, match="is not JSON"):
        export(bundle, place, layers=["onnx"], certificate={"risk": np.nan})
    assert not list(tmp_path.iterdir())


def test_a_directory_without_an_artifact_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json; give a directory of `eejax"):
        runtime.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["files"].update({"../x.bin": {"bytes": 1, "sha256": ""}}), "named '../x.bin'"),
        (lambda c: c["files"].update({"/etc/x.bin": {"bytes": 1, "sha256": ""}}), "named '/etc"),
        (
            lambda c: c["files"].update({"a.bin": {"bytes": 1 << 40, "sha256": ""}}),
            "bytes; .* most",
        ),
        (lambda c: c["files"].update({"a.bin": {"bytes": -1, "sha256": ""}}), "has -1 bytes"),
        (lambda c: c.pop("files"), "no 'files'"),
        (lambda c: c["image"].update(shape=[12, 12]), "expected height, width and channels"),
        (lambda c: c["image"].update(shape=[1 << 40, 1, 1]), "expected height, width and"),
        (lambda c: c["image"].update(dtype="float32"), "expected uint8"),
        (lambda c: c.update(thresholds=[1.0]), "1 thresholds"),
        (lambda c: c.update(thresholds=["nan", 1.0]), "not numbers"),
        (lambda c: c.update(thresholds=["x", 1.0]), "could not convert"),
        (lambda c: c.update(recorded=0), "0 recorded images"),
        (lambda c: c.update(files=[]), "has no attribute"),
        (lambda c: c["files"]["onnx/single.onnx"].pop("sha256"), "no 'sha256'"),
        (lambda c: c["files"]["onnx/single.onnx"].update(sha256=1), "has the hash 1"),
        (lambda c: c.pop("layers"), "no 'layers'"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, change, said):
    rewritten(copy, change)
    with pytest.raises(ValueError, match=f"^the artifact in .* cannot be read: .*{said}"):
        runtime.load(copy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "does not describe an eejax artifact"),
        ("[" * 100_000, "recursion|too deep|does not describe|damaged|RecursionError|maximum"),
        ('{"format": "eejax artifact", "version": 2}', "newer than 1, .* update eejax"),
        ('{"format": "eejax artifact", "version": true}', "format version True"),
        ('{"format": "eejax artifact", "format": "eejax artifact"}', "occurs twice"),
        ('{"format": NaN}', "holds NaN, which JSON does not have"),
        ('{"format": "eejax artifact", "version": 1, "content": {}}', "is damaged"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(copy, text, said):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        runtime.load(copy)


def test_links_pipes_and_large_files_are_not_read(copy, tmp_path):
    model, outside = copy / "onnx" / "single.onnx", tmp_path / "outside.onnx"
    shutil.move(model, outside)
    model.symlink_to(outside)
    image = some_images(1, 1)
    with pytest.raises(ValueError, match="is a link"):
        runtime.load(copy, 1).predict(image)
    model.unlink()
    os.mkfifo(model)
    with pytest.raises(ValueError, match="is not a file"):
        runtime.load(copy, 1).predict(image)
    model.unlink()
    model.write_bytes(outside.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"expected .* at most"):
        runtime.load(copy, 1).predict(image)
    model.unlink()
    (copy / "onnx" / "stage1.onnx").unlink()
    with pytest.raises(ValueError, match=r"onnx/stage1\.onnx is missing"):
        runtime.load(copy, 1).predict(some_images(1, 2))
    shutil.move(copy / "onnx", tmp_path / "folder")
    (copy / "onnx").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match="onnx is a link"):
        runtime.load(copy, 1).predict(some_images(1, 2))


def test_what_a_manifest_says_of_a_file_allocates_nothing(copy):
    name = "recorded/exits.bin"
    rewritten(copy, lambda content: content["files"][name].update(bytes=(4 << 30) - (1 << 28)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="is damaged"):
        manifest.read(copy).file(name)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(ValueError, match=r"is not a file|cannot be read"):
        manifest.read(copy).file(name)


def test_models_that_are_not_as_described_are_refused(copy):
    rewritten(copy, lambda content: content["image"].update(shape=[10, 12, 3]))
    with pytest.raises(ValueError, match="cannot run a model"):
        runtime.load(copy, 1).predict(np.zeros((1, 10, 12, 3), np.uint8))
    rewritten(copy, lambda content: content.pop("network"))
    assert commands.main(["inspect", str(copy)]) == 2


def test_a_thousand_flips_and_truncations_are_refused_or_change_nothing(copy):
    """Each is one byte of one file, or an end cut off; the seed is in this file."""
    draw = random.Random(SEED)
    whole = manifest.read(copy)
    expected = whole.content
    names = ["manifest.json"] * 6 + list(whole.files)
    originals = {name: (copy / name).read_bytes() for name in set(names)}
    harmless = 0
    for _ in range(1000):
        name = draw.choice(names)
        data = bytearray(originals[name])
        if draw.random() < 0.8:
            at = draw.randrange(len(data))
            data[at] ^= draw.randrange(1, 256)
        else:
            del data[draw.randrange(len(data)) :]
        (copy / name).write_bytes(data)
        with contextlib.suppress(ValueError):
            found = manifest.read(copy)
            for file in found.files:
                found.file(file)
            assert name == "manifest.json"
            assert found.content == expected  # another space between two values
            harmless += 1
        (copy / name).write_bytes(originals[name])
    assert 0 < harmless < 200


def run(capsys, *argv) -> Any:
    status = commands.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def test_the_command_exports_a_run(tmp_path, capsys):
    bundles.save(small_bundle(), tmp_path / "run" / "bundle")
    status, out, err = run(
        capsys, "export", tmp_path / "run", "--to", tmp_path / "artifact", "--layers", "onnx"
    )
    assert (status, err) == (0, "")
    assert "MB in" in out
    status, out, _ = run(capsys, "verify", tmp_path / "artifact")
    assert status == 0
    assert out.startswith("7 files have their hashes\nonnx: 32 recorded images, 0 other labels, 0 ")
    digest = runtime.read(tmp_path / "artifact").sha256
    good = run(capsys, "verify", tmp_path / "artifact", "--manifest-sha256", digest)
    other = run(capsys, "verify", tmp_path / "artifact", "--manifest-sha256", "0" * 64)
    assert (good[0], other[0]) == (0, 1)
    assert digest in other[1]


def test_the_command_predicts_an_array(place, tmp_path, capsys):
    images = some_images(12, 300)
    np.save(tmp_path / "images.npy", images)
    expected = reference(small_bundle(), images, small_bundle().thresholds)
    status, out, err = run(capsys, "predict", place, tmp_path / "images.npy", "--threads", 1)
    assert status == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["row"] for row in rows] == [str(i) for i in range(300)]
    assert [int(row["exit"]) - 1 for row in rows] == expected.exits.tolist()
    assert [row["class"] for row in rows] == [f"class {row['label']}" for row in rows]
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    assert "% of 300 images" in err


def test_the_command_predicts_a_folder_in_lines_of_json(place, tmp_path, capsys):
    images = some_images(13, 3)
    folder = tmp_path / "images" / "inner"
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    Image.fromarray(images[0]).resize((40, 30)).convert("L").save(tmp_path / "images" / "large.png")
    (folder / "notes.txt").write_text("no image")
    lines = tmp_path / "out.jsonl"
    argv = ["predict", place, tmp_path / "images", "--format", "jsonl", "--to", lines]
    status, out, _ = run(capsys, *argv, "--thresholds", "inf,-inf")
    assert (status, out) == (0, "")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["image"] for row in rows] == [*(f"inner/{i}.png" for i in range(3)), "large.png"]
    assert {row["exit"] for row in rows} == {2}


def test_the_command_says_what_is_inside(place, capsys):
    status, out, _ = run(capsys, "inspect", place)
    assert status == 0
    for part in ("fast", "10 classes", "uint8 [12, 12, 3]", "max_prob", '"risk": 0.05', "single"):
        assert part in out
    status, out, _ = run(capsys, "inspect", place, "--json")
    assert json.loads(out)["certificate"]["data"] == "digits, 500 images"


def test_the_command_refuses_mistakes_in_a_line(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "wrong.npy", np.zeros((3, 8, 8, 3), np.uint8))
    for argv, said in [
        (["predict", place, tmp_path / "nothing"], "does not exist"),
        (["predict", place, tmp_path / "empty"], "holds no images; known endings"),
        (["predict", place, tmp_path / "wrong.npy"], "give uint8 [N, 12, 12, 3]"),
        (["predict", tmp_path, tmp_path / "empty"], "holds no manifest.json"),
        (["predict", place, tmp_path / "wrong.npy", "--threads", 0], "0 threads"),
        (["export", tmp_path, "--to", tmp_path / "x"], "holds no bundle"),
    ]:
        status, _, err = run(capsys, *argv)
        assert status == 2
        assert err.startswith("eejax: ")
        assert err.count("\n") == 1
        assert said in err
