"""Jobs, what they cost, and the queue that a pool takes them from."""

from __future__ import annotations

import statistics
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Unavailable(Exception):
    """The engine that jobs were to run on cannot be had; one line."""


class Job(NamedTuple):
    """A call to make. It may be made more than once, if its process is killed.

    Attributes:
      name: for people; each job has another.
      function: of a module, so that another process can import it. If a signal ends it, it raises
        KeyboardInterrupt; any other exception is a failure of this job alone.
      arguments: its arguments.
      status: tells how far it is, or "".
      kind: jobs of one kind take about as long as each other.
      work: by which the times of jobs of different kinds are in proportion, about; 0 if unknown.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    status: Callable[[], str] = lambda: ""
    kind: str = ""
    work: float = 0.0


class Failure(NamedTuple):
    """A job that failed.

    Attributes:
      name: the job's.
      error: one line.
      trace: traceback; empty if its process was killed.
    """

    name: str
    error: str
    trace: str


class Ended(NamedTuple):
    """How a call ended.

    Attributes:
      outcome: the result, or a Failure.
      seconds: of the worker's time.
    """

    outcome: Any
    seconds: float


class Killed(NamedTuple):
    """A call that did not come to its end, because its process was told to end, or was killed.

    Attributes:
      words: why, or "".
    """

    words: str = ""


def call(job: Job) -> Ended:
    """Makes the call in this process.

    Raises:
      KeyboardInterrupt: after a signal.
    """
    began = time.monotonic()
    try:
        outcome = job.function(*job.arguments)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        outcome = Failure(job.name, f"{type(error).__name__}: {words[0]}", traceback.format_exc())
    return Ended(outcome, time.monotonic() - began)


def call_in_worker(job: Job) -> Ended | Killed:
    """The same in a worker, whose signals are not for the one who waits for it."""
    try:
        return call(job)
    except KeyboardInterrupt as stop:
        return Killed(str(stop))


class Costs:
    """Seconds that jobs took, and a forecast for those that are to come.

    A kind that ended before takes its mean. Another is forecast from its work, once two kinds of
    different work are known: a fixed part, such as compiling, and a part in proportion to the work,
    neither negative, by least squares over all jobs that ended.
    """

    def __init__(self, measured: Iterable[tuple[str, float, float]] = ()) -> None:
        """
        Args:
          measured: kind, work and seconds of jobs that ended before.
        """
        self._measured: dict[str, list[tuple[float, float]]] = {}
        self._line: tuple[float, float] | None = None
        for kind, work, seconds in measured:
            self.note(kind, work, seconds)

    def note(self, kind: str, work: float, seconds: float) -> None:
        """A job ended."""
        self._measured.setdefault(kind, []).append((work, seconds))
        self._line = None

    def seconds(self, job: Job) -> float | None:
        """The forecast for a job; None if there is nothing that it could rest on."""
        if job.kind in self._measured:
            return statistics.fmean(seconds for _, seconds in self._measured[job.kind])
        known = [pair for pairs in self._measured.values() for pair in pairs if pair[0]]
        if not job.work or len({work for work, _ in known}) < 2:
            return None
        if self._line is None:
            self._line = _line(known)
        return self._line[0] + self._line[1] * job.work


def _line(known: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds at no work, and for each unit of it."""
    import numpy as np  # here, since workers need none of it
    from scipy.optimize import nnls

    work, seconds = np.asarray(known, float).T
    largest = work.max()
    fixed, slope = nnls(np.stack([np.ones_like(work), work / largest], 1), seconds)[0]
    return float(fixed), float(slope / largest)


class Queue:
    """Which job begins next, within a budget.

    A pool takes jobs, and tells how each ended. A job whose process was killed goes back to the
    front, `retries` times. With a budget jobs begin in order, each if it is forecast to fit beside
    what was spent and what is under way. Of a kind that nothing is known about a first job begins
    by itself, to be measured, while the budget is not used up.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        retries: int = 0,
        costs: Costs | None = None,
        budget: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          jobs: with different names, in order.
          retries: how often a job is tried again after its process was killed.
          costs: what is known; it learns from what ends.
          budget: seconds of all workers together, or None.
          clock: for the time of calls that were killed.
        """
        self.costs = Costs() if costs is None else costs
        self._waiting = deque(jobs)
        self._retries, self._budget, self._clock = retries, budget, clock
        self._running: dict[str, tuple[Job, float]] = {}
        self._kills: dict[str, int] = {}
        self._spent, self._began = 0.0, clock()
        self._closed = False

    @property
    def left(self) -> Sequence[Job]:
        """What has not begun."""
        return tuple(self._waiting)

    @property
    def running(self) -> Sequence[Job]:
        """What is under way."""
        return [job for job, _ in self._running.values()]

    def take(self) -> Job | None:
        """The next job; None if none may begin now, or ever if nothing is under way."""
        if self._closed or not self._waiting or not self._fits(self._waiting[0]):
            return None
        job = self._waiting.popleft()
        self._running[job.name] = job, self._clock()
        return job

    def ended(self, job: Job, ended: Ended) -> None:
        """It came to its end, well or badly."""
        del self._running[job.name]
        self._spent += ended.seconds
        if not isinstance(ended.outcome, Failure):
            self.costs.note(job.kind, job.work, ended.seconds)

    def killed(self, job: Job, words: str = "") -> Failure | None:
        """Its process was killed: it waits again, or has failed."""
        _, began = self._running.pop(job.name)
        self._spent += self._clock() - began
        self._kills[job.name] = times = self._kills.get(job.name, 0) + 1
        if times <= self._retries:
            self._waiting.appendleft(job)
            return None
        often = f" {times} times" if times > 1 else ""
        return Failure(job.name, f"its process was killed{often}" + (words and f": {words}"), "")

    def put_back(self, job: Job) -> None:
        """It was taken, and did not begin."""
        del self._running[job.name]
        self._waiting.appendleft(job)

    def seconds_left(self) -> float | None:
        """Until all is done, at the pace of what has ended; None if that cannot be told."""
        rest = [self.costs.seconds(job) for job in (*self._waiting, *self.running)]
        passed = self._clock() - self._began
        if None in rest or not self._spent:
            return None
        return sum(seconds for seconds in rest if seconds is not None) * passed / self._spent

    def _fits(self, job: Job) -> bool:
        if self._budget is None:
            return True
        forecasts = [self.costs.seconds(other) for other in self.running]
        used = self._spent + sum(s for s in forecasts if s is not None)
        seconds = self.costs.seconds(job)
        if seconds is None:
            # Measured one at a time, as nothing tells how many would fit.
            return used < self._budget and None not in forecasts
        if used + seconds <= self._budget:
            return True
        # What is under way may turn out to be shorter; what is not may not.
        self._closed = not self._running
        return False
