"""The layers of an artifact for JAX: stored programs against the live network."""

import datetime
import json
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images

import eejax
from eejax import bundle as bundles
from eejax import commands, runtime, stablehlo
from eejax.artifact import reading
from eejax.runtime import manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("artifact") / "small"
    eejax.export(small_bundle(), place, layers=["stablehlo", "export"])
    return place


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place, tmp_path / "copy")


@pytest.mark.parametrize("layer", ["stablehlo", "export"])
def test_a_layer_takes_the_exits_of_the_reference(place, layer):
    bundle, images = small_bundle(), some_images(4, 300)
    artifact = eejax.load(place, layer)
    assert artifact.layer == layer
    for count in (1, 7, 300):
        expected = reference(bundle, images[:count], bundle.thresholds)
        prediction = artifact.predict(images[:count])
        np.testing.assert_array_equal(prediction.exits, expected.exits)
        np.testing.assert_array_equal(prediction.labels, expected.logits.argmax(-1))
        np.testing.assert_allclose(prediction.logits, expected.logits, rtol=1e-4, atol=1e-5)
    last = artifact.predict(images[:3], [np.inf, np.inf])
    assert last.exits.tolist() == [2, 2, 2]


def test_the_stages_are_those_of_the_network(place):
    """Stage after stage on 32 images, by the programs alone."""
    found, bundle = manifest.read(place), small_bundle()
    images = some_images(5, 32)
    weights = reading.Artifact(found, "stablehlo")._weights
    limits = jnp.asarray(found.thresholds)
    samples = [jnp.asarray(images)]
    answers = []
    for e in (1, 2, 3):
        name = f"stablehlo/cpu_stage{e}_32.mlirbc"
        program, reads = reading.stored(found.file(name), found.content["programs"][name])
        given = {**weights, "thresholds": limits, "images": images}
        given |= {f"in{i}": x for i, x in enumerate(samples)}
        logits, leaves, *samples = jax.jit(stablehlo.call(program))(*(given[n] for n in reads))
        answers.append((np.asarray(logits), np.asarray(leaves)))
    expected = reference(bundle, images, bundle.thresholds)
    exits = np.stack([leaves for _, leaves in answers]).argmax(0)
    np.testing.assert_array_equal(exits, expected.exits)
    logits = np.stack([logits for logits, _ in answers])[exits, np.arange(32)]
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_every_platform_has_its_programs_and_no_file_holds_a_path(place):
    found = manifest.read(place)
    programs = found.content["programs"]
    for platform in ("cpu", "cuda", "tpu"):
        kinds = {(p["stage"], p["batch"]) for p in programs.values() if p["platform"] == platform}
        assert kinds == {(None, 1), (None, 32), (None, 256), (1, 32), (2, 32), (3, 32)}
    for name in programs:
        data = found.file(name)
        assert b"StableHLO_v1.0.0" in data[:40]
        assert b"/eejax/" not in data
        assert b"site-packages" not in data


def test_neither_flax_nor_the_models_are_loaded(place):
    code = f"""
import sys, numpy, eejax
artifact = eejax.load({str(place)!r})
print(len(artifact.predict(numpy.zeros((1, 12, 12, 3), numpy.uint8)).labels))
print(*[n for n in sys.modules if n.split('.')[0] == 'flax' or n.startswith('eejax.models')])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1"]


def test_load_opens_a_bundle_too(tmp_path):
    bundles.save(small_bundle(), tmp_path / "bundle")
    assert isinstance(eejax.load(tmp_path), eejax.Bundle)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    eejax.export(small_bundle(), tmp_path / "a", layers=["onnx"])
    with pytest.raises(
        ValueError, match=r"holds onnx and no programs for JAX; run it by eejax\.run"
    ):
        eejax.load(tmp_path / "a")
    eejax.export(small_bundle(), tmp_path / "a", layers=["export"])
    assert eejax.load(tmp_path / "a").layer == "export"
    with pytest.raises(ValueError, match="holds no onnx/single"):
        runtime.load(tmp_path / "a").predict(some_images(1, 1))


def test_what_does_not_fit_or_is_damaged_is_refused_before_it_is_parsed(copy):
    artifact = eejax.load(copy)
    for images in (np.zeros((0, 12, 12, 3), np.uint8), np.zeros((1, 12, 12, 3), np.float32)):
        with pytest.raises(ValueError, match=r"give uint8 \[B, 12, 12, 3\] in 0\.\.255"):
            artifact.predict(images)
    with pytest.raises(ValueError, match="3 thresholds for 3 exits"):
        artifact.predict(some_images(1, 1), [1, 2, 3])
    for name in ("weights.safetensors", "stablehlo/cpu_fused_1.mlirbc"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} .*is damaged"):
            eejax.load(copy).predict(some_images(1, 1))
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)

    whole = json.loads((copy / "manifest.json").read_text())
    del whole["content"]["programs"]["stablehlo/cpu_fused_1.mlirbc"]
    whole["content_sha256"] = manifest.content_hash(whole["content"])
    (copy / "manifest.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="has no program for 1 images on cpu"):
        eejax.load(copy).predict(some_images(1, 1))


@pytest.mark.parametrize(("days", "said"), [(20, "expires in 20 days"), (-3, "expires 3 days ago")])
def test_an_expiry_is_told_before_it_comes(copy, days, said):
    whole = json.loads((copy / "manifest.json").read_text())
    expires = datetime.date.today() + datetime.timedelta(days)
    whole["content"]["exported"]["expires"] = expires.isoformat()
    whole["content_sha256"] = manifest.content_hash(whole["content"])
    (copy / "manifest.json").write_text(json.dumps(whole))
    with pytest.warns(UserWarning, match=said):
        eejax.load(copy, "export")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eejax.load(copy)


def test_the_command_verifies_the_layers(place, capsys):
    assert commands.main(["verify", str(place), "--jax"]) == 0
    out = capsys.readouterr().out
    assert "stablehlo: 32 recorded images, 0 other exits" in out
    assert "export: 32 recorded images, 0 other exits" in out
    assert "onnx:" not in out


def test_a_stored_program_is_part_of_another():
    def function(tree, unused, x):
        return {"sum": tree["a"] + x, "product": tree["b"] * x}

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    program = stablehlo.portable(function, {"a": shape, "b": shape}, shape, shape, platform="cpu")
    assert program.reads == (0, 1, 3)
    run = stablehlo.call(program)

    @jax.jit
    def twice(a, b, x):
        product, total = run(a, b, x + 1)
        return run(a, b, total)[0] - product

    a, b, x = (jnp.arange(3.0) + i for i in range(3))
    expected = b * (a + x + 1) - b * (x + 1)
    np.testing.assert_allclose(twice(a, b, x), expected)
