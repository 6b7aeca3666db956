"""The load benchmark: what becomes of requests. No time is asserted."""

import asyncio
import json

import numpy as np
import pytest

from eejax.serving import Answer, Refusal
from experiments.serving import __main__ as serving
from experiments.serving.contenders import ENGINES, NAMES
from experiments.serving.load import offered, summary


@pytest.mark.parametrize("engine", ENGINES)
def test_every_contender_has_a_row_at_every_load(digits_run, engine, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    argv = [
        "--run",
        str(digits_run),
        "--loads",
        "0.01",
        "0.02",
        "--seconds",
        "0.2",
        "--rounds",
        "2",
    ]
    argv += ["--engine", engine]
    argv += ["--milliseconds", "60000", "--json", str(rows)]
    assert serving.main(argv) == 0
    found = json.loads(rows.read_text())
    assert [(row["load"], row["contender"]) for row in found] == [
        (load, name) for load in (0.01, 0.02) for name in NAMES
    ]
    for row in found:
        # A minute is enough for a few images on any machine.
        assert (row["answered"], row["refused"], row["late"], row["partial"]) == (1, 0, 0, 0)
        assert sum(row["exits"]) == row["requests"]
        assert 0 < row["p50"] <= row["p99"]
    whole, _, _, batcher = (row["accuracy"] for row in found[:4])
    assert whole == batcher
    said = capsys.readouterr().out
    assert "load 0.02" in said
    for name in ("whole network", "dynamic batcher"):
        assert f"  {name}: a load of 0.02" in said


def test_requests_come_when_they_come_and_all_is_counted():
    """Every fourth request is refused, every fourth answered late; nobody waits for another."""
    seen = []

    async def predict(arrays, seconds):
        number = int(arrays[0][0, 0, 0, 0])
        seen.append((number, seconds))
        if number % 4 == 0:
            raise Refusal("full", "full")
        if number % 4 == 1:
            await asyncio.sleep(1.2)
        return Answer(np.eye(2)[number % 2], number % 3, number % 4 == 1, 1)

    images = np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1)
    labels = np.arange(40) % 2
    labels[[2, 6]] = 1  # two that are answered wrongly
    arrivals = np.linspace(0, 0.1, 40)
    row = summary([asyncio.run(offered(predict, images, labels, 1.0, arrivals))])
    assert [number for number, _ in seen] == list(range(40))
    assert all(seconds <= 1.0 for _, seconds in seen)
    assert row["requests"] == 40
    assert (row["answered"], row["refused"]) == (0.75, 0.25)
    assert row["late"] >= 0.25
    assert row["accuracy"] == pytest.approx(28 / 30)
    assert row["partial"] == pytest.approx(1 / 3)
    assert row["level"] == 1
    assert sum(row["exits"]) == 30


def row(load, name, **changes):
    return {"load": load, "contender": name, "answered": 1, "p99": 0.09, "accuracy": 0.9, **changes}


def test_a_load_is_held_only_with_all_before_it():
    early = "early exits"
    rows = [row(load, name) for load in (0.5, 1.0, 2.0) for name in NAMES]
    for broken in ({"answered": 0.98}, {"p99": 0.11}, {"accuracy": 0.88}):
        changed = [
            {**r, **broken} if (r["load"], r["contender"]) == (1.0, early) else r for r in rows
        ]
        said = serving.held(changed, 0.1, 0.01)
        assert f"  {early}: a load of 0.5" in said
        assert said.count("a load of 2") == len(NAMES) - 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--loads", "0"], "loads: 0"),
        (["--seconds", "0"], "seconds: 0"),
        (["--rounds", "0"], "rounds: 0"),
        (["--milliseconds", "-1"], "milliseconds: -1"),
        (["--drop", "1"], "drop: 1"),
        (["--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        ([], "/nowhere"),
    ],
)
def test_a_mistake_is_a_line(argv, said, capsys):
    assert serving.main(["--run", "/nowhere", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
