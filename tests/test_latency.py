"""The latency benchmark: what it sends where, what its rows say, and how it fails. Never a time."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import eejax
from eejax import benchmark
from eejax.benchmark import BenchmarkEntry
from eejax.inference import EXECUTORS
from experiments.latency import __main__ as latency
from experiments.latency import rows as latency_rows
from experiments.latency.arguments import parse
from experiments.latency.distributions import exit_counts, exit_rates, imposed_thresholds
from experiments.latency.rows import Plain, break_even

KEYS = {
    *("network", "strategy", "batch", "distribution", "ms", "spread", "plain_ms", "ideal_ms"),
    *("efficiency", "speedup", "plain_best_ms", "plain_best_batch", "ideal_best_ms"),
    *("efficiency_best", "speedup_best", "break_even", "peak_bytes", "exit_fractions"),
    *("device", "seed", "versions", "command", "date"),
}
TINY = ["--network", "fast", "--width", "2", "--image-size", "8", "--repeats", "2"]
TINY += ["--exits", "3", "--plain-batches", "1"]


def rows_in(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def left(scores, limits):
    reached = np.concatenate([scores[:, :-1] >= limits, np.ones((len(scores), 1), bool)], axis=1)
    return np.bincount(reached.argmax(1), minlength=scores.shape[1]).tolist()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("latency")
    flags = [
        *("--batches", "1", "4", "--images", "12"),
        *("--strategies", "full", "cond", "compact", "host", "stream", "auto"),
        *("--distributions", "trained", "first", "last", "0.25,0.75"),
        *("--json", str(path / "rows.json"), "--picture", str(path / "picture.svg")),
    ]
    assert latency.main([*TINY, *flags]) == 0
    return path


@pytest.fixture(scope="module")
def rows(measured):
    return rows_in(measured / "rows.json")


def test_every_strategy_has_a_row_at_every_batch_and_distribution(rows):
    found = {(row["strategy"], row["batch"], row["distribution"]) for row in rows}
    assert len(found) == len(rows)
    everywhere = ("trained", "first", "last", "0.25,0.75")
    wanted = {
        (s, b, d) for s in ("full", "cond", "compact", "host") for b in (1, 4) for d in everywhere
    }
    assert found == wanted | {
        ("auto", 1, "trained"),
        ("auto", 4, "trained"),
        ("stream", 12, "trained"),
    }


def test_rows_say_everything_and_agree_with_themselves(rows):
    for row in rows:
        assert set(row) >= KEYS
        for name in ("ms", "plain_ms", "plain_best_ms", "ideal_ms", "ideal_best_ms"):
            assert row[name] > 0
        best = row["plain_best_ms"] / row["plain_ms"]
        assert best <= 1
        assert row["speedup"] == pytest.approx(row["plain_ms"] / row["ms"])
        assert row["efficiency"] == pytest.approx(row["ideal_ms"] / row["ms"])
        for name in ("speedup", "efficiency", "ideal"):
            unit = "_ms" if name == "ideal" else ""
            assert row[f"{name}_best{unit}"] == pytest.approx(best * row[name + unit])
        assert row["spread"] >= 0
        assert sum(row["exit_fractions"]) == pytest.approx(1)
        assert row["plain_best_batch"] <= row["batch"]
        if row["distribution"] == "last":
            assert row["ideal_ms"] == pytest.approx(row["plain_ms"])
        if row["batch"] == 1:
            assert row["plain_ms"] == row["plain_best_ms"]
        assert row["command"].startswith("python -m experiments.latency")
        assert (row["strategy"], row["batch"]) != ("cond", 1) or row["overhead_ms"] > 0
        if row["strategy"] in ("full", "cond", "compact"):
            assert row["peak_bytes"] > 0
        if row["strategy"] == "auto":
            assert row["explanation"].startswith(row["chosen"])


def test_images_leave_where_the_distribution_says(rows):
    for row in rows:
        if row["distribution"] == "0.25,0.75":
            assert row["exit_fractions"] == [0.25, 0.75]
        if row["distribution"] in ("first", "last"):
            assert row["exit_fractions"][0 if row["distribution"] == "first" else -1] == 1
        if row["distribution"] == "trained":
            wanted = exit_rates("trained", 2)
            pool = 64 if row["batch"] == 1 else row["batch"]
            np.testing.assert_allclose(row["exit_fractions"], wanted, atol=1 / pool)


def test_the_picture_is_written(measured):
    assert (measured / "picture.svg").read_text().startswith("<?xml")


@pytest.fixture
def one_workload(monkeypatch):
    """The network is built once for all tests that have this."""
    workload = _workload()
    monkeypatch.setattr(latency, "workload", lambda arguments: workload)


@functools.cache
def _workload():
    return latency.workload(parse([*TINY, "--batches", "2", "--images", "8"]))


@pytest.mark.usefixtures("one_workload")
def test_a_strategy_that_fails_costs_its_rows_only(tmp_path, monkeypatch, capsys):

    def broken(*_, **__):
        raise RuntimeError("it is\nbroken")

    monkeypatch.setitem(EXECUTORS, "compact", broken)
    monkeypatch.setattr(eejax, "stream", broken)
    path = tmp_path / "rows.json"
    flags = ["--strategies", "compact", "loop", "stream", "--batches", "2", "--images", "8"]
    flags += ["--distributions", "last", "--json", str(path)]
    assert latency.main([*TINY, *flags]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "not timed: compact at batch 2: RuntimeError: it is",
        "not timed: stream: RuntimeError: it is",
    ]
    assert "runs as compact" in shown.out
    assert [row["strategy"] for row in rows_in(path)] == ["loop"]


@pytest.mark.usefixtures("one_workload")
def test_stopping_leaves_what_was_timed(tmp_path, monkeypatch, capsys):

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency_rows, "_streamed", stopped)
    path = tmp_path / "rows.json"
    flags = ["--strategies", "full", "stream", "--batches", "2", "--images", "8"]
    flags += ["--distributions", "last", "--json", str(path)]
    assert latency.main([*TINY, *flags]) == 130
    assert "stopped" in capsys.readouterr().err
    assert len(rows_in(path)) == 1


def test_a_run_brings_its_network_policy_and_thresholds(digits_run, tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--strategies", "full", "--batches", "450", "--repeats", "1"]
    flags += ["--plain-batches", "450", "--distributions", "trained", "last"]
    assert latency.main(["--run", str(digits_run), *flags, "--json", str(path)]) == 0
    trained, last = rows_in(path)
    assert "digits" in trained["network"]
    assert last["exit_fractions"] == [0, 0, 0, 1]
    # All test images, with the thresholds that the run's bundle holds: those that were given.
    policies = json.loads((digits_run / "report.json").read_text())["policies"]
    given = ("max_prob", {"kind": "given"})
    chosen = next(p for p in policies if (p["name"], p["target"]) == given)
    np.testing.assert_allclose(trained["exit_fractions"], chosen["exit_fractions"], atol=2 / 450)


def test_a_run_without_a_bundle_is_refused(digits_run, tmp_path, capsys):
    shutil.copy(digits_run / "config.json", tmp_path)
    assert latency.main(["--run", str(tmp_path), "--strategies", "full"]) == 2
    assert "holds no bundle" in capsys.readouterr().err


def test_thresholds_give_the_rates_exactly():
    scores = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    for counts in ([80, 50, 30, 40], [0, 100, 0, 100], [200, 0, 0, 0], [0, 0, 0, 200]):
        assert left(scores, imposed_thresholds(scores, np.array(counts))) == counts
    assert imposed_thresholds(scores, np.array([200, 0, 0, 0]))[0] == -np.inf
    assert (imposed_thresholds(scores, np.array([0, 0, 0, 200])) == np.inf).all()


def test_thresholds_lie_half_way_and_ties_leave_together():
    scores = np.array([[4, 0], [3, 0], [1, 0], [1, 0], [0, 0]], np.float32)
    assert imposed_thresholds(scores, np.array([2, 3])).tolist() == [2]
    assert left(scores, imposed_thresholds(scores, np.array([3, 2]))) == [4, 1]
    # Neighbours in float32: nothing lies between them.
    close = np.array([[1, 0], [np.nextafter(np.float32(1), np.float32(2)), 0]], np.float32)
    assert left(close, imposed_thresholds(close, np.array([1, 1]))) == [1, 1]
    unsure = np.array([[np.nan, 0], [1, 0]], np.float32)
    assert left(unsure, imposed_thresholds(unsure, np.array([1, 1]))) == [1, 1]


def test_shares_add_up():
    assert exit_counts([0.4, 0.25, 0.15, 0.2], 100).tolist() == [40, 25, 15, 20]
    assert exit_counts([1 / 3] * 3, 4).tolist() == [2, 1, 1]
    assert exit_counts([0.1, 0.2, 0.7], 10).tolist() == [1, 2, 7]
    assert exit_counts([0.0, 0.0, 1.0], 7).tolist() == [0, 0, 7]


def test_a_bad_moment_in_the_search_does_not_spoil_the_reference(monkeypatch):
    """On a clock that nothing but the programs sets forward."""
    clock = [0.0]

    def program(seconds):
        def run(images):
            clock[0] += seconds
            return np.zeros(len(images), int)

        return run

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    workload = dataclasses.replace(_workload(), images=np.zeros((4, 8, 8, 3), np.uint8))
    # Batches of two are the best, 4 s for four images; the search saw the smallest as the best.
    seen = {1: (1.0, 3.0), 2: (9.0, 2.0), 4: (5.0, 8.0)}
    plain = {b: Plain(ms, program(seconds)) for b, (ms, seconds) in seen.items()}
    exits, stages = np.array([0, 1, 1, 1]), np.array([3.0, 1.0])
    call = functools.partial(program(10.0), workload.images)
    entry = BenchmarkEntry("compact", [call], 4, exits, stages)
    timed = [(entry, {"distribution": "trained"})]
    (row,) = latency_rows._rows(workload, plain, [workload.images], 4, timed, 2)
    assert (row["plain_ms"], row["plain_best_ms"], row["plain_best_batch"]) == (8000, 4000, 2)
    assert (row["speedup"], row["speedup_best"]) == (0.8, 0.4)
    assert row["ideal_ms"] == pytest.approx(8000 * 3.75 / 4)
    assert row["ideal_best_ms"] == pytest.approx(4000 * 3.75 / 4)
    assert row["efficiency_best"] == pytest.approx(row["ideal_best_ms"] / row["ms"])
    assert row["break_even"] is None


def test_the_share_from_which_a_strategy_pays():
    assert break_even(1.0, 5.0, 3.0) == pytest.approx(0.5)
    assert break_even(1.0, 2.0, 3.0) == 0
    assert break_even(4.0, 5.0, 3.0) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--depth", "57"], ["57", "6n + 2"]),
        (["--exits", "3", "2"], ["exits (3, 2)", "increasing"]),
        (["--distributions", "early"], ["'early'", "trained"]),
        (["--distributions", "0.5,0.4,0.05,0.01"], ["add", "0.96"]),
        (["--distributions", "0.5,0.5"], ["2 for 4 exits"]),
        (["--rates", "0.5", "0.5"], ["2 for 4 exits"]),
        (["--strategies", "quick"], ["quick", "compact"]),
        (["--long-distributions", "frist"], ["frist", "uniform"]),
        (["--batches", "0"], ["batches: 0", "at least 1"]),
        (["--images", "-1"], ["images: -1"]),
        (["--picture", "time.pdf"], ["time.pdf", ".svg"]),
        (["--json", "nowhere/rows.json"], ["nowhere", "no directory"]),
        (["--run", "nowhere"], ["--run nowhere", "experiments.cifar"]),
        (["--run", "nowhere", "--depth", "8"], ["--depth", "leave one out"]),
        (["--nonsense", "3"], ["--nonsense"]),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert latency.main(flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_exits_are_spread_evenly_by_default():
    assert parse([]).network_config().exits == (7, 14, 20)
    assert parse(["--network", "fast"]).network_config().exits == (2, 3, 4)
    assert exit_rates("trained", 4) == (0.4, 0.25, 0.15, 0.2)
    assert sum(exit_rates("trained", 3)) == pytest.approx(1)
