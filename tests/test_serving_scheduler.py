"""The scheduler in simulated time: arrivals, deadlines, departures and failures are drawn."""

import dataclasses
import heapq
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from eejax.serving import Answer, Level, Refusal, Scheduler

EXITS, TILE = 3, 4
# What a stage takes for 0, 1, ... samples: a part for the call and a part for each.
SECONDS = np.array([[0.0, 3, 4, 5, 6], [0.0, 2, 3, 4, 5], [0.0, 4, 5, 6, 7]])


class Result(NamedTuple):
    logits: np.ndarray
    leaves: np.ndarray
    arrays: tuple[np.ndarray, ...]


def stage(e, arrays, thresholds):
    """A sample is its scores `[1, E - 1]` and its number; logits name the exit and the number."""
    scores, numbers = arrays
    if np.isnan(scores).any():
        raise ValueError("a sample that cannot be processed")
    logits = np.stack([np.full(len(numbers), e), numbers], 1)
    leaves = np.ones(len(numbers), bool) if e + 1 == EXITS else scores[:, e] >= thresholds[e]
    return Result(logits, leaves, arrays)


@dataclasses.dataclass
class Request:
    """One sample, and what became of it."""

    number: int
    arrives: float
    due: float
    scores: list[float]
    departs: float | None = None
    told: list[Any] = dataclasses.field(default_factory=list)  # (when, what)
    accepted: bool = False


def simulate(scheduler, requests, seconds=SECONDS):
    """Runs requests through a scheduler; `seconds` is what stages really take.

    Returns:
      The tiles that ran: when, and which.
    """
    now, ran = 0.0, []
    order = itertools.count()
    events: list[Any] = [(r.arrives, next(order), "arrive", r) for r in requests]
    events += [(r.departs, next(order), "depart", r) for r in requests if r.departs is not None]
    heapq.heapify(events)
    samples = {}

    def tell(request):
        return lambda answer: request.told.append((now, answer))

    while events or scheduler.now_running is not None or sum(scheduler.queues):
        if scheduler.now_running is None:
            work = scheduler.next(now)
            if work is not None:
                ran.append((now, work))
                ends = now + seconds[work.stage, len(work.samples)]
                heapq.heappush(events, (ends, next(order), "end", work))
        wake = scheduler.wake()
        if not events:
            assert scheduler.now_running is None
            assert not sum(scheduler.queues)
            break
        if wake < events[0][0]:
            now = max(now, wake)
            scheduler.expire(now)
            continue
        now, _, what, detail = heapq.heappop(events)
        if what != "end":
            scheduler.expire(now)
        if what == "arrive":
            arrays = (np.array([detail.scores]), np.array([detail.number]))

            try:
                samples[detail.number] = scheduler.accept(arrays, detail.due, tell(detail), now)
                detail.accepted = True
            except Refusal as refusal:
                detail.told.append((now, refusal))
        elif what == "depart" and detail.number in samples:
            if not detail.told:
                scheduler.leave(samples[detail.number])
                detail.told.append((now, Refusal("gone", "")))
        elif what == "end":
            try:
                result = stage(detail.stage, detail.arrays, detail.thresholds)
            except ValueError as error:
                scheduler.failed(str(error))
            else:
                scheduler.done(result, now)
        assert scheduler.under_way <= scheduler.capacity
    return ran


def levels(*thresholds):
    shares = np.linspace(0.7, 0.1, len(thresholds))
    return [
        Level(np.array(t, float), np.full(EXITS - 1, share))
        for t, share in zip(thresholds, shares, strict=True)
    ]


ONE = levels((0.6, 0.6))
THREE = levels((0.6, 0.6), (0.4, 0.4), (0.0, 0.0))


@st.composite
def requests(draw, departs=False, bad=False):
    """Up to 60 samples in bursts or apart, with deadlines from hopeless to generous."""
    count = draw(st.integers(1, 60))
    gap = draw(st.sampled_from([0.0, 0.5, 2.0, 8.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    note(f"seed {seed}")
    random = np.random.default_rng(seed)
    arrives = np.cumsum(random.exponential(gap or 1e-9, count))
    made = []
    for i in range(count):
        scores = random.random(EXITS - 1).tolist()
        if bad and random.random() < 0.1:
            scores[0] = float("nan")
        leaves = arrives[i] + random.exponential(10.0)
        gone = float(leaves) if departs and random.random() < 0.3 else None
        due = float(arrives[i] + random.exponential(30.0))
        made.append(Request(i, float(arrives[i]), due, scores, gone))
    return made


def answers(made):
    return [(r, *r.told[0]) for r in made if isinstance(r.told[0][1], Answer)]


@given(requests(), st.sampled_from([ONE, THREE]), st.integers(1, 40))
@settings(max_examples=200)
def test_everyone_is_told_once_and_whoever_is_accepted_in_time(made, path, capacity):
    scheduler = Scheduler(path, lambda: SECONDS, tile=TILE, capacity=capacity, doubt=np.inf)
    simulate(scheduler, made)
    assert scheduler.under_way == 0
    for request in made:
        ((when, answer),) = request.told
        if request.accepted:
            assert isinstance(answer, Answer)
            assert when <= request.due + 1e-9
            assert answer.logits.tolist() == [answer.exit, request.number]
        else:
            assert isinstance(answer, Refusal)
            assert answer.reason in ("full", "late")
            assert when == request.arrives


@given(requests(), st.sampled_from([ONE, THREE]), st.floats(1.0, 5.0))
@settings(max_examples=200)
def test_nobody_waits_past_the_deadline_however_slow_stages_are(made, path, slower):
    scheduler = Scheduler(path, lambda: SECONDS, tile=TILE, doubt=5.0)
    simulate(scheduler, made, slower * SECONDS)
    for request in made:
        ((when, answer),) = request.told
        assert when <= request.due + 1e-9
        if request.accepted and isinstance(answer, Refusal):
            assert answer.reason == "late"
            assert when == request.due


@given(requests(), st.sampled_from([ONE, THREE]))
@settings(max_examples=100)
def test_exits_are_those_of_the_thresholds_unless_time_is_up(made, path):
    simulate(Scheduler(path, lambda: SECONDS, tile=TILE, doubt=np.inf), made)
    for request, _, answer in answers(made):
        thresholds = path[answer.level].thresholds
        leaves = answer.exit + 1 == EXITS or (
            request.scores[answer.exit] >= thresholds[answer.exit]
        )
        assert leaves != answer.partial
        for e in range(answer.exit):  # no level is stricter than the first
            assert request.scores[e] < path[0].thresholds[e]


@given(requests(departs=True, bad=True))
@settings(max_examples=100)
def test_a_bad_sample_fails_alone_and_a_client_that_leaves_frees_its_place(made):
    scheduler = Scheduler(ONE, lambda: SECONDS, tile=TILE, doubt=np.inf)
    simulate(scheduler, made)
    assert scheduler.under_way == 0
    for request in made:
        ((_, answer),) = request.told
        bad = np.isnan(request.scores[0])
        if isinstance(answer, Refusal) and answer.reason == "failed":
            assert bad
            assert "cannot be processed" in str(answer)
        else:
            assert not bad or answer.reason in ("gone", "late", "full")


@given(requests(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_slower_stages_than_promised_delay_first_answers_only(made, seed):
    """What has an answer is told it at its deadline, whatever the stages take."""
    note(f"seed {seed}")
    scheduler = Scheduler(ONE, lambda: SECONDS, tile=TILE, doubt=np.inf)
    real = SECONDS * np.random.default_rng(seed).uniform(0.5, 3.0, (EXITS, 1))
    simulate(scheduler, made, real)
    for request, when, answer in answers(made):
        if when > request.due + 1e-9:
            assert answer.exit == 0
    assert all(len(request.told) == 1 for request in made)


def test_tiles_are_full_under_load_and_deep_stages_come_first():
    made = [Request(i, 0.0, 1e6, [0.0, 0.0]) for i in range(40)]
    ran = simulate(Scheduler(ONE, lambda: SECONDS, tile=TILE, doubt=np.inf), made)
    sizes = [len(work.samples) for _, work in ran]
    assert sizes[0] == 1  # the first waits for nobody
    assert sizes[1:10] == [TILE] * 9
    assert sum(sizes) / len(sizes) > 0.9 * TILE
    assert [work.stage for _, work in ran[1:10]] == [0, 1, 2] * 3
    assert all(answer.exit == EXITS - 1 for _, _, answer in answers(made))


def test_a_single_sample_does_not_wait_for_others():
    made = [Request(0, 5.0, 100.0, [0.0, 1.0])]
    simulate(Scheduler(ONE, lambda: SECONDS, tile=TILE, doubt=np.inf), made)
    ((_, when, answer),) = answers(made)
    assert (when, answer.exit) == (5 + 3 + 2, 1)


def test_the_level_rises_with_the_load_and_falls_again():
    slow = [Request(i, 40.0 * i, 40.0 * i + 30, [0.3, 0.3]) for i in range(3)]
    burst = [Request(10 + i, 200.0, 230.0, [0.3, 0.3]) for i in range(12)]
    after = [Request(30, 400.0, 430.0, [0.3, 0.3])]
    simulate(Scheduler(THREE, lambda: SECONDS, tile=TILE, doubt=np.inf), [*slow, *burst, *after])
    assert {answer.level for *_, answer in answers(slow + after)} == {0}
    assert {answer.exit for *_, answer in answers(slow + after)} == {EXITS - 1}
    told = answers(burst)
    assert len(told) == 12
    assert max(answer.level for *_, answer in told) == 2


def test_twice_the_capacity_is_answered_or_refused_and_the_engine_is_busy():
    random = np.random.default_rng(20261128)
    # Full tiles of the first stage alone take 1.5 a sample; one arrives every 0.75.
    times = np.cumsum(random.exponential(0.75, 600))
    made = [Request(i, t, t + 40.0, random.random(2).tolist()) for i, t in enumerate(times)]
    ran = simulate(Scheduler(THREE, lambda: SECONDS, tile=TILE, doubt=np.inf), made)
    told = answers(made)
    busy = sum(SECONDS[work.stage, len(work.samples)] for _, work in ran)
    assert busy >= 0.98 * (ran[-1][0] - ran[0][0])
    assert len(told) >= 0.8 * busy / 1.5
    assert all(when <= request.due + 1e-9 for request, when, _ in told)


def test_one_slow_moment_is_not_believed_for_ever():
    """Times that no deadline allows; the stages really are quick."""
    slow = 100 * SECONDS
    made = [Request(i, 10.0 * i, 10.0 * i + 60, [0.0, 1.0]) for i in range(40)]
    simulate(Scheduler(ONE, lambda: slow, tile=TILE, doubt=100.0), made)
    told = answers(made)
    # The first is refused; then one in ten tries the first stage, and of those one the second.
    assert not made[0].accepted
    assert 3 <= len(told) <= 4
    assert any(answer.exit == 1 for *_, answer in told)


def test_a_request_of_many_samples_is_no_rate():
    burst = [Request(i, 0.0, 1e5, [0.3, 0.3]) for i in range(64)]
    simulate(Scheduler(THREE, lambda: SECONDS, tile=TILE, doubt=np.inf), burst)
    assert {answer.level for *_, answer in answers(burst)} == {0}


def test_arrivals_that_are_too_many_lower_the_thresholds_before_deadlines_do():
    # Full tiles take 3.1 a sample at the first level; one arrives every 2.
    steady = [Request(i, 2.0 * i, 2.0 * i + 1e5, [0.3, 0.3]) for i in range(2000)]
    simulate(Scheduler(THREE, lambda: SECONDS, tile=TILE, doubt=np.inf), steady)
    told = answers(steady)
    assert {answer.level for *_, answer in told[:50]} == {0}
    assert max(answer.level for *_, answer in told[1500:]) > 0


def test_whoever_stays_holds_no_more_than_twice_its_features():
    """Of each tile one sample is patient, and the others are told at their deadlines."""
    scheduler = Scheduler(ONE, lambda: SECONDS, tile=64, doubt=np.inf)
    seconds = np.tile(np.arange(65.0), (3, 1))
    scheduler.seconds = lambda: seconds
    now, kept = 0.0, []
    for tile in range(20):
        for i in range(64):
            arrays = (np.zeros((1, 2)), np.array([i]))
            due = 1e9 if i == 0 else now + 80
            sample = scheduler.accept(arrays, due, lambda answer: None, now)
            if i == 0:
                kept.append(sample)
        while sum(work := scheduler.queues[:1]):
            del work
            running = scheduler.next(now)
            assert running is not None
            assert running.stage == 0
            now += len(running.samples)
            scheduler.done(stage(0, running.arrays, running.thresholds), now)
        now += 1000
        scheduler.expire(now)
        assert scheduler.under_way == tile + 1
    for sample in kept:
        assert len(sample.arrays[0]) <= 2
        assert sample.arrays[1][sample.row] == 0


def test_who_is_late_whatever_runs_makes_no_tile_small():
    """After a slow moment, tiles of one would make all behind it late, too."""
    scheduler = Scheduler(ONE, lambda: SECONDS, tile=TILE, doubt=np.inf)
    for i in range(8):
        scheduler.accept((np.zeros((1, 2)), np.array([i])), 20.0 + 20 * i, print, 0.0)
    work = scheduler.next(19.0)  # one sample takes 3
    assert work is not None
    assert len(work.samples) == TILE


def test_closing_tells_everyone():
    told = []
    scheduler = Scheduler(ONE, lambda: SECONDS, tile=TILE, doubt=np.inf)
    for i in range(6):
        scheduler.accept((np.zeros((1, 2)), np.array([i])), 100.0, told.append, 0.0)
    work = scheduler.next(0.0)
    assert work is not None
    scheduler.done(stage(0, work.arrays, work.thresholds), 6.0)
    scheduler.next(6.0)
    scheduler.close("the end")
    assert scheduler.under_way == 0
    kinds = [a.reason if isinstance(a, Refusal) else ("partial", a.partial) for a in told]
    assert sorted(map(str, kinds)) == ["('partial', True)"] * 4 + ["closed"] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"levels": []}, "levels of"),
        ({"levels": [*ONE, Level(np.zeros(1), np.zeros(1))]}, "levels of"),
        ({"levels": ONE, "tile": 0}, "tiles of 0"),
        ({"levels": ONE, "capacity": 0}, "a capacity of 0"),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Scheduler(seconds=lambda: SECONDS, **arguments)
