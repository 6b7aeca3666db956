"""Engines timed against each other, each in a process of its own."""

import importlib.util
import json

import numpy as np
import pytest

from experiments.engines import __main__ as engines
from experiments.engines.contenders import Contender


def test_engines_agree_and_are_timed(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    argv = ["--network", "lenet", "--exits", "1", "--batches", "1", "6", "--rounds", "1"]
    argv += ["--mixture", "0.5,0.5", "--agree", "16", "--json", str(rows)]
    assert engines.main(argv) == 0
    *agreement, _, _, _, _ = found = json.loads(rows.read_text())
    timed = found[len(agreement) :]
    assert [(row["how"], row["other_labels"], row["other_exits"]) for row in agreement] == [
        ("at once", 0, 0),
        ("one by one", 0, 0),
    ]
    assert all(row["largest_difference"] < 1e-3 for row in agreement)
    assert "xla, onnxruntime, 16 images at once: 0 other labels" in capsys.readouterr().out
    assert [(row["engine"], row["batch"]) for row in timed] == [
        (engine, batch) for batch in (1, 6) for engine in ("xla", "onnxruntime")
    ]
    for row in timed:
        assert row["shares"] == row["left"] == [0.5, 0.5]
        assert len(row["exits_ms"]) == 2
        ideal = row["plain_ms"] * (0.5 * row["exits_ms"][0] / row["exits_ms"][1] + 0.5)
        np.testing.assert_allclose(row["ideal_ms"], ideal)
        np.testing.assert_allclose(row["efficiency"], ideal / row["mixture_ms"])
        np.testing.assert_allclose(row["speedup"], row["plain_ms"] / row["mixture_ms"])
        best = min(other["plain_ms"] for other in timed if other["batch"] == row["batch"])
        np.testing.assert_allclose(row["on_best"], best / row["mixture_ms"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batches", "0"], "batches: 0 cannot be used"),
        (["--rounds", "0"], "rounds: 0 cannot be used"),
        (["--agree", "-1"], "agree: -1 cannot be used"),
        (["--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--network", "lenet", "--exits", "1", "--mixture", "1,0,0"], "3 for 2 exits"),
        (["--run", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_a_line(argv, said, capsys):
    assert engines.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "network", [["--depth", "8"], ["--network", "fast"]], ids=["resnet", "fast"]
)
def test_pytorch_and_earlyon_run_the_same_network(network, capsys):
    pytest.importorskip("earlyon", reason="pip install torch earlyon")
    argv = [*network, "--exits", "1", "2", "--batches", "1", "4", "--rounds", "1"]
    argv += ["--mixture", "0.5,0.25,0.25", "--agree", "32"]
    assert engines.main([*argv, "--engines", "xla", "pytorch", "earlyon"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    for name in ("pytorch", "earlyon"):
        assert f"xla, {name}, 32 images one by one: 0 other labels, 0 other exits" in said


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engines.main(["--engines", "earlyon"]) == 2
    assert "no module torch; pip install torch" in capsys.readouterr().err


def test_a_failure_of_an_engine_is_told(tmp_path):
    contender = Contender("onnxruntime", tmp_path)
    with pytest.raises(RuntimeError, match=r"onnxruntime: .*holds no manifest\.json"):
        contender.ask("predict", None, 1, None)
    contender.end()
