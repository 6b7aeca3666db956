"""A circuit breaker: who calls nobody that did not answer lately, and tries again at random times.

After some failures in a row the circuit is open, and nothing is sent. After a while that doubles
with every further failure, one call is let through; if it succeeds, the circuit is closed. The
while is drawn anew each time, so that many tiers do not return at once (full jitter, Brooker,
"Exponential backoff and jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Breaker:
    """Times are seconds of the caller's clock.

    Attributes:
      failures: in a row.
    """

    def __init__(
        self,
        *,
        most: int = 3,
        first: float = 0.5,
        longest: float = 30.0,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """A closed circuit.

        Args:
          most: failures in a row that open it.
          first: seconds that it stays open the first time, before jitter.
          longest: seconds that it stays open at most.
          draw: a number in [0, 1).
        """
        self.failures = 0
        self._most, self._first, self._longest, self._draw = most, first, longest, draw
        self._opened = self._again = 0.0

    def allows(self, now: float) -> bool:
        """Whether a call may be made; one that is let through an open circuit is the only one until
        it succeeded or failed, or as long again."""
        if self.failures < self._most:
            return True
        if now < self._again:
            return False
        self._again = now + self._pause()
        return True

    def succeeded(self) -> None:
        """Closes the circuit."""
        self.failures = 0

    def failed(self, now: float, begun: float) -> None:
        """Counts a failure; while the circuit is open, only that of a call let through it.

        Args:
          now: when the call failed.
          begun: when `allows` let it through.
        """
        if self.failures >= self._most and begun <= self._opened:
            return
        self.failures += 1
        if self.failures >= self._most:
            self._opened, self._again = now, now + self._pause()

    def _pause(self) -> float:
        longest = min(self._first * 2.0 ** min(self.failures - self._most, 30), self._longest)
        # Not less than a tenth, or a drawn 0 would be no pause.
        return longest * (0.1 + 0.9 * self._draw())
