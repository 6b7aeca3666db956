"""The commands around the latency benchmark: what they print, and how they refuse."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import toys

from eejax import max_prob
from eejax.inference import deadline as inference_deadline
from experiments import deadlines, microbenchmarks
from experiments.latency.workload import Workload


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
        (["--calls", "0"], "calls: 0"),
        (["--milliseconds", "-1"], "positive numbers"),
        (["--depth", "7"], "6n + 2"),
        (["--network", "fast", "--depth", "7"], "the family fast takes no depth"),
        (["--network", "nonsense"], "nonsense"),
        (["--run", "nowhere"], "experiments.cifar"),
        (["--json", "nowhere/rows.json"], "no directory nowhere"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert deadlines.main(flags) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message


def test_default_deadlines_count_the_time_outside_of_the_stages_once(monkeypatch):
    """On a clock that every look at it sets forward by a second.

    Each stage is then one second, and a call two more: from its begin to its first stage, and from
    its last stage to its end.
    """
    clock = [0.0]

    def tick():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(inference_deadline, "time", SimpleNamespace(perf_counter=tick))
    network, images = toys.network(3), toys.some_images(0, 2)
    scores = np.zeros((2, 3), np.float32)
    workload = Workload("toy", network, toys.variables(network), max_prob, images, scores)
    rows = deadlines.measure(workload, (), 2)
    expected = [0.5 * 3000, 1.1 * 3000, 1.1 * 4000, 1.1 * 5000]
    assert [row["deadline_ms"] for row in rows] == pytest.approx(expected)


def test_every_family_may_be_served(capsys):
    assert deadlines.main(["--network", "lenet", "--calls", "2"]) == 0
    assert "random lenet" in capsys.readouterr().out


def test_a_microbenchmark_prints_its_figures(capsys):
    assert microbenchmarks.main(["scores"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("scores: ")
    assert [line.split()[-1] for line in shown[1:]] == ["us", "us"]


def test_a_microbenchmark_that_does_not_exist_is_refused(capsys):
    assert microbenchmarks.main(["nonsense"]) == 2
    assert "no microbenchmark nonsense; give some of dispatch" in capsys.readouterr().err
    assert microbenchmarks.main(["--help"]) == 0
    assert "packing" in capsys.readouterr().out
