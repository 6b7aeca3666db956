"""How long stages took, and so how long they may take."""

from __future__ import annotations

import numpy as np

RECENT = 256


class RecentTimes:
    """Recent times of E stages and, in a last row, of the rest of a call.

    Attributes:
      seconds: `[E + 1, RECENT]`; the oldest is overwritten first. 0 where nothing was measured.
    """

    def __init__(self, stages: int) -> None:
        self.seconds = np.zeros((stages + 1, RECENT))
        self._counts = np.zeros(stages + 1, int)

    @property
    def needed(self) -> np.ndarray:
        """`[E]` seconds from the start of each stage to a prediction: the longest recent time of
        the stage and of the rest of a call. The next time is longer with probability 1/257."""
        longest = self.seconds.max(axis=1)
        return longest[:-1] + longest[-1]

    def note(self, row: int, seconds: float) -> None:
        """Adds a time of a stage, 0-based, or in row -1 of the rest of a call."""
        self.seconds[row, self._counts[row] % RECENT] = seconds
        self._counts[row] += 1

    def doubt(self, row: int) -> None:
        """Writes the usual time over the oldest. For a stage that there was no time for, so that a
        slow moment does not lock it out for good."""
        known = self.seconds[row][self.seconds[row] > 0]
        self.note(row, float(np.median(known)) if len(known) else 0.0)

    def forget(self) -> None:
        """Drops all times."""
        self.seconds[:], self._counts[:] = 0, 0
