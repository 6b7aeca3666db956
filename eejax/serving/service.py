"""A scheduler in real time: requests come by asyncio, stages run in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from types import TracebackType
from typing import Self

import numpy as np

from eejax.serving.samples import Answer, Refusal, StageResult, Work
from eejax.serving.scheduler import Scheduler
from eejax.serving.times import Engine, StageTimes

# Seconds before a deadline at which the best answer so far is handed over, at least and at most.
# In between it is the longest that the event loop lately took to hand an answer over, because under
# load it has other requests to look after, too; after a second half of that, and so on.
RESERVE, LONGEST = 0.001, 0.05
# Of a deadline, at most.
_SHARE = 0.25
_HALF = 1.0  # seconds


class Service:
    """Answers images until their deadlines; used as `async with Service(...) as service`.

    At the end of the block it takes no more, finishes what is under way, and stops.

    Attributes:
      scheduler: decides; it belongs to the event loop's thread.
      times: of the engine's stages; corrected here by what they take.
      broke: whether it has ended by a mistake of its own, so that all are refused.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, times: StageTimes) -> None:
        self.scheduler, self.times = scheduler, times
        self._engine = engine
        self._closed = self.broke = False
        self._reserve, self._noted = RESERVE, time.monotonic()
        self._news = asyncio.Event()
        # One: an engine uses all cores.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "eejax-engine")

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        self._news.set()
        try:
            await self._task
        finally:
            self._thread.shutdown()

    async def predict(self, arrays: tuple[np.ndarray, ...], seconds: float) -> Answer:
        """The answer to one sample, until its deadline.

        If the caller is cancelled, its place is free at once.

        Args:
          arrays: what the first stage reads, each `[1, ...]`; for images, one array.
          seconds: from now.

        Raises:
          Refusal: at once, if there is no place or no time; if the sample cannot be processed;
            if the service ends.
        """
        if self._closed:
            raise Refusal("closed", "the service is ending.")
        told: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def tell(answer: Answer | Refusal) -> None:
            if told.done():
                return
            if isinstance(answer, Refusal):
                told.set_exception(answer)
            else:
                told.set_result(answer)

        now = time.monotonic()
        due = now + seconds - min(self._reserve, max(_SHARE * seconds, RESERVE))
        sample = self.scheduler.accept(arrays, due, tell, now)
        self._news.set()
        try:
            answer = await told
        finally:
            self.scheduler.leave(sample)
        if answer.partial:
            self._note_lag(due)
        return answer

    def _note_lag(self, since: float) -> None:
        """Takes in that something was handed over now, and could have been since then."""
        now = time.monotonic()
        faded = self._reserve * 0.5 ** ((now - self._noted) / _HALF)
        self._reserve, self._noted = min(max(now - since, faded, RESERVE), LONGEST), now

    def _stage(self, work: Work) -> tuple[StageResult, float, float]:
        """The result of a tile, and when it began and ended."""
        begin = time.monotonic()
        result = self._engine.run_stage(work.stage, work.arrays, work.thresholds)
        # Here, where what is wrong is the tile's failure and not the loop's end.
        lengths = {len(array) for array in (result.logits, result.leaves, *result.arrays)}
        if lengths != {len(work.samples)}:
            raise ValueError(f"results for {lengths} samples of {len(work.samples)}")
        return result, begin, time.monotonic()

    async def _run(self) -> None:
        try:
            await self._serve()
        except BaseException:
            self.broke = True
            raise
        finally:
            # Whatever ends it, nobody waits for an answer that does not come.
            self._closed = True
            self.scheduler.close("the service has ended.")

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            work = self.scheduler.next(time.monotonic())
            if work is None:
                if self._closed:
                    return
                await self._news.wait()
                continue
            job = loop.run_in_executor(self._thread, self._stage, work)
            while not job.done():
                left = self.scheduler.wake() - time.monotonic()
                await asyncio.wait([job], timeout=max(left, 0) if left < np.inf else None)
                if not job.done():
                    self.scheduler.expire(time.monotonic())
            try:
                result, begin, end = job.result()
            except Exception as error:  # of any engine
                self.scheduler.failed(str(error))
            else:
                self.times.note(work.stage, len(work.samples), end - begin)
                self.scheduler.done(result, time.monotonic())
                # Once those who were told have heard it.
                loop.call_soon(self._note_lag, end)
