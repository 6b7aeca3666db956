"""How long each stage takes for how many samples, measured before and while serving."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from eejax.serving.samples import StageResult

# Runs of a stage with about so many samples, by which their time is corrected.
RECENT = 16
QUANTILE = 0.9
# Seconds after which what a stage took is forgotten, if it has not run again: a stage that is
# thought to be slow does not run, and nothing else would correct that.
FRESH = 0.5


class Engine(Protocol):
    """What runs stages: `eejax.runtime`'s `Runtime` is one."""

    def run_stage(
        self, e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray
    ) -> StageResult: ...


class StageTimes:
    """Seconds of each stage for each number of samples up to a tile.

    A table is measured once. What a stage took lately, over what the table says, corrects it for
    about as many samples (between two powers of two: small tiles suffer more than large ones from
    what else the machine does), until the stage has not run for half a second. Both are the 0.9
    quantile, so that a promise made by them is mostly kept.

    Attributes:
      table: `[S, tile + 1]`, for 0, 1, ... samples.
    """

    def __init__(self, table: np.ndarray, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = np.maximum.accumulate(table, axis=1)
        self._clock = clock
        stages, sizes = table.shape
        self._buckets = np.array([size.bit_length() for size in range(sizes)])
        self._factors = np.ones((stages, self._buckets[-1] + 1))
        self._seconds = self.table.copy()
        # Of each stage and bucket, the last ratios; when each stage ran last, if it has any.
        self._ratios: dict[tuple[int, int], collections.deque[float]] = {}
        self._noted: dict[int, float] = {}

    def __call__(self) -> np.ndarray:
        """`[S, tile + 1]` seconds, as things are now."""
        if self._noted:
            before = self._clock() - FRESH
            for stage in [e for e, when in self._noted.items() if when < before]:
                del self._noted[stage]
                self._ratios = {key: r for key, r in self._ratios.items() if key[0] != stage}
                self._factors[stage] = 1.0
                self._update(stage)
        return self._seconds

    def note(self, stage: int, samples: int, seconds: float) -> None:
        """Takes in what a stage took."""
        self._noted[stage] = self._clock()
        bucket = int(self._buckets[samples])
        ratios = self._ratios.setdefault((stage, bucket), collections.deque([1.0] * RECENT, RECENT))
        ratios.append(seconds / self.table[stage, samples])
        # As np.quantile by its definition, which takes ten times as long.
        self._factors[stage, bucket] = sorted(ratios)[int(QUANTILE * (RECENT - 1))]
        self._update(stage)

    def _update(self, stage: int) -> None:
        corrected = self.table[stage] * self._factors[stage, self._buckets]
        self._seconds[stage] = np.maximum.accumulate(corrected)


def measure(
    engine: Engine,
    arrays: Sequence[np.ndarray],
    stages: int,
    thresholds: int,
    *,
    repeats: int = 15,
) -> StageTimes:
    """Runs every stage on 1, 2, 4, ... samples and a whole tile.

    Args:
      engine: to measure.
      arrays: what the first stage reads, each `[tile, ...]`: random images, if it reads images.
      stages: S.
      thresholds: E - 1, how many the engine takes.
      repeats: times for each size.
    """
    never = np.full(thresholds, np.inf, np.float32)
    tile = len(arrays[0])
    sizes = sorted({*(1 << i for i in range(tile.bit_length())), tile})
    seconds = np.zeros((stages, len(sizes)))
    for e in range(stages):
        after = engine.run_stage(e, arrays, never).arrays
        for i, size in enumerate(sizes):
            part = tuple(array[:size] for array in arrays)
            engine.run_stage(e, part, never)
            taken = []
            for _ in range(repeats):
                begin = time.perf_counter()
                engine.run_stage(e, part, never)
                taken.append(time.perf_counter() - begin)
            seconds[e, i] = np.quantile(taken, QUANTILE)
        arrays = after
    at = np.arange(tile + 1)
    return StageTimes(np.stack([np.interp(at, [0, *sizes], [0.0, *row]) for row in seconds]))


def noise(image: Sequence[int], tile: int) -> np.ndarray:
    """Random uint8 images `[tile, *image]`."""
    return np.random.default_rng(0).integers(0, 256, (tile, *image), np.uint8)
