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


class Guarded:
    """An upstream that gets no samples for a while after it failed several times in a row.

    A late answer is a failure only if the sample had more than twice the median of recent times.
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
        taken = [duration for when, duration in self._recent if now - when < _FRESH]
        if seconds <= min(taken, default=0.0):
            # Not a failure of the next tier.
            raise Unanswered("late")
        if not self._breaker.allows(now):
            raise Unanswered("open")
        fields = {"next": self._name}
        try:
            told = await self._upstream.forward(arrays, seconds)
        except Unanswered as error:
            fair = 2 * statistics.median(taken) if taken else 0.0
            if str(error) != "late" or seconds > fair:
                self._breaker.failed(time.monotonic())
                if self._breaker.failures == 1:
                    fields["reason"] = str(error)
                    logger().warning("the next tier fails", extra={"fields": fields})
            raise
        if self._breaker.failures:
            logger().info("the next tier answers", extra={"fields": fields})
        self._breaker.succeeded()
        self._recent.append((time.monotonic(), time.monotonic() - now))
        return told
