"""Who answers: the whole network, early exits, early exits that lower their thresholds; and the
whole network behind the usual dynamic batcher."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import eejax
from eejax import runtime
from eejax.bundle import Bundle
from eejax.runtime.engine import Stage, session
from eejax.serving import Answer, Level, Refusal, Scheduler, Service, StageTimes, measure, noise
from eejax.serving.times import Engine
from experiments.engines.contenders import plain_model
from experiments.serving import xla

TILE, CAPACITY = 64, 4096
WAIT = 0.005  # seconds for which the dynamic batcher waits for others

# Answers one image, `([1, ...],)`, by a deadline in so many seconds.
Predict = Callable[[tuple[np.ndarray, ...], float], Any]


class Plain:
    """The whole network in ONNX Runtime, as an engine of one stage."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._session = session(plain_model(bundle), threads)

    def run_stage(self, e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray) -> Stage:
        """The logits of n images."""
        del e, thresholds
        logits = np.asarray(self._session.run(["logits"], {"images": arrays[0]})[0])
        return Stage(logits, np.ones(len(logits), bool), ())


ENGINES = ("onnxruntime", "xla")


class Contenders:
    """Engines and measured times, from which each contender is made.

    Attributes:
      path: the levels of `early exits, lowered`; the first is that of the bundle.
    """

    def __init__(self, bundle: Bundle, engine: str, path: Sequence[Level], place: Path) -> None:
        self.path = path
        self._early: Any
        self._plain: Any
        if engine == "xla":
            self._early, self._plain = xla.early(bundle), xla.plain(bundle)
        else:
            eejax.export(bundle, place / "artifact", layers=["onnx"])
            loaded = runtime.load(place / "artifact")
            self._early, self._plain = loaded, Plain(bundle, loaded.threads)
        self._images = (noise(bundle.image, TILE),)
        exits = bundle.network.num_exits
        self._tables = {
            "early": measure(self._early, self._images, exits, exits - 1).table,
            "plain": measure(self._plain, self._images, 1, 0).table,
        }

    def capacity(self) -> float:
        """Images a second of the whole network in full tiles, as the machine is now."""
        seconds = []
        for _ in range(9):
            begin = time.perf_counter()
            self._plain.run_stage(0, self._images, np.zeros(0, np.float32))
            seconds.append(time.perf_counter() - begin)
        return TILE / float(np.median(seconds))

    @contextlib.asynccontextmanager
    async def serving(self, name: str) -> AsyncIterator[Predict]:
        """A contender at work."""
        if name == "dynamic batcher":
            async with _batching(self._plain) as predict:
                yield predict
            return
        plain = name == "whole network"
        times = StageTimes(self._tables["plain" if plain else "early"])
        levels = {
            "whole network": [Level(np.zeros(0), np.zeros(0))],
            "early exits": self.path[:1],
            "early exits, lowered": self.path,
        }[name]
        scheduler = Scheduler(levels, times, tile=TILE, capacity=CAPACITY)
        async with Service(self._plain if plain else self._early, scheduler, times) as service:
            yield service.predict


NAMES = ("whole network", "early exits", "early exits, lowered", "dynamic batcher")


@contextlib.asynccontextmanager
async def _batching(engine: Engine) -> AsyncIterator[Predict]:
    """A tile runs when it is full, or `WAIT` after its first image came. Deadlines are not known to
    it; its queue is as long as the others'."""
    loop = asyncio.get_running_loop()
    waiting: list[tuple[float, np.ndarray, asyncio.Future[Answer]]] = []
    news = asyncio.Event()
    ended = False

    async def predict(arrays: tuple[np.ndarray, ...], seconds: float) -> Answer:
        del seconds
        if len(waiting) >= CAPACITY:
            raise Refusal("full", "the queue is full")
        told = loop.create_future()
        waiting.append((time.monotonic(), arrays[0], told))
        news.set()
        return await told

    async def run() -> None:
        while not (ended and not waiting):
            news.clear()
            left = waiting[0][0] + WAIT - time.monotonic() if waiting else None
            if not waiting or (len(waiting) < TILE and left is not None and left > 0 and not ended):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), left)
                continue
            tile = waiting[:TILE]
            del waiting[:TILE]
            images = np.concatenate([image for _, image, _ in tile])
            done = await loop.run_in_executor(thread, engine.run_stage, 0, (images,), images)
            for i, (_, _, told) in enumerate(tile):
                if not told.done():
                    told.set_result(Answer(done.logits[i], 0, False, 0))

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        task = asyncio.create_task(run())
        try:
            yield predict
        finally:
            ended = True
            news.set()
            await task
