"""How long each stage takes for how many samples, measured before and while serving."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from eejax.serving.scheduler import StageResult

RECENT = 64
QUANTILE = 0.9


class Engine(Protocol):
    """What runs stages: `eejax.runtime`'s `Runtime` is one."""

    def run_stage(
        self, e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray
    ) -> StageResult: ...


class StageTimes:
    """Seconds of each stage for each number of samples up to a tile.

    A table is measured once; what stages took lately, over what the table says, corrects it. Both
    are the 0.9 quantile, so that a promise made by them is mostly kept.

    Attributes:
      table: `[E, tile + 1]`, for 0, 1, ... samples.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table = np.maximum.accumulate(table, axis=1)
        self._ratios: list[collections.deque[float]] = [
            collections.deque([1.0] * RECENT, RECENT) for _ in table
        ]
        self._factors = np.ones(len(table))

    def __call__(self) -> np.ndarray:
        """`[E, tile + 1]` seconds, as things are now."""
        return self.table * self._factors[:, None]

    def note(self, stage: int, samples: int, seconds: float) -> None:
        """Takes in what a stage took."""
        ratios = self._ratios[stage]
        ratios.append(seconds / self.table[stage, samples])
        self._factors[stage] = np.quantile(ratios, QUANTILE)


def measure(
    engine: Engine, image: tuple[int, ...], exits: int, tile: int, repeats: int = 15
) -> StageTimes:
    """Runs every stage on 1, 2, 4, ... samples and a whole tile.

    Args:
      engine: to measure.
      image: the shape of one uint8 image.
      exits: E.
      tile: samples at most.
      repeats: times for each size.
    """
    never = np.full(exits - 1, np.inf, np.float32)
    sizes = sorted({*(1 << i for i in range(tile.bit_length())), tile})
    seconds = np.zeros((exits, len(sizes)))
    images = np.random.default_rng(0).integers(0, 256, (tile, *image), np.uint8)
    arrays: Any = (images,)
    for e in range(exits):
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
