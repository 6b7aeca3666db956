"""The path of ever lower thresholds, and the held-out samples that it comes from."""

import dataclasses
import json

import numpy as np
import pytest
from onnx_models import small_bundle

import eejax
from eejax import bundle as bundles
from eejax import commands, policies, runtime
from eejax.evaluation.routing import first_exit
from eejax.runtime import HeldOut, manifest
from eejax.selection.lowering import lowered
from eejax.serving import levels
from eejax.trace import recorded

SEED = 20261128
COST = np.array([0.3, 0.6, 1.0])


@pytest.fixture(scope="module")
def held_out():
    print(f"seed {SEED}")
    random = np.random.default_rng(SEED)
    count, classes = 2000, 4
    labels = random.integers(0, classes, count)
    strength = np.array([0.8, 1.2, 1.6])[None, :, None]
    signal = 2 * strength * np.eye(classes)[labels][:, None]
    logits = random.normal(size=(count, 3, classes)) + signal
    scored = eejax.score(policies.max_prob, recorded(logits.astype(np.float32), labels))
    return HeldOut(scored.scores, scored.predictions == labels[:, None])


@pytest.fixture(scope="module")
def bundle(held_out):
    small = small_bundle()
    chosen = eejax.for_budget(held_out.scores, held_out.correct, small.costs.fractions, 0.9)
    return dataclasses.replace(small, held_out=held_out, thresholds=chosen.thresholds)


@pytest.fixture
def exported(bundle, tmp_path):
    eejax.export(bundle, tmp_path / "artifact", layers=["onnx"])
    return tmp_path / "artifact"


def test_the_path_begins_with_the_chosen_thresholds_and_loses_no_more_than_it_may(held_out):
    chosen = eejax.for_budget(held_out.scores, held_out.correct, COST, 0.8).thresholds
    path = lowered(held_out, COST, chosen, 0.01)
    np.testing.assert_array_equal(path[0].thresholds, chosen)
    assert len(path) > 2
    exits = [first_exit(held_out.scores, level.thresholds) for level in path]
    costs = [COST[e].mean() for e in exits]
    assert costs == sorted(costs, reverse=True)
    for level, leaves in zip(path[1:], exits[1:], strict=True):
        accuracy = held_out.correct[np.arange(len(leaves)), leaves].mean()
        assert accuracy >= held_out.correct[:, -1].mean() - 0.01
        assert level.goes_on[0] == pytest.approx((leaves > 0).mean())
    assert len(lowered(held_out, COST, chosen, 0.05)) > len(path)
    with pytest.raises(ValueError, match=r"drop of 1\.5"):
        lowered(held_out, COST, chosen, 1.5)


def test_a_bundle_and_its_artifact_keep_the_held_out_samples(bundle, held_out, exported, tmp_path):
    bundles.save(bundle, tmp_path / "bundle")
    for kept in (eejax.load(tmp_path / "bundle").held_out, runtime.read(exported).held_out()):
        assert kept is not None
        np.testing.assert_array_equal(kept.scores, held_out.scores)
        np.testing.assert_array_equal(kept.correct, held_out.correct)
        assert (kept.scores.dtype, kept.correct.dtype) == (np.float32, bool)


def test_the_artifact_holds_the_path(bundle, held_out, exported):
    path = levels(runtime.read(exported))
    expected = lowered(held_out, bundle.costs.fractions, bundle.thresholds, 0.01)
    assert len(path) > 1
    for stored, level in zip(path, expected, strict=True):
        np.testing.assert_array_equal(stored.thresholds, level.thresholds)
        np.testing.assert_allclose(stored.goes_on, level.goes_on)


def test_without_held_out_samples_there_are_the_chosen_thresholds_alone(tmp_path):
    eejax.export(small_bundle(), tmp_path / "artifact", layers=["onnx"])
    found = runtime.read(tmp_path / "artifact")
    (only,) = levels(found)
    np.testing.assert_array_equal(only.thresholds, small_bundle().thresholds)
    assert found.held_out() is None


@pytest.mark.parametrize("shape", [(5, 2), (5,), (0, 3)])
def test_held_out_samples_of_other_exits_are_refused(shape):
    held_out = HeldOut(np.zeros(shape), np.zeros(shape, bool))
    with pytest.raises(ValueError, match="held-out scores"):
        dataclasses.replace(small_bundle(), held_out=held_out)
    with pytest.raises(ValueError, match="held-out outcomes"):
        dataclasses.replace(small_bundle(), held_out=HeldOut(np.zeros((5, 3)), np.zeros((5, 3))))


def changed(place, change):
    whole = json.loads((place / "manifest.json").read_text())
    change(whole["content"])
    whole["content_sha256"] = manifest.content_hash(whole["content"])
    (place / "manifest.json").write_text(json.dumps(whole))


def test_levels_that_do_not_fit_are_refused(exported):
    changed(exported, lambda content: content["levels"][1]["goes_on"].append(0.5))
    with pytest.raises(ValueError, match="levels"):
        levels(runtime.read(exported))


def test_held_out_files_that_do_not_fit_each_other_are_refused(exported):
    data = bytes(7)
    (exported / "held_out" / "correct.bin").write_bytes(data)
    entry = {"bytes": len(data), "sha256": manifest.sha256(data)}
    changed(exported, lambda content: content["files"].update({"held_out/correct.bin": entry}))
    with pytest.raises(ValueError, match="fit each other"):
        runtime.read(exported).held_out()


def test_the_command_takes_the_drop(bundle, tmp_path):
    bundles.save(bundle, tmp_path / "bundle")
    lengths = []
    for drop in ("0", "0.2"):
        argv = ["export", str(tmp_path / "bundle"), "--to", str(tmp_path / "a")]
        assert commands.main([*argv, "--layers", "onnx", "--drop", drop]) == 0
        lengths.append(len(levels(runtime.read(tmp_path / "a"))))
    assert lengths[0] < lengths[1]
