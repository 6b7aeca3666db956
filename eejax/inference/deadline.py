"""The best answer until a deadline: stage by stage, as long as the next stage will be done in time.

What is left of the time decides as well as the policy does, so that there is an answer whatever
happens: that of the last exit that was reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.inference.executors import Prediction
from eejax.inference.predictors import bound
from eejax.network import EarlyExitNetwork, ExitOutput, Variables, part
from eejax.policies.base import Policy, check_thresholds

RECENT = 256


class Anytime:
    """What `anytime` makes: `predict(thresholds, images, milliseconds) -> Prediction`.

    Attributes:
      batch: images a call, at most.
      seconds: `[E + 1, RECENT]`: how long each stage last took, with its head, its dispatch and
        what it said being fetched; and in the last row what a call takes besides. The oldest
        measurement is overwritten first.
    """

    def __init__(self, batch: int, stages: list[Callable[..., Any]]):
        self.batch = batch
        self.seconds = np.zeros((len(stages) + 1, RECENT))
        self._stages = stages
        self._calls = np.zeros(len(stages) + 1, int)

    @property
    def needed(self) -> np.ndarray:
        """`[E]` seconds until an answer from each stage on: the longest of its recent runs, and of
        what a call takes besides. The next run is longer with a probability of 1 in 257."""
        longest = self.seconds.max(axis=1)
        return longest[:-1] + longest[-1]

    def forget(self) -> None:
        """Drops the measurements."""
        self.seconds[:], self._calls[:] = 0, 0

    def __call__(
        self, thresholds: Iterable[float] | Array, images: Any, milliseconds: float
    ) -> Prediction:
        """The answer of each image's own exit, or of the last that was reached in time.

        A stage begins only if there is time for the longest that it took in its recent runs. The
        first stage is always run, so a deadline shorter than that is missed; `needed` tells.

        Args:
          thresholds: E - 1.
          images: `[b, ...]` on the host, 1 <= b <= `batch`.
          milliseconds: from now; inf for none.

        Raises:
          ValueError: no images or more than `batch`, a deadline that is no positive number, a wrong
            number of thresholds, or one that is NaN.
        """
        begin = time.perf_counter()
        exits = len(self._stages)
        limits = check_thresholds(thresholds, exits)
        count = len(images)
        if not 1 <= count <= self.batch:
            raise ValueError(f"{count} images; give 1 to {self.batch}, as it was compiled for.")
        if not milliseconds > 0:
            raise ValueError(f"a deadline of {milliseconds} ms; give a positive number.")
        if count < self.batch:
            padding = [(0, self.batch - count)] + [(0, 0)] * (np.ndim(images) - 1)
            images = np.pad(images, padding)
        due, needed = begin + 1e-3 * milliseconds, self.needed
        carry, answer = images, None
        start = now = time.perf_counter()
        for e, stage in enumerate(self._stages):
            limit = limits[e] if e < exits - 1 else np.float32(-np.inf)
            carry, answer, undecided = stage(carry, limit, np.int32(count))
            more = bool(undecided)
            before, now = now, time.perf_counter()
            self._note(e, now - before)
            if not more or now + needed[min(e + 1, exits - 1)] > due:
                break
        assert answer is not None
        logits, taken = (np.asarray(x)[:count] for x in answer)
        labels = logits.argmax(-1).astype(np.int32)
        self._note(exits, time.perf_counter() - now + start - begin)
        return Prediction(labels, taken, logits)

    def _note(self, row: int, seconds: float) -> None:
        self.seconds[row, self._calls[row] % RECENT] = seconds
        self._calls[row] += 1


def anytime(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    images: Any,
    *,
    measure: int = RECENT,
) -> Anytime:
    """Compiles a network stage by stage for inference under a deadline, and measures the stages.

    Times are measured on this device when this is called and go on being measured at every call. On
    a machine that is busy with other things a deadline is kept as often as the last calls predict.

    Args:
      network, policy, variables: as for `inference.full`.
      images: `[B, ...]`, whose shape and dtype are those of the largest call.
      measure: how often every stage is measured.

    Raises:
      ValueError: no images.
    """
    if len(images) == 0:
        raise ValueError("a batch of no images; give at least one.")
    batch, exits = len(images), network.num_exits
    stages = [
        bound(
            _stage(network, policy, e, batch),
            (part(variables, "stages", e), part(variables, "heads", e)),
        )
        for e in range(exits)
    ]
    predict = Anytime(batch, stages)
    never = np.full(exits - 1, np.inf, np.float32)
    images = np.asarray(images)
    for _ in range(2):  # compiled by the first call
        predict(never, images, np.inf)
    predict.forget()
    for _ in range(measure):
        predict(never, images, np.inf)
    return predict


def _stage(
    network: EarlyExitNetwork, policy: Policy, e: int, batch: int
) -> Callable[..., tuple[Any, tuple[Array, Array], Array]]:
    """Stage and head e: what the next one needs, everyone's answer so far, and whether to go on."""

    def run(
        variables: tuple[Variables, Variables], carry: Any, limit: Array, count: Array
    ) -> tuple[Any, tuple[Array, Array], Array]:
        if e == 0:
            features, memory, state = carry, (), policy.init(batch)
            undecided = jnp.arange(batch) < count
        else:
            features, memory, state, undecided, logits, exits = carry
        features, _ = network.stages[e].apply(variables[0], features, train=False)
        output: ExitOutput
        output, _ = network.heads[e].apply(variables[1], features, memory, train=False)
        answer, score, state = policy.step(output, state, e)
        if e == 0:
            logits, exits = answer, jnp.zeros(batch, jnp.int32)
        else:
            logits = jnp.where(undecided[:, None], answer, logits)
            exits = jnp.where(undecided, jnp.int32(e), exits)
        undecided = undecided & ~(score >= limit)
        more = undecided.any() & (e < network.num_exits - 1)
        carry = (features, output.memory, state, undecided, logits, exits)
        return carry, (logits, exits), more

    return run
