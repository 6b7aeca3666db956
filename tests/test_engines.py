"""Engines timed against each other, each in a process of its own."""

import json

import numpy as np
import pytest

from experiments import engines


def test_engines_agree_and_are_timed(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    argv = ["--network", "lenet", "--exits", "1", "--batches", "1", "6", "--rounds", "1"]
    argv += ["--mixture", "0.5,0.5", "--agree", "16", "--json", str(rows)]
    assert engines.main(argv) == 0
    assert "xla, onnxruntime, 16 images: 0 other labels, 0 other exits" in capsys.readouterr().out
    agreement, *timed = json.loads(rows.read_text())
    assert agreement["largest_difference"] < 1e-3
    assert [(row["engine"], row["batch"]) for row in timed] == [
        (engine, batch) for batch in (1, 6) for engine in ("xla", "onnxruntime")
    ]
    for row in timed:
        assert row["shares"] == [0.5, 0.5]
        assert len(row["exits_ms"]) == 2
        ideal = row["plain_ms"] * (0.5 * row["exits_ms"][0] / row["exits_ms"][1] + 0.5)
        np.testing.assert_allclose(row["ideal_ms"], ideal)
        np.testing.assert_allclose(row["efficiency"], ideal / row["mixture_ms"])
        np.testing.assert_allclose(row["speedup"], row["plain_ms"] / row["mixture_ms"])


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


def test_a_failure_of_an_engine_is_told(tmp_path):
    contender = engines.Contender("onnxruntime", tmp_path)
    with pytest.raises(RuntimeError, match=r"onnxruntime: .*holds no manifest\.json"):
        contender.ask("predict", None, None)
    contender.end()
