"""What a server counts, for Prometheus, and what it logs, as lines of JSON."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from eejax.serving import Scheduler
from eejax.tiers.tier import Told

# Seconds; answers of a small network take a millisecond, and a deadline may be seconds.
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counters of one server.

    Attributes:
      registry: that holds them, for exposition.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "eejax_requests", "Requests by their outcome", ["outcome"], registry=registry
        )
        self._exits = Counter(
            "eejax_exits", "Answers by exit (from 1) and tier", ["exit", "tier"], registry=registry
        )
        self._partial = Counter(
            "eejax_partial",
            "Answers that would have gone on, had there been time",
            registry=registry,
        )
        self._lowered = Counter(
            "eejax_lowered", "Answers by thresholds lower than the chosen ones", registry=registry
        )
        self._fallbacks = Counter(
            "eejax_fallbacks", "Answers in place of the next tier's", ["reason"], registry=registry
        )
        self._misses = Counter(
            "eejax_deadline_misses", "Answers after their deadline", registry=registry
        )
        self._latency = Histogram(
            "eejax_latency_seconds", "From request to answer", buckets=_BUCKETS, registry=registry
        )
        self.drift = Gauge(
            "eejax_drift_alarm",
            "1 from the moment at which the data have changed",
            registry=registry,
        )
        registry.register(_State(scheduler))

    def refused(self, reason: str) -> None:
        """Counts a request that got no answer: a refusal's reason, `"invalid"` or `"error"`."""
        self._requests.labels(reason).inc()

    def answered(self, told: list[Told], seconds: float, deadline: float) -> None:
        """Counts an answered request."""
        self._requests.labels("answered").inc()
        self._latency.observe(seconds)
        if seconds > deadline:
            self._misses.inc(len(told))
        for answer in told:
            self._exits.labels(answer.exit + 1, answer.tier).inc()
            if answer.partial:
                self._partial.inc()
            if answer.level:
                self._lowered.inc()
            if answer.fallback:
                self._fallbacks.labels(answer.fallback).inc()


class _State(Collector):
    """The scheduler as it is at the moment of a scrape."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Any:
        scheduler = self._scheduler
        queue = GaugeMetricFamily("eejax_queue", "Samples that wait", labels=["stage"])
        for e, waiting in enumerate(scheduler.queues):
            queue.add_metric([str(e + 1)], waiting)
        yield queue
        yield GaugeMetricFamily("eejax_under_way", "Samples under way", scheduler.under_way)
        work = scheduler.now_running
        level = 0 if work is None else work.level
        yield GaugeMetricFamily("eejax_level", "Level of the thresholds in use", level)


class Lines(logging.Formatter):
    """A record as one line of JSON. What a client sent stays inside its strings."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def logger() -> logging.Logger:
    """The log of servers: lines of JSON on stderr; fields by `extra={"fields": {...}}`."""
    log = logging.getLogger("eejax.server")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Lines())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
