"""`eejax times` and `eejax plan` on a small artifact."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images

from eejax import commands, planning, runtime
from eejax.artifact import export
from eejax.runtime import HeldOut

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LINKS = """wifi:
  {up_bits_per_second: 5.0e+7, down_bits_per_second: 5.0e+7, round_trip_seconds: 0.004}
"""
DEVICES = """phone: {times: times.json, scale: 30, watts: 3, link: wifi}
cloud: {times: times.json, price_per_hour: 0.1}
"""


def held_out(samples=300):
    """Scores of the small network; labels are the last exit's, a tenth of them by chance."""
    random = np.random.default_rng(5)
    images = some_images(4, samples)
    never = np.full(2, np.inf)
    answers = [
        reference(small_bundle(), images, np.r_[[np.inf] * e, -np.inf, never][:2]) for e in range(3)
    ]
    labels = answers[-1].logits.argmax(-1)
    chance = random.random(samples) < 0.1
    labels = np.where(chance, random.integers(0, 10, samples), labels)
    predictions = np.stack([a.logits.argmax(-1) for a in answers], 1)
    logits = np.stack([a.logits for a in answers], 1)
    return HeldOut(np.sort(logits, -1)[..., -1], predictions == labels[:, None])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the artifact, its times, links and devices."""
    place = tmp_path_factory.mktemp("plan")
    bundle = dataclasses.replace(small_bundle(), held_out=held_out())
    export(bundle, place / "artifact", layers=["onnx"], images=some_images(6, 8))
    quick = ["--repeats", "6", "--pause", "0", "--threads", "1"]
    to = str(place / "times.json")
    assert commands.main(["times", str(place / "artifact"), "--to", to, *quick]) == 0
    (place / "links.yaml").write_text(LINKS)
    (place / "devices.yaml").write_text(DEVICES)
    return place


def plan(place, *more):
    files = ["--links", str(place / "links.yaml"), "--devices", str(place / "devices.yaml")]
    return commands.main(["plan", str(place / "artifact"), *files, *more])


def test_times_hold_stages_bytes_and_changed_labels(place):
    times = planning.load(place / "times.json")
    assert times.artifact == runtime.read(place / "artifact").sha256
    assert times.stages.shape == (6, 3, 3)
    upper = np.arange(3) >= np.arange(3)[:, None]
    assert (times.stages[:, upper] > 0).all()
    assert (times.stages[:, ~upper] == 0).all()
    assert times.crossings[0, "float32"].size == 12 * 12 * 3
    for cut in (1, 2):
        plain, half, small = (
            times.crossings[cut, codec] for codec in ("float32", "bfloat16", "int8")
        )
        # Feature maps of two by two have a scale for every four values.
        assert small.size <= half.size < plain.size
        assert (plain.changed == 0).all()
        assert (small.changed[:cut] == 0).all()
    assert times.environment["images"] == "8"


def test_images_of_the_user_are_measured(place, tmp_path, capsys):
    np.save(tmp_path / "images.npy", some_images(9, 3))
    more = ["--repeats", "1", "--pause", "0", "--images", str(tmp_path / "images.npy")]
    to = str(tmp_path / "t.json")
    assert commands.main(["times", str(place / "artifact"), "--to", to, *more]) == 0
    assert planning.load(to).environment["images"] == "3"
    said = capsys.readouterr().out
    assert "first after a pause ms" in said
    assert "432" in said
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert commands.main(["times", str(place / "artifact"), "--to", to, *more]) == 2
    assert "give uint8 [B, 12, 12, 3]" in capsys.readouterr().err


def test_a_plan_is_printed_and_written(place, tmp_path, capsys):
    picture, written = tmp_path / "plan.svg", tmp_path / "plan.json"
    assert plan(place, "--json", str(written), "--picture", str(picture)) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "phone (modelled: 30 times what was measured) -[wifi]- cloud"
    assert "300 held-out samples" in lines[1]
    for words in ("best", "all on the device", "all in the cloud", "no plan beats", "thresholds"):
        assert any(line.startswith(words) for line in lines), words
    assert "<svg" in picture.read_text()
    content = json.loads(written.read_text())
    assert content["device"]["cuts"] == [3]
    assert content["cloud"]["cuts"] == [0]
    row = content["best"]
    thresholds = np.array([float(t) for t in row["thresholds"]], np.float32)
    tiers = planning.read(place / "links.yaml", place / "devices.yaml")
    forecast = planning.predict(
        planning.Plan(tuple(row["cuts"]), tuple(row["codecs"]), thresholds),
        *(held_out(), tiers.times, tiers.links, tiers.devices),
    )
    assert forecast.mean_seconds == pytest.approx(row["mean_seconds"])
    assert forecast.accuracy == pytest.approx(row["accuracy"])


@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "p99", "--accuracy", "0.8"),
        ("--objective", "energy", "--drop", "0.05", "--confidence", "0.5"),
        ("--objective", "price", "--risk", "0.3", "--codecs", "float32", "int8"),
    ],
)
def test_objectives_and_constraints_are_taken(more, place, capsys):
    assert plan(place, *more) == 0
    said = capsys.readouterr().out
    assert f"in {more[1]} against accuracy" in said
    assert ("certified: an error of at most 0.3" in said) == ("--risk" in more)


def test_mistakes_are_one_line(place, tmp_path, capsys):
    def refused(words, *more):
        assert plan(place, *more) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1

    refused("give at most that", "--accuracy", "0.9999")
    refused("measured on every machine", "--codecs", "jpeg")
    none = str(tmp_path / "none.yaml")
    refused("none.yaml cannot be read: No such file", "--links", none)
    export(small_bundle(), tmp_path / "bare", layers=["onnx"])
    files = ["--links", str(place / "links.yaml"), "--devices", str(place / "devices.yaml")]
    assert commands.main(["plan", str(tmp_path / "bare"), *files]) == 2
    assert "has no held-out samples" in capsys.readouterr().err
    other = dataclasses.replace(small_bundle(), held_out=held_out(), metadata={"seed": 2})
    export(other, tmp_path / "other", layers=["onnx"])
    assert commands.main(["plan", str(tmp_path / "other"), *files]) == 2
    assert "the times of phone are of another artifact" in capsys.readouterr().err


def test_the_examples_among_the_configurations_can_be_planned(place, tmp_path, capsys):
    shutil.copy(place / "times.json", tmp_path)
    for name in ("links.yaml", "devices.yaml"):
        shutil.copy(CONFIGS / name, tmp_path)
    links, devices = str(tmp_path / "links.yaml"), str(tmp_path / "devices.yaml")
    words = ["plan", str(place / "artifact"), "--links", links, "--devices", devices]
    assert commands.main(words) == 0
    assert "-[5g]- edge (modelled: 2 times what was measured) -[wired]-" in capsys.readouterr().out


def test_measuring_and_predicting_need_no_jax():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from eejax import commands, planning\n"
        "commands._parser()\n"
        "assert 'matplotlib' not in sys.modules and 'yaml' not in sys.modules\n"
        "print(planning.predict.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "predict\n", run.stderr
