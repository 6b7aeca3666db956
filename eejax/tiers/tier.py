"""A tier: some stages of a network, which answers what it is sure of and forwards the others.

Distributed deep networks (Teerapittayanon et al., ICDCS 2017, https://arxiv.org/abs/1709.01921)
place the exits on device, edge and cloud. A sample that leaves at none of a tier's exits goes on to
the next tier, with the time that is left until its deadline. Whatever becomes of it there, this
tier has an answer of its own, and gives that one if no better one comes in time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from eejax.runtime.engine import Runtime, Stage
from eejax.serving import Level, Refusal, Service
from eejax.serving.service import RESERVE


class Told(NamedTuple):
    """What a sample is told.

    Attributes:
      logits: `[C]`, the policy's.
      exit: 0-based, of the whole network.
      partial: whether it would have gone on, if it could.
      level: of the thresholds at which its exit was decided; 0 for those that were chosen.
      chosen: whether the chosen thresholds alone decided, on features that no codec changed: what a
        certificate is about.
      tier: how many tiers further on it was answered; 0 for this one.
      fallback: why a tier answered in place of the next one; empty if none did.
    """

    logits: np.ndarray
    exit: int
    partial: bool
    level: int
    chosen: bool
    tier: int = 0
    fallback: str = ""


class Unanswered(Exception):
    """The next tier gives no answer; the text is one of `"late"`, `"full"`, `"down"`, `"garbage"`,
    `"refused"`, `"other"` (another artifact, stage or codec) and `"open"`, for a circuit."""


class Upstream(Protocol):
    """The way to the next tier."""

    async def forward(self, arrays: tuple[np.ndarray, ...], seconds: float) -> Told:
        """The next tier's answer to one sample within some seconds; raises `Unanswered`."""
        ...


class Stages:
    """An engine of some of a network's stages, as a scheduler numbers them: from 0.

    Attributes:
      first: number of the first stage in the whole network.
      count: of the stages.
    """

    def __init__(self, runtime: Runtime, first: int, count: int) -> None:
        self._runtime = runtime
        self.first, self.count = first, count

    def run_stage(self, e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray) -> Stage:
        """As `Runtime.run_stage`."""
        return self._runtime.run_stage(self.first + e, arrays, thresholds)

    def here(self, path: Sequence[Level]) -> list[Level]:
        """Levels of the whole network as a scheduler of these stages takes them."""
        shares = slice(self.first, self.first + self.count - 1)
        return [Level(level.thresholds, level.goes_on[shares]) for level in path]


class Tier:
    """Answers samples that reach its first stage.

    Attributes:
      stages: that run here.
      service: which runs them.
      upstream: the way to the next tier; None for the last.
    """

    def __init__(self, stages: Stages, service: Service, upstream: Upstream | None = None) -> None:
        self.stages, self.service, self.upstream = stages, service, upstream
        self._away = 0

    async def predict_all(
        self, samples: Sequence[tuple[np.ndarray, ...]], seconds: float
    ) -> list[Told]:
        """The answers to some samples; if one of them is refused, the others free their places.

        Args:
          samples: as for `predict`.
          seconds: from now.

        Raises:
          Refusal: as `Service.predict`, of the first that is refused.
        """
        if len(samples) == 1:
            return [await self.predict(samples[0], seconds)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.predict(sample, seconds)) for sample in samples]
        except* Refusal as refusals:
            raise refusals.exceptions[0] from None
        return [task.result() for task in tasks]

    async def predict(self, arrays: tuple[np.ndarray, ...], seconds: float) -> Told:
        """The answer to one sample, here or further on.

        Args:
          arrays: what the first stage here reads, each `[1, ...]`.
          seconds: from now.

        Raises:
          Refusal: as `Service.predict`.
        """
        due = time.monotonic() + seconds
        answer = await self.service.predict(arrays, seconds)
        exit = self.stages.first + answer.exit
        told = Told(answer.logits, exit, answer.partial, answer.level, answer.chosen)
        if not answer.arrays or self.upstream is None:
            return told
        if self._away >= self.service.scheduler.capacity:
            return told._replace(fallback="full")
        self._away += 1
        try:
            left = due - time.monotonic() - RESERVE
            further = await self.upstream.forward(answer.arrays, left)
        except Unanswered as reason:
            return told._replace(fallback=str(reason))
        finally:
            self._away -= 1
        return further._replace(tier=further.tier + 1, chosen=further.chosen and answer.chosen)
