"""Which samples run next, who is answered, and who is refused: serving without a clock or threads.

Every sample has a deadline. Samples of many requests wait before the stage that they reached, and
run in tiles. Whoever is accepted gets an answer until its deadline, of its own exit or the best
one so far, if stages take as long as they lately did, and no tile fails. One that has no answer by
its deadline is refused then.

- **Refused at once** is a sample for which there is no place, or whose first exit could not be
  reached in time behind those that wait.
- **The level** is a position on a path of thresholds, from those that were chosen to lower ones. It
  is the first at which all that waits could be done in time, earliest deadline first, and samples
  could be served in full tiles as fast as the last ones came, with the share of samples that goes
  on past each exit at that level.
- **The next tile** never makes a sample late that waits for its first exit. Within that, a stage
  with a full tile comes first, the last such stage; otherwise the stage whose sample is due first.
  Nothing waits for a tile to fill.
- **Times are doubted.** A stage that would come too late by its time, and has not run for a while,
  runs all the same: otherwise one slow moment would be believed for ever.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from eejax.serving.samples import Answer, Level, Refusal, Sample, StageResult, Work, trim

# Samples in whose time, if they were served, the rate of arrivals is averaged: so many that one
# request of a tile is no rate.
RECENT = 256
# How much longer than in full tiles first exits may take where more than a tile waits.
WASTE = 1.25
# How much longer than lately first exits may take before who is accepted now is late.
MARGIN = 1.15


class Scheduler:
    """The samples under way. All times are seconds of one clock, which is the caller's.

    Attributes:
      tile: samples that run together, at most.
      capacity: samples under way, at most.
      levels: the path, from the chosen thresholds on.
      seconds: `[S, tile + 1]` at any time, what each stage takes for 0, 1, ... samples.
      decided: called for every decision by the chosen thresholds.
      now_running: the tile that runs, if one does.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        seconds: Callable[[], np.ndarray],
        *,
        tile: int = 64,
        capacity: int = 1024,
        decided: Callable[[int, bool], None] = lambda stage, goes_on: None,
        doubt: float = 1.0,
    ) -> None:
        """Without samples.

        Args:
          levels: at least one; the samples that go on are never more at a later level.
          seconds: called for `[S, tile + 1]`, what each stage takes for 0, 1, ... samples; no less
            for more.
          tile: samples that run together, at most.
          capacity: samples under way, at most.
          decided: called with the stage, and whether the sample goes on, for every sample that the
            chosen thresholds alone have decided so far: what a drift monitor watches.
          doubt: seconds after which a stage that has not run is tried, whatever its time; a sample
            that is accepted for that may be late.

        Raises:
          ValueError: if there is no level, their lengths differ, or a number is less than 1.
        """
        if min(tile, capacity) < 1:
            raise ValueError(f"tiles of {tile}, a capacity of {capacity}; give at least 1 each.")
        self.tile, self.capacity = tile, capacity
        self.follow(levels)
        self.seconds, self.decided = seconds, decided
        self.now_running: Work | None = None
        stages = len(self.levels[0].goes_on) + 1
        self._waiting: list[list[tuple[float, int, Sample]]] = [[] for _ in range(stages)]
        self._free_at = 0.0
        self._numbers = itertools.count()
        self._under_way = 0
        self._doubt = doubt
        # When each stage ran last; their times are new to begin with.
        self._ran: list[float] = []
        # Of arrivals: a second, averaged over a span; when it was so.
        self._rate, self._span, self._at = 0.0, 0.0, 0.0

    def follow(self, levels: Sequence[Level]) -> None:
        """Replaces the path for what runs from now on.

        Args:
          levels: as for a new scheduler.
        """
        lengths = {tuple(map(len, level)) for level in levels}
        if len(lengths) != 1 or any(shares > thresholds for thresholds, shares in lengths):
            raise ValueError(
                f"levels of {sorted(lengths)} thresholds and shares; give one level or more, alike."
            )
        self.levels = tuple(
            Level(np.asarray(level.thresholds, np.float32), np.asarray(level.goes_on))
            for level in levels
        )
        # [L, S, S]: of samples that enter stage e, the share that enters stage k.
        self._reach = np.stack([_reach(level.goes_on) for level in self.levels])

    @property
    def under_way(self) -> int:
        """Samples that are accepted and not yet told."""
        return self._under_way

    @property
    def queues(self) -> list[int]:
        """Samples that wait before each stage."""
        return [len(queue) for queue in self._waiting]

    def accept(
        self,
        arrays: tuple[np.ndarray, ...],
        due: float,
        tell: Callable[[Answer | Refusal], None],
        now: float,
    ) -> Sample:
        """Takes a sample in.

        Raises:
          Refusal: if there is no place, or no time for its first exit.
        """
        self._ran = self._ran or [now] * len(self._waiting)
        if self._span:
            self._rate = self._rate_at(now) + 1 / self._span
        self._at = now
        if self._under_way >= self.capacity:
            raise Refusal("full", f"{self.capacity} samples are under way; try again later.")
        sample = Sample(arrays, 0, due, tell, next(self._numbers), set())
        self._push(sample)
        start = max(now, self._free_at) if self.now_running else now
        # Nobody that was accepted may be late for it, nor may it be late itself.
        if not (
            (due - start >= MARGIN * self.seconds()[0, 1] and self._fits(start, start, MARGIN))
            or (not self._under_way and now - self._ran[0] >= self._doubt)
        ):
            self._pull(sample)
            raise Refusal("late", "the load leaves no time until the deadline; try again later.")
        self._under_way += 1
        return sample

    def leave(self, sample: Sample) -> None:
        """Forgets a sample, whose client is gone."""
        if sample.open:
            sample.open = False
            self._under_way -= 1
            if sample.waits:
                self._pull(sample)
                trim(sample.together)

    def expire(self, now: float) -> None:
        """Tells those whose deadline has come their best answer; one that has none is refused."""
        for queue in self._waiting:
            while queue and queue[0][0] <= now:
                self._tell_best(queue[0][2])
        if self.now_running is not None:
            for sample in self.now_running.samples:
                if sample.open and sample.due <= now:
                    self._tell_best(sample)

    def wake(self) -> float:
        """When `expire` has something to do next; inf for never."""
        dues = [queue[0][0] for queue in self._waiting if queue]
        if self.now_running is not None:
            running = self.now_running.samples
            dues += [sample.due for sample in running if sample.open]
        return min(dues, default=np.inf)

    def next(self, now: float) -> Work | None:
        """The tile that runs from now on; None if nothing waits. One runs at a time."""
        assert self.now_running is None
        self.expire(now)
        seconds = self.seconds()
        stage = self._choose(now, seconds)
        if stage is None:
            return None
        samples = self._tile(stage, now, seconds[stage].tolist())
        level = self._level(now, seconds)
        sources = []
        # Samples that came out of a tile together are picked together.
        for _, group in itertools.groupby(samples, lambda sample: id(sample.arrays)):
            picked = list(group)
            sources.append((picked[0].arrays, [sample.row for sample in picked]))
            for sample in picked:
                self._pull(sample)
            trim(picked[0].together)
        self._free_at = now + seconds[stage, len(samples)]
        self._ran[stage] = now
        thresholds = self.levels[level].thresholds
        self.now_running = Work(stage, samples, level, thresholds, sources)
        return self.now_running

    def done(self, result: StageResult, now: float) -> None:
        """Takes the results of the tile that ran: tells those that leave, moves the others on."""
        work = self._ended()
        last = work.stage + 1 == len(self._waiting)
        stays, rows = [], []
        for i, (sample, leaves) in enumerate(
            zip(work.samples, result.leaves.tolist(), strict=True)
        ):
            if not sample.open:
                continue
            sample.chosen &= work.level == 0
            answer = Answer(result.logits[i], work.stage, not leaves, work.level, sample.chosen)
            if sample.chosen:
                self.decided(work.stage, not leaves)
            if leaves or sample.due <= now:
                self._tell(sample, answer)
            elif last:
                arrays = tuple(array[i : i + 1].copy() for array in result.arrays)
                self._tell(sample, answer._replace(arrays=arrays))
            else:
                sample.best, sample.stage = answer, work.stage + 1
                stays.append(sample)
                rows.append(i)
        together = set(stays)
        for row, sample in zip(rows, stays, strict=True):
            sample.arrays, sample.row, sample.together = result.arrays, row, together
            self._push(sample)
        trim(together)

    def failed(self, words: str) -> None:
        """The tile that ran has failed: its samples run again, each alone; one that was alone is
        refused, or told its best answer so far."""
        work = self._ended()
        for sample in work.samples:
            if not sample.open:
                continue
            if len(work.samples) > 1:
                sample.alone, sample.together = True, {sample}
                self._push(sample)
            elif sample.best is not None:
                self._tell_best(sample)
            else:
                self._tell(sample, Refusal("failed", words))

    def close(self, words: str) -> None:
        """Tells all that are under way their best answer, or a refusal."""
        running = () if self.now_running is None else self.now_running.samples
        for sample in [*running, *(s for queue in self._waiting for *_, s in list(queue))]:
            if sample.open:
                best = sample.best
                self._tell(sample, Refusal("closed", words) if best is None else best)

    def _choose(self, now: float, seconds: np.ndarray) -> int | None:
        """The stage that runs next."""
        for e in range(1, len(self._waiting)):
            self._thin_out(e, now, seconds[e].tolist())
        full = [e for e, queue in enumerate(self._waiting) if len(queue) >= self.tile]
        others = [e for e, queue in enumerate(self._waiting) if 0 < len(queue) < self.tile]
        others.sort(key=lambda e: self._waiting[e][0][0])
        for e in [*full[::-1], *others]:
            size = min(len(self._waiting[e]), self.tile)
            if e == 0 or self._fits(now, now + seconds[e, size]):
                return e
        return 0 if self._waiting[0] else None

    def _thin_out(self, stage: int, now: float, seconds: list[float]) -> None:
        """Tells those their best answer for whom this stage would come too late, or in time only
        with less than half of the tile that could run."""
        queue = self._waiting[stage]
        while queue and now - self._ran[stage] < self._doubt:
            size = min(len(queue), self.tile)
            if 2 * _largest(seconds, queue[0][0] - now) >= size:
                break
            self._tell_best(queue[0][2])

    def _tile(self, stage: int, now: float, seconds: list[float]) -> tuple[Sample, ...]:
        """The samples due first that can be in time, as many as are done when the first is due."""
        queue = self._waiting[stage]
        # Those who are late whatever runs do not, unless all are: others would be late for them.
        first = next((i for i, (due, *_) in enumerate(queue) if due - now >= seconds[1]), None)
        size = self.tile if first is None else _largest(seconds, queue[first][0] - now)
        samples = [sample for *_, sample in queue[first or 0 :][: min(size, self.tile)]]
        size = len(samples)
        alone = next((i for i, sample in enumerate(samples) if sample.alone), size)
        del samples[max(alone, 1) :]
        together = {id(sample.arrays): i for i, sample in enumerate(samples)}
        return tuple(sorted(samples, key=lambda sample: together[id(sample.arrays)]))

    def _fits(self, now: float, start: float, margin: float = 1.0) -> bool:
        """Whether all that wait for their first exit reach it in time, if nothing else runs from
        `start` on and it takes `margin` times as long as lately; and if there are many, in tiles
        that are not much smaller than they could be. Those who would be late from `now` on do not
        count."""
        # Lists, because this runs for every arrival: an element of an array takes three times as
        # long.
        queue, tile = self._waiting[0], self.tile
        seconds = self.seconds()[0]
        lost = bisect.bisect_left(queue, now + float(seconds[1]), key=lambda entry: entry[0])
        seconds = (margin * seconds).tolist()
        ends, i, count = start, lost, len(queue)
        while i < count:
            left = queue[i][0] - ends
            size = tile if seconds[-1] <= left else _largest(seconds, left)
            if size < 1:
                return False
            size = min(size, count - i)
            ends += seconds[size]
            i += size
        whole, rest = divmod(count - lost, tile)
        least = whole * seconds[-1] + seconds[rest]
        return not whole or ends - start <= WASTE * least

    def _level(self, now: float, seconds: np.ndarray) -> int:
        """The first level at which all that waits can be done in time and what arrives can be
        served, or the last."""
        if len(self.levels) == 1:
            return 0
        waiting = sorted((due, e) for e, queue in enumerate(self._waiting) for due, *_ in queue)
        dues, stages = np.array(waiting).reshape(-1, 2).T
        size = min(max(len(dues), 1), self.tile)
        each = self._reach @ (seconds[:, size] / size)  # [L, S]
        ends = now + np.cumsum(each[:, stages.astype(int)], axis=1)
        served = self._reach[:, 0] @ (seconds[:, -1] / self.tile)  # [L]
        self._span = RECENT * float(served[0])
        enough = (ends <= dues).all(axis=1) & (self._rate_at(now) * served <= 1)
        return int(enough.argmax()) if enough.any() else len(self.levels) - 1

    def _rate_at(self, now: float) -> float:
        """Arrivals a second, each weighted the less the longer ago it was."""
        return self._rate * math.exp((self._at - now) / self._span) if self._span else 0.0

    def _ended(self) -> Work:
        work, self.now_running = self.now_running, None
        assert work is not None
        return work

    def _push(self, sample: Sample) -> None:
        bisect.insort(self._waiting[sample.stage], (sample.due, sample.number, sample))
        sample.waits = True
        sample.together.add(sample)

    def _pull(self, sample: Sample) -> None:
        queue = self._waiting[sample.stage]
        del queue[bisect.bisect_left(queue, (sample.due, sample.number))]
        sample.waits = False
        sample.together.discard(sample)

    def _tell_best(self, sample: Sample) -> None:
        late = Refusal("late", "the load left no time for its first exit.")
        self._tell(sample, late if sample.best is None else sample.best)

    def _tell(self, sample: Sample, answer: Answer | Refusal) -> None:
        self.leave(sample)
        sample.tell(answer)


def _largest(seconds: list[float], until: float) -> int:
    """The largest number of samples that a stage does in this time."""
    # On a list: searching an array lets go of the interpreter's lock, and the engine's thread may
    # keep it for longer than all else takes.
    return bisect.bisect_right(seconds, until) - 1


def _reach(goes_on: np.ndarray) -> np.ndarray:
    """`[S, S]`: of the samples that enter stage e, the share that enters stage k >= e."""
    stages = len(goes_on) + 1
    share = np.zeros((stages, stages))
    for e in range(stages):
        share[e, e:] = np.cumprod([1.0, *goes_on[e:]])
    return share
