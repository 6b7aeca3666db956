"""int8 models: what is quantised, what is not, and the command that chooses thresholds again."""

import dataclasses
import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import reference, small_bundle, some_images

import eejax
from eejax import commands, runtime
from eejax.artifact.writing import models
from eejax.onnx.quantising import chained, quantised
from experiments import quantise


@pytest.fixture(scope="module")
def stages():
    return models(small_bundle()), models(small_bundle(), some_images(21, 100))


def test_convolutions_are_in_int8_and_decisions_are_not(stages):
    for stage, small in zip(*stages, strict=True):
        onnx.checker.check_model(small)
        weights = {i.name: i.data_type for i in small.graph.initializer}
        maker = {name: node for node in small.graph.node for name in node.output}

        def is_int8(name, weights=weights, maker=maker):
            node = maker.get(name)
            return node is not None and weights.get(node.input[0]) == onnx.TensorProto.INT8

        convolutions = [node for node in small.graph.node if node.op_type == "Conv"]
        assert len(convolutions) == sum(node.op_type == "Conv" for node in stage.graph.node)
        assert all(is_int8(node.input[1]) for node in convolutions)
        linear = [node for node in small.graph.node if node.op_type in ("MatMul", "Gemm")]
        assert linear
        assert not any(is_int8(name) for node in linear for name in node.input)
        assert [o.name for o in small.graph.output] == [o.name for o in stage.graph.output]


def test_answers_are_close_to_those_of_float32(stages):
    images = some_images(22, 60)
    whole, small = (list(chained(s, [images[:40], images[40:]], [0.0, 0.0])) for s in stages)
    for (expected, _), (got, leaves) in zip(whole, small, strict=True):
        assert got.shape == expected.shape == (60, 10)
        assert leaves.shape == (60,)
        # Noise on random weights: labels are those of float32 for most.
        assert np.abs(got - expected).mean() < 0.1 * np.abs(expected).mean()
        assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.8
    np.testing.assert_array_equal(
        np.concatenate([s[1][:, None] for s in small], 1)[:, -1], np.ones(60, bool)
    )
    with pytest.raises(ValueError, match="no images to quantise with"):
        quantised(stages[0], images[:0])


def test_an_int8_artifact_is_verified_and_smaller(tmp_path):
    bundle, images = small_bundle(), some_images(23, 100)
    eejax.export(bundle, tmp_path / "a", layers=["onnx"], quantise=images)
    loaded = runtime.load(tmp_path / "a", 1)
    assert loaded.manifest.content["precision"] == "int8"
    assert commands.main(["verify", str(tmp_path / "a"), "--threads", "1"]) == 0
    shown = some_images(24, 50)
    prediction = loaded.predict(shown)
    expected = reference(bundle, shown, bundle.thresholds)
    assert (prediction.labels == expected.logits.argmax(-1)).mean() > 0.7
    with pytest.raises(ValueError, match=r'in int8; give \["onnx"\]'):
        eejax.export(bundle, tmp_path / "b", quantise=images)


def test_the_command_chooses_thresholds_again_and_times_four_corners(digits_run, tmp_path, capsys):
    rows, picture = tmp_path / "rows.json", tmp_path / "corners.svg"
    argv = ["--run", str(digits_run), "--to", str(tmp_path / "artifact"), "--batches", "1", "8"]
    argv += ["--rounds", "1", "--json", str(rows), "--picture", str(picture), "--budget", "0.7"]
    assert quantise.main(argv) == 0
    assert "early exits" in capsys.readouterr().out
    found = json.loads(rows.read_text())
    corners = [(row["precision"], row["network"]) for row in found]
    assert corners == [(p, n) for p in ("float32", "int8") for n in ("whole", "early exits")]
    for row in found:
        assert 0.3 < row["accuracy"] <= 1
        assert row["ms_1"] > 0
        assert row["ms_8"] > 0
    assert found[0]["cost"] == 1
    assert all(0 < row["cost"] < 0.9 for row in found[1::2])
    assert picture.read_text().count("<svg") == 1
    manifest = runtime.read(tmp_path / "artifact")
    assert manifest.content["precision"] == "int8"
    before = eejax.load(digits_run)
    assert manifest.thresholds.tolist() != before.thresholds.tolist()


def test_a_policy_that_needs_a_gate_is_refused():
    bundle = dataclasses.replace(small_bundle(), policy=eejax.gate)
    nothing: Any = None
    with pytest.raises(ValueError, match="the policy gate needs a learned gate"):
        quantise.decided(bundle, nothing, None, 0.5)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--to", "x"], "--run"),
        (["--run", "/nowhere", "--to", "x"], "/nowhere"),
        (["--run", "x", "--to", "x", "--budget", "1.5"], "budget: 1.5"),
        (["--run", "x", "--to", "x", "--rounds", "0"], "rounds: 0"),
    ],
)
def test_a_mistake_is_a_line(argv, said, capsys):
    assert quantise.main(argv) == 2
    assert said in capsys.readouterr().err
