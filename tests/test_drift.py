"""The drift monitor: false alarms at most as promised, and changes noticed; and its experiment.

Bounds on random counts hold for any monitor that keeps its promise with probability 1 - 1e-6.
"""

import itertools
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eejax.serving.drift import FLAT, STAKES, Drift, EProcess, clopper_pearson
from experiments import drift as experiment
from experiments.drift import Outcomes

SEED = 20261128


def feed(drift, goes_on, exit=0):
    """How many decisions the alarm takes, or inf."""
    for i, value in enumerate(np.asarray(goes_on).tolist()):
        drift.note(exit, value)
        if drift.alarm:
            return i + 1
    return math.inf


def at_most(trials, probability):
    """A count of events that is exceeded with probability at most 1e-6."""
    return stats.binom.isf(1e-6, trials, probability)


@pytest.mark.parametrize(("held_out", "rates"), [(50, (0.6, 0.5)), (2000, (0.95, 0.03))])
def test_false_alarms_are_as_rare_as_promised(held_out, rates):
    """The held-out counts are drawn anew for each stream, so their uncertainty counts."""
    print("seed", SEED)
    random = np.random.default_rng((SEED, held_out))
    streams, samples, delta, alarms = 250, 2000, 0.2, 0
    for _ in range(streams):
        reached = [held_out]
        goes_on = [random.binomial(held_out, rates[0])]
        reached.append(goes_on[0])
        goes_on.append(random.binomial(reached[1], rates[1]))
        drift = Drift(reached, goes_on, risk=0.1, delta=delta)
        for first, second in (random.random((samples, 2)) < rates).tolist():
            drift.note(0, first)
            if first:
                drift.note(1, second)
        for loss in (random.random(samples // 10) < 0.1).tolist():
            drift.note_loss(loss)
        alarms += drift.alarm is not None
    assert alarms <= at_most(streams, delta)


def test_an_interval_around_the_held_out_rate_is_needed():
    """What the test above would find if 50 held-out samples were taken for the whole truth."""
    print("seed", SEED)
    random = np.random.default_rng(SEED)
    alarms = 0
    for _ in range(50):
        rate = random.binomial(50, 0.6) / 50
        process = EProcess(rate, rate)
        for x in (random.random(2000) < 0.6).tolist():
            process.note(x)
            if process.evidence >= 10:
                alarms += 1
                break
    assert alarms > at_most(50, 0.1)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.3, 1.0)])
@pytest.mark.parametrize("low", [0.0, 0.25, 0.4])
def test_the_expected_evidence_never_grows_if_the_mean_is_within_the_interval(values, low):
    """Exactly, over all streams of 6 numbers, with the mean at the upper end of the interval."""
    mean = 0.4
    chances = (0.6, 0.4) if len(values) == 2 else (0.5, 1 / 7, 5 / 14)
    assert np.dot(values, chances) == pytest.approx(mean)
    expected = 0.0
    for stream in itertools.product(range(len(values)), repeat=6):
        process = EProcess(low, mean)
        for i in stream:
            process.note(values[i])
        expected += process.evidence * math.prod(chances[i] for i in stream)
    assert expected == pytest.approx(1) if low in (0.0, mean) else expected < 1


@given(
    st.lists(st.floats(0, 1), max_size=30),
    st.floats(0, 0.9),
    st.floats(0.01, 1),
)
def test_the_recursion_is_the_mixture_over_starting_times_and_bets(numbers, low, width):
    high = min(low + width, 1.0)
    process = EProcess(low, high)
    for x in numbers:
        process.note(x)
    assert process.evidence == pytest.approx(mixture(numbers, low, high), rel=1e-9)


def mixture(numbers, low, high):
    """Every bet from every starting time, one after another."""

    def not_started(t):
        return math.log(FLAT) / math.log(FLAT + t)

    games = [("up", f) for f in STAKES if high < 1] + [("down", f) for f in STAKES if low > 0]
    evidence = not_started(len(numbers))
    for start in range(len(numbers)):
        weight = (not_started(start) - not_started(start + 1)) / max(len(games), 1)
        for side, f in games:
            capital = weight
            for x in numbers[start:]:
                bound, y = (high, x) if side == "up" else (1 - low, 1 - x)
                capital *= 1 - f + f * y / bound
            evidence += capital
    return evidence


def test_larger_changes_are_noticed_sooner_in_both_directions():
    print("seed", SEED)
    random = np.random.default_rng(SEED)

    def median(rate):
        return np.median(
            [feed(Drift([4000], [2000]), random.random(4000) < rate) for _ in range(9)]
        )

    for rates in ((0.6, 0.7, 0.9), (0.4, 0.3, 0.1)):
        small, middle, large = map(median, rates)
        # Medians were about 900, 160 and 50.
        assert large < middle < small < math.inf


def test_a_late_change_takes_at_most_three_times_as_long():
    """The delay grows with the logarithm of the time: by 1.7 after 5,000 samples, by 1.8 after
    100,000, in a simulation with other seeds."""
    print("seed", SEED)
    random = np.random.default_rng(SEED)
    delays = {}
    for before in (0, 5000):
        delays[before] = []
        for _ in range(15):
            drift = Drift([4000], [2000])
            assert feed(drift, random.random(before) < 0.5) == math.inf
            delays[before].append(feed(drift, random.random(4000) < 0.7))
    assert np.median(delays[5000]) < 3 * np.median(delays[0])


def test_losses_between_0_and_1_are_watched_too():
    print("seed", SEED)
    random = np.random.default_rng(SEED)
    drift = Drift([], [], risk=0.2)
    for loss in random.beta(1, 4, 3000).tolist():  # a mean of 0.2
        drift.note_loss(loss)
    assert drift.alarm is None
    for loss in random.beta(2, 3, 300).tolist():
        drift.note_loss(loss)
    assert drift.alarm is not None
    assert "at most 0.2" in drift.alarm


def test_an_alarm_says_what_was_expected_and_seen_and_stays():
    drift = Drift([4000, 2000], [2000, 1000], risk=0.1)
    assert feed(drift, [True] * 100, exit=1) < 60
    alarm = drift.alarm
    assert alarm is not None
    assert alarm.startswith("exit 2: 4")
    assert "1,000 of 2,000 held-out samples did" in alarm
    assert alarm.endswith("100.0 % did.")
    feed(drift, [True, False] * 1000, exit=1)
    drift.note_loss(1.0)
    assert drift.alarm == alarm


def test_what_is_seen_is_what_came_after_the_change():
    drift = Drift([4000], [2000])
    feed(drift, [True, False] * 2000)
    count = feed(drift, [True] * 100)
    assert f"of the last {count}, 100.0 %" in str(drift.alarm)


def test_memory_is_bounded():
    drift = Drift([4000, 2000], [2000, 1000], risk=0.5)
    sizes = []
    for _ in range(2):
        for i in range(50_000):
            drift.note(0, i % 2 == 0)
            drift.note_loss(0.25)
        sizes.append(len(pickle.dumps(drift)))
    assert drift.alarm is None
    assert sizes[1] <= sizes[0] + 16


def test_an_exit_that_no_held_out_sample_reached_raises_no_alarm():
    drift = Drift([100, 0], [0, 0])
    assert feed(drift, [True] * 1000, exit=1) == math.inf


@pytest.mark.parametrize(("count", "of"), [(0, 1), (0, 50), (50, 50), (17, 50), (1700, 4000)])
def test_the_interval_is_that_of_the_beta_quantiles(count, of):
    low, high = clopper_pearson(count, of, 0.003)
    assert low == pytest.approx(stats.beta.ppf(0.0015, count, of - count + 1) if count else 0)
    assert high == pytest.approx(stats.beta.ppf(0.9985, count + 1, of - count) if count < of else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([10, 5], [5]), r"\[5\] samples of \[10, 5\]"),
        (([10], [11]), "at most those that reached it"),
        (([10], [-1]), "count"),
        (([10], [0.4]), "count"),
        (([10], [np.nan]), "count"),
        (([[10]], [[5]]), "count"),
        (([], []), "no exit and no risk"),
        (([10], [5], 0.0), "a risk of 0.0"),
        (([10], [5], 1.0), "a risk of 1.0"),
        (([10], [5], 0.1, 0), "a delta of 0"),
        (([10], [5], 0.1, np.nan), "a delta of nan"),
    ],
)
def test_counts_and_bounds_that_do_not_fit_are_refused(arguments, words):
    names = ("reached", "goes_on", "risk", "delta")
    with pytest.raises(ValueError, match=words):
        Drift(**dict(zip(names, arguments, strict=False)))


def test_what_cannot_be_noted_is_refused():
    drift = Drift([10], [5], risk=0.1)
    for exit in (-1, 1):
        with pytest.raises(ValueError, match=f"exit {exit}; decisions are made at 1"):
            drift.note(exit, True)
    for loss in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"a loss of {loss}"):
            drift.note_loss(loss)
    with pytest.raises(ValueError, match="give the risk"):
        Drift([10], [5]).note_loss(0.0)


def test_the_experiment_has_a_row_for_each_monitor_and_each_corruption(
    digits_run, tmp_path, capsys
):
    path = tmp_path / "rows.json"
    flags = ["--kinds", "contrast", "--severities", "1", "5", "--streams", "3", "--orders", "2"]
    flags += ["--samples", "600", "--before", "50", "--json", str(path)]
    assert experiment.main(["--run", str(digits_run), *flags]) == 0
    rows = json.loads(path.read_text())
    assert [row.get("monitor") for row in rows[:3]] == list(experiment.MONITORS)
    assert all(row["streams"] == 3 and row["false_alarms"] <= 1 for row in rows[:3])
    images = [(row["corruption"], row["severity"]) for row in rows[3:]]
    assert images == [("clean", 0), ("contrast", 1), ("contrast", 5)]
    clean, _, grey = rows[3:]
    assert grey["accuracy"] < clean["accuracy"] - 0.3
    # Nine of ten images are wrong then, which a few labels show.
    assert all(0 < delay < 600 for delay in grey["errors at 50"])
    assert clean["errors at 0"] == [None, None]
    assert sum(clean["exits"]) == pytest.approx(1)
    assert all({"device", "versions", "command", "date"} <= set(row) for row in rows)
    said = capsys.readouterr().out
    assert "contrast 5" in said
    assert experiment.quartiles(grey["errors at 50"]) in said


def test_every_decision_of_a_sample_is_noted():
    class Notes:
        alarm = None

        def __init__(self):
            self.noted = []

        def note(self, exit, goes_on):
            self.noted.append((exit, goes_on))

        def note_loss(self, loss):
            self.noted.append(loss)

    exits, wrong = np.array([0, 2, 1]), np.array([False, True, False])
    stream = Outcomes(exits, wrong, wrong)
    notes: Any = Notes()
    assert experiment.first_alarm(notes, "exits", stream, 3, 2) is None
    assert notes.noted == [(0, False), (0, True), (1, True), (0, True), (1, False)]
    notes = Notes()
    assert experiment.first_alarm(notes, "errors", stream, 3, 2) is None
    assert notes.noted == [True]


def test_held_out_samples_are_counted_at_each_exit():
    wrong = np.zeros(4000, bool)
    held_out = Outcomes(np.repeat([0, 1, 2, 2], 1000), wrong, wrong)
    drift = experiment.made("exits", held_out, 3, 0.01, None)
    feed(drift, [False] * 100, exit=1)
    assert "exit 2: " in str(drift.alarm)
    assert "2,000 of 3,000 held-out samples" in str(drift.alarm)


@pytest.mark.parametrize(
    ("delays", "words"),
    [
        ([30, 10, 20, 40], "20 (10-30)"),
        ([None, 10, None, 1040], "1,040 (10-none)"),
        ([None, None], "none"),
        ([None, None, None, None, 3], "none in 4 of 5"),
        ([-5], "none, 1 before it"),
        ([-5, 10, 0, 10], "10 (10-10), 2 before it"),
    ],
)
def test_delays_in_words(delays, words):
    assert experiment.quartiles(delays) == words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--run"),
        (["--run", "/nowhere"], "/nowhere"),
        (["--run", "/nowhere", "--severities", "6"], "severities: 6"),
        (["--run", "/nowhere", "--every", "0"], "every: 0"),
        (["--run", "/nowhere", "--delta", "1"], "delta: 1"),
        (["--run", "/nowhere", "--json", "/nowhere/x.json"], "there is no directory /nowhere"),
    ],
)
def test_a_mistake_is_a_line(flags, words, capsys):
    assert experiment.main(flags) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
