"""The load benchmark: what becomes of requests, and the path of thresholds. No time is asserted."""

import asyncio
import json

import numpy as np
import pytest

import eejax
from eejax import policies
from eejax.evaluation.routing import route
from eejax.serving import Answer, Refusal
from eejax.trace import recorded
from experiments.serving import __main__ as serving
from experiments.serving.contenders import NAMES, path
from experiments.serving.load import offered


def test_every_contender_has_a_row_at_every_load(digits_run, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    argv = ["--run", str(digits_run), "--loads", "0.01", "0.02", "--seconds", "0.5"]
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
    assert "load 0.02" in capsys.readouterr().out


def test_requests_come_when_they_come_and_all_is_counted():
    """Every fourth request is refused, every fourth answered late; nobody waits for another."""
    seen = []

    async def predict(image, seconds):
        number = int(image[0, 0, 0, 0])
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
    row = asyncio.run(offered(predict, images, labels, 1.0, arrivals))
    assert [number for number, _ in seen] == list(range(40))
    assert all(seconds <= 1.0 for _, seconds in seen)
    assert row["requests"] == 40
    assert (row["answered"], row["refused"]) == (0.75, 0.25)
    assert row["late"] >= 0.25
    assert row["accuracy"] == pytest.approx(28 / 30)
    assert row["partial"] == pytest.approx(1 / 3)
    assert row["level"] == 1
    assert sum(row["exits"]) == 30


def test_the_path_begins_with_the_chosen_thresholds_and_loses_no_more_than_it_may():
    random = np.random.default_rng(20261128)
    count, classes = 2000, 4
    labels = random.integers(0, classes, count)
    strength = np.array([0.8, 1.2, 1.6])[None, :, None]
    logits = (
        random.normal(size=(count, 3, classes)) + 2 * strength * np.eye(classes)[labels][:, None]
    )
    trace = recorded(logits.astype(np.float32), labels)
    scored = eejax.score(policies.max_prob, trace)
    cost = np.array([0.3, 0.6, 1.0])
    correct = scored.predictions == labels[:, None]
    chosen = eejax.for_budget(scored.scores, correct, cost, 0.8).thresholds
    levels = path(scored, labels, cost, chosen, 0.01)
    np.testing.assert_array_equal(levels[0].thresholds, chosen)
    assert len(levels) > 2
    costs = [cost[route(scored, level.thresholds).exits].mean() for level in levels]
    assert costs == sorted(costs, reverse=True)
    for level in levels[1:]:
        routed = route(scored, level.thresholds)
        accuracy = (routed.logits.argmax(-1) == labels).mean()
        assert accuracy >= correct[:, -1].mean() - 0.01
        assert level.goes_on[0] == pytest.approx((routed.exits > 0).mean())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--loads", "0"], "loads: 0"),
        (["--seconds", "0"], "seconds: 0"),
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
