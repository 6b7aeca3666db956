"""The best prediction until a deadline: the next stage runs only if it will be done in time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eejax.runtime.engine import Prediction, Runtime
from eejax.runtime.recent import RecentTimes


class Anytime:
    """Predictions of up to `batch` images until a deadline.

    There always is one, that of the last exit that was reached. The stages are measured when this
    is made and at every call; where a machine is busy with other things, a deadline is kept as
    often as the last calls predict.

    Attributes:
      batch: images a call, at most.
      times: of the stages.
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
        self.times = RecentTimes(exits)
        self._runtime = runtime
        images = np.zeros((batch, *runtime.manifest.image), np.uint8)
        for _ in range(2):  # the first call loads the models and finds memory
            self(images, np.inf, np.full(exits - 1, np.inf))
        self.times.forget()
        for _ in range(measure):
            self(images, np.inf, np.full(exits - 1, np.inf))

    def __call__(
        self, images: Any, milliseconds: float, thresholds: ArrayLike | None = None
    ) -> Prediction:
        """Predicts by each image's own exit, or by the last that was reached in time.

        The first stage always runs, so a deadline that is shorter is missed; see `times.needed`.

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
        due, needed = begin + 1e-3 * milliseconds, self.times.needed
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
            self.times.note(e, now - before)
            if not len(open_):
                break
            if e < last and now + needed[e + 1] > due:
                self.times.doubt(e + 1)
                break
        result = Prediction.of(logits, exits)
        self.times.note(-1, time.perf_counter() - now + start - begin)
        return result
