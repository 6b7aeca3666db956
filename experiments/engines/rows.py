"""What is timed, and what is compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.engines.contenders import SINGLES, Contender
from experiments.latency.workload import Workload, thresholds_of

# Threads of some engines go on waiting actively after a call, and would slow the next contender.
PAUSE = 0.3


def rows(
    workload: Workload, contenders: Sequence[Contender], arguments: Any, batch: int, say: Any
) -> list[dict[str, Any]]:
    """Times everything at one batch size; a row for each engine.

    Args:
      arguments: with the `mixture` and the number of `rounds`.
      say: is told how far it is.
    """
    exits = workload.network.num_exits
    count = SINGLES if batch == 1 else batch
    images = workload.images[:count]
    mixed = thresholds_of(workload, arguments.mixture, count).astype(np.float32)
    limits = {"plain": mixed, "mixture": mixed}
    for e in range(exits):
        only = np.where(np.arange(exits - 1) < e, np.inf, -np.inf)
        limits[f"exit {e + 1}"] = only.astype(np.float32)
    times: dict[tuple[str, str], list[float]] = {}
    for done in range(arguments.rounds):
        say(f"batch {batch}: round {done + 1} of {arguments.rounds}")
        for contender in contenders:
            time.sleep(PAUSE)
            for what, thresholds in limits.items():
                kind = "plain" if what == "plain" else "early"
                seconds = contender.ask("time", kind, images, batch, thresholds)
                times.setdefault((contender.name, what), []).append(seconds)
    passed = np.c_[workload.scores[:count, :-1] >= mixed, np.ones(count, bool)]
    shares = np.bincount(passed.argmax(1), minlength=exits) / count
    plain = min(float(np.median(times[contender.name, "plain"])) for contender in contenders)
    found = []
    for contender in contenders:
        # What really left where, by the engine itself.
        taken = contender.ask("predict", images, batch, mixed).exits
        left = np.bincount(taken, minlength=exits) / count
        own = {what: t for (name, what), t in times.items() if name == contender.name}
        row = _row(own, shares, 1000 / (count if batch == 1 else 1))
        row |= {"on_best": plain / float(np.median(own["mixture"])), "left": left.tolist()}
        found.append({"batch": batch, "engine": contender.name, **row})
    return found


def _row(times: dict[str, list[float]], shares: np.ndarray, per: float) -> dict[str, Any]:
    """The row of an engine; `per` makes milliseconds, of an image or of a batch."""
    middle = {what: per * float(np.median(t)) for what, t in times.items()}
    exits = [middle[f"exit {e + 1}"] for e in range(len(shares))]
    ideal = middle["plain"] * float(np.dot(shares, exits)) / exits[-1]
    low, high = np.percentile(times["mixture"], [25, 75])
    return {
        "plain_ms": middle["plain"],
        "exits_ms": exits,
        "mixture_ms": middle["mixture"],
        "spread": float((high - low) * per / middle["mixture"]),
        "ideal_ms": ideal,
        "efficiency": ideal / middle["mixture"],
        "speedup": middle["plain"] / middle["mixture"],
        "first_speedup": middle["plain"] / exits[0],
        "shares": shares.tolist(),
    }


def agreement(
    workload: Workload, contenders: Sequence[Contender], count: int
) -> list[dict[str, Any]]:
    """Labels and exits of every other engine against the first, on `count` images, with the
    thresholds of the run; and how many scores lie within 1e-5 of a threshold.

    The first gets all images at once, the others also one by one; earlyon only so, because images
    of a batch would leave together there.
    """
    thresholds = thresholds_of(workload, "trained", count).astype(np.float32)
    images = workload.images[:count]
    scores = workload.scores[:count, :-1]
    close = (np.abs(scores - thresholds) <= 1e-5 * np.maximum(1, np.abs(thresholds))).any(1)
    first, *others = contenders
    expected = first.ask("predict", images, count, thresholds)
    rows = []
    for other in others:
        for batch in (1,) if other.name == "earlyon" else (count, 1):
            got = other.ask("predict", images, batch, thresholds)
            rows.append(
                {
                    "engines": f"{first.name}, {other.name}",
                    "images": count,
                    "how": "one by one" if batch == 1 else "at once",
                    "other_labels": int((got.labels != expected.labels).sum()),
                    "other_exits": int((got.exits != expected.exits).sum()),
                    "close": int(close.sum()),
                    "largest_difference": float(np.abs(got.logits - expected.logits).max()),
                }
            )
    return rows


AGREEMENT = """{engines}, {images:,} images {how}: {other_labels} other labels, {other_exits} other
exits; {close} scores within 1e-5 of a threshold, logits within {largest_difference:.1e}"""
