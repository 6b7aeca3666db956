"""The commands around the latency benchmark: what they print, and how they refuse."""

import json

import pytest

from experiments import deadlines
from experiments import microbenchmarks as trials


def test_deadlines_are_reported(digits_run, tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--run", str(digits_run), "--milliseconds", "0.001", "60000", "--calls", "5"]
    assert deadlines.main([*flags, "--json", str(path)]) == 0
    short, long = json.loads(path.read_text())
    assert short["late"] == 1.0  # no first stage is that quick
    assert short["exit_fractions"] == [1, 0, 0, 0]
    assert long["late"] == 0
    assert long["exit_fractions"] == [0, 0, 0, 1]
    for row in (short, long):
        assert row["median_ms"] <= row["p99_ms"] <= row["longest_ms"]
        assert {"network", "device", "versions", "command", "date", "seed"} <= set(row)
    assert "deadline ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calls", "0"], "positive numbers"),
        (["--milliseconds", "-1"], "positive numbers"),
        (["--depth", "7"], "6n + 2"),
        (["--network", "fast", "--depth", "7"], "the family fast takes none"),
        (["--network", "fast", "--json", "nowhere/rows.json"], "no such directory"),
        (["--run", "nowhere"], "experiments.cifar"),
        (["--json", "nowhere/rows.json"], "no such directory"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert deadlines.main(flags) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message


def test_a_trial_prints_its_figures(capsys):
    assert trials.main(["scores"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("scores: ")
    assert [line.split()[-1] for line in shown[1:]] == ["us", "us"]


def test_a_trial_that_does_not_exist_is_refused(capsys):
    assert trials.main(["nonsense"]) == 2
    assert "no trial nonsense; give some of arguments" in capsys.readouterr().err
    assert trials.main(["--help"]) == 0
    assert "packing" in capsys.readouterr().out
