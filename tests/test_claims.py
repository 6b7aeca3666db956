"""Gradients, gap and convergence with and without early exits, on a tiny setting."""

import json

import jax
import numpy as np
import pytest

from experiments import claims

TINY = ["--depth", "6", "--width", "4", "--exits", "2", "--epochs", "1", "--seeds", "0", "1"]
TINY += ["--data.limit", "128"]


def test_early_exits_are_spread_evenly():
    assert claims.early_exits(16, 3) == [3, 7, 11]
    assert claims.early_exits(6, 2) == [1, 3]


def test_rows_hold_both_networks_for_every_seed(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert claims.main([*TINY, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(r["seed"], r["exits"]) for r in rows] == [
        (0, [6]),
        (0, [2, 4, 6]),
        (1, [6]),
        (1, [2, 4, 6]),
    ]
    for row in rows:
        assert np.shape(row["gradients"]) == (2, 6)
        assert np.shape(row["test_accuracy"]) == np.shape(row["train_loss"]) == (2,)
        assert {"device", "versions", "command", "date"} <= set(row)
    for plain, exits in (rows[:2], rows[2:]):
        # The same parameters at first: equal loss at the last exit, and equal gradients after the
        # last early exit, where it alone is read.
        assert plain["train_loss"][0] == pytest.approx(exits["train_loss"][0])
        np.testing.assert_allclose(plain["gradients"][0][4:], exits["gradients"][0][4:], rtol=1e-3)
        assert exits["gradients"][0][0] > 2 * plain["gradients"][0][0]
        assert exits["gradients"][1] != exits["gradients"][0], "it trains"
    assert rows[0]["gradients"] != rows[2]["gradients"], "the seeds differ"
    shown = capsys.readouterr().out
    assert "train - test, points" in shown
    mean = np.mean([row["gradients"][0][0] for row in rows[::2]])
    assert f"{mean:.2e}" in shown


def test_normalisation_is_a_flag():
    parse = claims.parse(claims.Arguments, "claims", [*TINY, "--norm"], claims.Arguments())
    dataset = claims.splits.load(parse.data, 0)
    network = claims.build(parse, dataset)
    shapes = jax.eval_shape(network.init, jax.random.key(0), dataset.train.images[:1])
    assert set(shapes["params"]["stages"][0]["blocks_0"]) == {"conv", "bn"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--exits", "6"], "fewer than 6"),
        (["--batch", "4000"], "batch: 4000"),
        (["--epochs", "0"], "epochs: 0"),
        (["--optimiser", "muon"], "muon"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert claims.main([*TINY, *flags]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message


def test_help_names_the_claims(capsys):
    with pytest.raises(SystemExit) as stop:
        claims.main(["--help"])
    assert stop.value.code == 0
    assert "gradient norms by depth" in " ".join(capsys.readouterr().out.split())
