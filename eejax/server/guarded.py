"""A circuit breaker before the way to the next tier."""

from __future__ import annotations

import collections
import statistics
import time

import numpy as np

from eejax.server.metrics import logger
from eejax.tiers.breaker import Breaker
from eejax.tiers.tier import Told, Unanswered, Upstream

# For how long recent durations say what the way takes, seconds.
_FRESH = 5.0
# Seconds that are enough for an answer, as long as nothing is known.
_ENOUGH = 0.1


class Guarded:
    """An upstream that gets no samples for a while after it failed several times in a row.

    A sample is patient if it has more than twice the median of the last known durations. A late
    answer to another one is no failure, and such a one tries an open circuit only if no patient one
    did for a while.
    """

    def __init__(self, upstream: Upstream, name: str) -> None:
        """With a closed circuit.

        Args:
          upstream: the way to the next tier.
          name: of the next tier, for the log.
        """
        self._upstream, self._name = upstream, name
        self._breaker = Breaker()
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=64)

    async def forward(self, arrays: tuple[np.ndarray, ...], seconds: float) -> Told:
        """As `Upstream.forward`; `Unanswered("open")` while the circuit is open."""
        now = time.monotonic()
        fresh = [duration for when, duration in self._recent if now - when < _FRESH]
        if seconds <= min(fresh, default=0.0):
            # Not a failure of the next tier.
            raise Unanswered("late")
        known = fresh or [duration for _, duration in self._recent]
        patient = seconds > (2 * statistics.median(known) if known else _ENOUGH)
        if not self._breaker.allows(now if patient else now - _FRESH):
            raise Unanswered("open")
        fields = {"next": self._name}
        try:
            told = await self._upstream.forward(arrays, seconds)
        except Unanswered as error:
            if str(error) != "late" or patient:
                self._breaker.failed(time.monotonic(), now)
                if self._breaker.failures == 1:
                    fields["reason"] = str(error)
                    logger().warning("the next tier fails", extra={"fields": fields})
            raise
        if self._breaker.failures:
            logger().info("the next tier answers", extra={"fields": fields})
        self._breaker.succeeded()
        self._recent.append((time.monotonic(), time.monotonic() - now))
        return told
