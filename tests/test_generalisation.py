"""The command that judges thresholds on new data: its rows and its refusals."""

import json

import numpy as np
import pytest

from eejax.selection.frontier import Frontier
from experiments import generalisation

DRAWS = ["--samples", "60", "--splits", "3", "--budgets", "0.5", "--drops", "0.02"]


def test_rows_judge_every_search_on_the_samples_it_did_not_see(digits_run, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert generalisation.main(["--run", str(digits_run), *DRAWS, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    budgets = [row for row in rows if row["kind"] == "budget"]
    assert [row["method"] for row in budgets] == ["outcomes", "geometric", "shared", "default"]
    best = max(row["accuracy"] for row in budgets[:-1])
    assert budgets[-1]["against_best"] == pytest.approx(budgets[-1]["accuracy"] - best)
    drops = {row["method"]: row for row in rows if row["kind"] == "drop"}
    assert set(drops) == {"outcomes", "shared", "confidence 0.5", "confidence 0.9"}
    # A drop that is to be kept more often is not cheaper.
    assert drops["confidence 0.9"]["cost"] >= drops["confidence 0.5"]["cost"]
    assert all({"device", "versions", "command", "date"} <= set(row) for row in rows)
    assert f"{100 * budgets[-1]['accuracy']:.2f}" in capsys.readouterr().out


def test_a_draw_is_judged_on_all_other_samples():
    """Scores say nothing, and the samples differ: a leak would show in what is judged."""
    random = np.random.default_rng(0)
    outcomes = Frontier(
        random.normal(size=(50, 2)).astype(np.float32),
        random.integers(0, 2, (50, 2)).astype(np.float64),
        np.array([0.5, 1.0]),
    )
    arguments = generalisation.Arguments((), samples=(20,), budgets=(1.0,), drops=(1.0,))
    judged = generalisation.judged(outcomes, 20, arguments, 3)
    rest = np.random.default_rng((0, 20, 3)).permutation(50)[20:]
    last = outcomes.accuracy[rest, -1].mean()
    for loss, _, accuracy in judged.values():
        assert loss == pytest.approx(last - accuracy)
    # A drop of everything is free: all samples leave where it costs least.
    _, cost, accuracy = judged["drop", 1.0, "shared"]
    assert (cost, accuracy) == (0.5, pytest.approx(outcomes.accuracy[rest, 0].mean()))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "at least one directory"),
        (["--run", "nowhere"], "experiments.cifar"),
        (["--run", "nowhere", "--splits", "1"], "splits: 1"),
        (["--run", "nowhere", "--budgets", "2"], "budgets"),
        (["--run", "nowhere", "--confidence", "0.2"], "confidence"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert generalisation.main(flags) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message
