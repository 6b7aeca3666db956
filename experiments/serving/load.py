"""Open-loop load: requests come when they come, whatever becomes of those before them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from eejax.serving import Refusal
from experiments.serving.contenders import Predict


async def offered(
    predict: Predict, images: np.ndarray, labels: np.ndarray, deadline: float, arrivals: np.ndarray
) -> dict[str, Any]:
    """What becomes of requests.

    A request's latency counts from the moment at which it was to come, so that a loop that is
    behind hides nothing; so does its deadline.

    Args:
      predict: of a contender.
      images: uint8 `[n, height, width, channels]`, one for each request.
      labels: `[n]`.
      deadline: seconds.
      arrivals: `[n]` seconds from now, ascending.

    Returns:
      `answered`, `refused` and `late` (answered after the deadline) as shares of the requests;
      `p50` and `p99` of the answers' latencies in seconds; `accuracy` of the answers; `exits`, the
      share at each; `partial`, of the answers; `level`, the mean.
    """
    latency = np.full(len(arrivals), np.nan)
    answers: list[Any] = [None] * len(arrivals)
    begin = time.monotonic() + 0.05

    async def request(i: int) -> None:
        assert answers[i] is None
        due = begin + arrivals[i]
        try:
            answers[i] = await predict((images[i : i + 1],), due + deadline - time.monotonic())
        except Refusal as refusal:
            answers[i] = refusal
        latency[i] = time.monotonic() - due

    tasks = []
    for i, arrival in enumerate(arrivals):
        ahead = begin + arrival - time.monotonic()
        # A sleep lasts a millisecond too long at times; what is due by then comes at once.
        if ahead > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(request(i)))
    await asyncio.gather(*tasks)

    told = np.array([not isinstance(answer, Refusal) for answer in answers])
    given = [answer for answer in answers if not isinstance(answer, Refusal)]
    right = [answer.logits.argmax() for answer in given] == labels[told]
    p50, p99 = np.quantile(latency[told], [0.5, 0.99]) if told.any() else (np.nan, np.nan)
    return {
        "requests": len(arrivals),
        "answered": float(told.mean()),
        "refused": float(1 - told.mean()),
        "late": float((latency[told] > deadline).sum() / len(arrivals)),
        "p50": float(p50),
        "p99": float(p99),
        "accuracy": float(np.mean(right)) if given else float("nan"),
        "exits": np.bincount([answer.exit for answer in given]).tolist(),
        "partial": float(np.mean([answer.partial for answer in given])) if given else 0.0,
        "level": float(np.mean([answer.level for answer in given])) if given else 0.0,
    }
