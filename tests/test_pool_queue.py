"""Which job begins next: tried again after a kill, within a budget, and when all will be done."""

from __future__ import annotations

import pytest

from experiments.pool.jobs import Costs, Ended, Failure, Job, Queue


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


def job(name, kind="", work=0.0):
    return Job(name, pow, (2, 5), kind=kind, work=work)


def jobs(*names, **fields):
    return [job(name, **fields) for name in names]


def taken(queue):
    """The next job, which there is."""
    job = queue.take()
    assert job is not None
    return job


def run(queue, clock, seconds, workers=1):
    """Empties a queue; the order in which jobs began. `seconds` by kind."""
    order, running = [], []
    while True:
        while len(running) < workers and (job := queue.take()) is not None:
            order.append(job.name)
            running.append((clock.now + seconds[job.kind], job))
        if not running:
            return order
        running.sort(key=lambda pair: pair[0])
        clock.now, job = running.pop(0)
        queue.ended(job, Ended(None, seconds[job.kind]))


def test_a_job_whose_process_is_killed_goes_first_so_many_times():
    queue = Queue(jobs("a", "b"), retries=2)
    for _ in range(2):
        first = taken(queue)
        assert first.name == "a"
        assert queue.killed(first) is None
    assert queue.killed(taken(queue), "out of memory") == Failure(
        "a", "its process was killed 3 times: out of memory", ""
    )
    assert taken(queue).name == "b"
    assert queue.take() is None


def test_without_retries_one_kill_is_a_failure():
    queue = Queue(jobs("a"))
    assert queue.killed(taken(queue)) == Failure("a", "its process was killed", "")


def test_what_did_not_begin_is_put_back_without_blame():
    queue = Queue(jobs("a", "b", "c"), retries=0)
    a, b, c = (taken(queue) for _ in range(3))
    for other in (c, b):
        queue.put_back(other)
    assert queue.killed(a) is not None
    assert [taken(queue).name for _ in range(2)] == ["b", "c"]


def test_a_forecast_is_of_the_kind_or_by_the_work():
    costs = Costs([("small", 2.0, 10.0), ("small", 2.0, 14.0)])
    assert costs.seconds(job("a", "small", 2.0)) == 12
    assert costs.seconds(job("a", "larger", 6.0)) is None, "how much is fixed is not known"
    costs.note("large", 4.0, 22.0)
    # A fixed part of 2, and 5 for each unit of work.
    assert costs.seconds(job("a", "larger", 6.0)) == pytest.approx(32.0)
    assert costs.seconds(job("a", "large", 4.0)) == 22
    assert costs.seconds(job("a", "larger")) is None
    assert Costs().seconds(job("a", "small", 2.0)) is None


def test_no_part_of_a_forecast_is_negative():
    costs = Costs([("a", 1.0, 10.0), ("b", 10.0, 5.0)])
    assert costs.seconds(job("c", "c", 1e6)) == pytest.approx(7.5)
    costs = Costs([("a", 1.0, 1.0), ("b", 10.0, 100.0)])
    seconds = costs.seconds(job("c", "c", 0.1))
    assert seconds is not None
    assert 0 < seconds < 2


def test_what_fails_says_nothing_of_costs():
    queue = Queue(jobs("a", kind="k", work=1.0))
    queue.ended(taken(queue), Ended(Failure("a", "", ""), 0.1))
    assert queue.costs.seconds(job("b", "k", 1.0)) is None


@pytest.mark.parametrize("workers", [1, 3])
def test_only_what_is_forecast_to_fit_begins_and_in_order(workers):
    clock = Clock()
    many = [*jobs("a0", "a1", kind="a"), *jobs("b0", kind="b"), *jobs("a2", kind="a")]
    costs = Costs([("a", 0.0, 10.0), ("b", 0.0, 30.0)])
    queue = Queue(many, costs=costs, budget=45.0, clock=clock)
    # b0 would end at 50. What is behind it is less useful and is left, too.
    assert run(queue, clock, {"a": 10.0, "b": 30.0}, workers) == ["a0", "a1"]
    assert [job.name for job in queue.left] == ["b0", "a2"]
    # A larger budget goes on with them.
    queue = Queue(queue.left, costs=costs, budget=45.0, clock=clock)
    assert run(queue, clock, {"a": 10.0, "b": 30.0}, workers) == ["b0", "a2"]


def test_of_what_nothing_is_known_one_is_measured_first():
    clock = Clock()
    queue = Queue(jobs(*"abcde", kind="k"), costs=Costs(), budget=35.0, clock=clock)
    first = taken(queue)
    assert queue.take() is None, "until it is known what one takes"
    queue.ended(first, Ended(None, 10.0))
    assert run(queue, clock, {"k": 10.0}, workers=4) == ["b", "c"]


def test_another_kind_is_forecast_by_its_work():
    clock = Clock()
    many = [job("a", "a", 1.0), job("b", "b", 2.0), job("c", "c", 4.0), job("d", "d", 8.0)]
    queue = Queue(many, costs=Costs(), budget=80.0, clock=clock)
    took = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 70.0}
    # a and b are measured; c, forecast 40, fits into 50; d, forecast about 65, not into 20.
    assert run(queue, clock, took) == ["a", "b", "c"]


def test_killed_calls_are_paid_for():
    clock = Clock()
    queue = Queue(jobs("a", "b", kind="k"), 5, Costs([("k", 0.0, 10.0)]), budget=25.0, clock=clock)
    first = taken(queue)
    clock.now = 8.0
    queue.killed(first)
    # 8 of 25 are spent, so one of two fits.
    assert run(queue, clock, {"k": 10.0}) == ["a"]


def test_a_job_that_is_quicker_than_forecast_makes_room():
    clock = Clock()
    queue = Queue(jobs(*"abc", kind="k"), 0, Costs([("k", 0.0, 10.0)]), 20.0, clock)
    a, b = taken(queue), taken(queue)
    assert queue.take() is None, "two are forecast to use it up"
    for job in (a, b):
        queue.ended(job, Ended(None, 1.0))
    assert taken(queue).name == "c"


def test_it_tells_when_all_will_be_done():
    clock = Clock()
    queue = Queue(jobs(*"abcdef", kind="k"), clock=clock)
    running = [taken(queue), taken(queue)]
    assert queue.seconds_left() is None, "nothing has ended"
    clock.now = 10.0
    for job in running:
        queue.ended(job, Ended(None, 10.0))
    # Two at a time, four to go.
    assert queue.seconds_left() == pytest.approx(20.0)
    assert Queue(jobs("a"), costs=Costs(), clock=clock).seconds_left() is None
