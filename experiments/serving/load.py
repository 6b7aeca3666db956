"""Open-loop load: requests come when they come, whatever becomes of those before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eejax.serving import Answer, Refusal
from experiments.serving.contenders import Predict


async def offered(
    predict: Predict, images: np.ndarray, labels: np.ndarray, deadline: float, arrivals: np.ndarray
) -> Offered:
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
      What became of each, in their order.
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

    return Offered(latency, answers, labels, deadline)


class Offered(NamedTuple):
    """What became of n requests.

    Attributes:
      latency: `[n]` seconds.
      answers: n answers or refusals.
      labels: `[n]`, right ones.
      deadline: seconds.
    """

    latency: np.ndarray
    answers: list[Any]
    labels: np.ndarray
    deadline: float

    @property
    def told(self) -> np.ndarray:
        """`[n]` bool, which were answered."""
        return np.array([isinstance(answer, Answer) for answer in self.answers])


def summary(parts: Sequence[Offered]) -> dict[str, Any]:
    """The figures of some rounds.

    Returns:
      Medians over the rounds: `answered`, `refused` and `late` (answered after the deadline) as
      shares of the requests, `p50` and `p99` of the answers' latencies in seconds. `spread`, the
      quartiles of the rounds' p99. Over all rounds: `requests`; `accuracy` of the answers; `exits`,
      the number at each; `partial`, of the answers; `level`, the mean.
    """
    rounds = [_round(part) for part in parts]
    given = [answer for part in parts for answer in part.answers if isinstance(answer, Answer)]
    labels = np.concatenate([part.labels[part.told] for part in parts])
    right = [answer.logits.argmax() for answer in given] == labels
    return {
        "requests": sum(len(part.labels) for part in parts),
        **{name: float(np.median([row[name] for row in rounds])) for name in rounds[0]},
        "spread": np.quantile([row["p99"] for row in rounds], [0.25, 0.75]).tolist(),
        "accuracy": float(np.mean(right)) if given else float("nan"),
        "exits": np.bincount([answer.exit for answer in given]).tolist(),
        "partial": float(np.mean([answer.partial for answer in given])) if given else 0.0,
        "level": float(np.mean([answer.level for answer in given])) if given else 0.0,
    }


def _round(part: Offered) -> dict[str, float]:
    latency, count = part.latency[part.told], len(part.labels)
    return {
        "answered": len(latency) / count,
        "refused": 1 - len(latency) / count,
        "late": float((latency > part.deadline).sum()) / count,
        **{f"p{p}": float(np.percentile(latency, p)) if len(latency) else np.nan for p in (50, 99)},
    }
