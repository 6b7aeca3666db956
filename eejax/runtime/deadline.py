"""The best prediction until a deadline: the next stage runs only if it will be done in time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eejax.runtime.engine import Prediction, Runtime

RECENT = 256


class Anytime:
    """Predictions of up to `batch` images until a deadline.

    There always is one, that of the last exit that was reached. The stages are measured when this
    is made and at every call; where a machine is busy with other things, a deadline is kept as
    often as the last calls predict.

    Attributes:
      batch: images a call, at most.
      seconds: `[E + 1, RECENT]`, recent times of each stage, and in the last row of a call outside
        of its stages; the oldest measurement is overwritten first, by the median where there was
        no time for the stage.
    """

    def __init__(self, runtime: Runtime, batch: int = 1, measure: int = 32) -> None:
        """Loads and measures the stages.

        Args:
          runtime: of the artifact.
          batch: images a call, at most.
          measure: times that each stage is measured.

        Raises:
          ValueError: if `batch` or `measure` is less than 1.
        """
        if batch < 1 or measure < 1:
            raise ValueError(f"batches of {batch}, {measure} measurements; give at least 1 each.")
        exits = runtime.manifest.num_exits
        self.batch = batch
        self.seconds = np.zeros((exits + 1, RECENT))
        self._runtime, self._calls = runtime, np.zeros(exits + 1, int)
        images = np.zeros((batch, *runtime.manifest.image), np.uint8)
        for _ in range(2):  # the first call loads the models and finds memory
            self(images, np.inf, np.full(exits - 1, np.inf))
        self.seconds[:], self._calls[:] = 0, 0
        for _ in range(measure):
            self(images, np.inf, np.full(exits - 1, np.inf))

    @property
    def needed(self) -> np.ndarray:
        """`[E]` seconds from the start of each stage to a prediction: the longest recent time of
        the stage and of the rest of a call."""
        longest = self.seconds.max(axis=1)
        return longest[:-1] + longest[-1]

    def __call__(
        self, images: Any, milliseconds: float, thresholds: ArrayLike | None = None
    ) -> Prediction:
        """Predicts by each image's own exit, or by the last that was reached in time.

        The first stage always runs, so a deadline that is shorter is missed; see `needed`.

        Args:
          images: uint8 `[b, height, width, channels]`, 1 <= b <= `batch`.
          milliseconds: from now; inf for none.
          thresholds: E - 1; those of the artifact by default.

        Raises:
          ValueError: if images or thresholds do not fit, there are more than `batch` images, or the
            deadline is not a positive number.
        """
        begin = time.perf_counter()
        given, limits = self._runtime.checked(images, thresholds)
        if len(given) > self.batch:
            raise ValueError(f"{len(given)} images; give {self.batch} at most.")
        if not milliseconds > 0:
            raise ValueError(f"a deadline of {milliseconds} ms; give a positive number.")
        due, needed = begin + 1e-3 * milliseconds, self.needed
        exits = np.zeros(len(given), np.int32)
        logits = np.empty((len(given), len(self._runtime.manifest.classes)), np.float32)
        arrays, open_ = (given,), np.arange(len(given))
        last = len(needed) - 1
        start = now = time.perf_counter()
        for e in range(len(needed)):
            stage = self._runtime.run_stage(e, arrays, limits)
            logits[open_], exits[open_] = stage.logits, e
            stays = ~stage.leaves
            open_, arrays = open_[stays], tuple(array[stays] for array in stage.arrays)
            before, now = now, time.perf_counter()
            self._note(e, now - before)
            if not len(open_):
                break
            if e < last and now + needed[e + 1] > due:
                self._forget(e + 1)
                break
        result = Prediction.of(logits, exits)
        self._note(-1, time.perf_counter() - now + start - begin)
        return result

    def _forget(self, row: int) -> None:
        """Writes a usual time over the oldest, so that a slow moment does not lock a stage out."""
        known = self.seconds[row][self.seconds[row] > 0]
        self._note(row, float(np.median(known)) if len(known) else 0.0)

    def _note(self, row: int, seconds: float) -> None:
        self.seconds[row, self._calls[row] % RECENT] = seconds
        self._calls[row] += 1
