"""The best prediction until a deadline: runs the next stage only if it will be done in time.

The remaining time decides as well as the policy does, so that there is always a prediction: that of
the last exit that was reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.compiling import bound
from eejax.inference.executors import WholeBatch, whole_batch, whole_batch_step
from eejax.inference.step import Exit, Prediction, bind_exits, check_images, pad_batch
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy, check_thresholds
from eejax.runtime.recent import RECENT, RecentTimes


class Anytime:
    """The result of `anytime`: `predict(thresholds, images, milliseconds) -> Prediction`.

    Attributes:
      batch: images a call, at most.
      times: of the stages, each with its head, dispatch and the transfer of its decision.
    """

    def __init__(self, batch: int, stages: list[Callable[..., tuple[WholeBatch, Array]]]):
        self.batch = batch
        self.times = RecentTimes(len(stages))
        self._stages = stages

    def __call__(
        self, thresholds: Iterable[float] | Array, images: Any, milliseconds: float
    ) -> Prediction:
        """Predicts by each image's own exit, or by the last that was reached in time.

        A stage begins only if there is time for its longest recent time. The first stage is always
        run, so a deadline shorter than that is missed; see `times.needed`.

        Args:
          thresholds: E - 1.
          images: `[b, ...]` on the host, 1 <= b <= `batch`.
          milliseconds: from now; inf for none.

        Raises:
          ValueError: if there are no images or more than `batch`, if the deadline is not a positive
            number, if the number of thresholds is wrong, or one is NaN.
        """
        begin = time.perf_counter()
        last, count = len(self._stages) - 1, len(images)
        thresholds = check_thresholds(thresholds, last + 1)
        if not 1 <= count <= self.batch:
            raise ValueError(f"{count} images; give 1 to {self.batch}, as it was compiled for.")
        if not milliseconds > 0:
            raise ValueError(f"a deadline of {milliseconds} ms; give a positive number.")
        state: Any = pad_batch(images, self.batch)
        due, needed = begin + 1e-3 * milliseconds, self.times.needed
        start = now = time.perf_counter()
        for e, stage in enumerate(self._stages):
            state, undecided = stage(state, thresholds, np.int32(count))
            more = bool(undecided)
            before, now = now, time.perf_counter()
            self.times.note(e, now - before)
            if not more:
                break
            if e < last and now + needed[e + 1] > due:
                self.times.doubt(e + 1)
                break
        logits, exits = (np.asarray(x)[:count] for x in (state.logits, state.exits))
        result = Prediction.of(logits, exits)
        self.times.note(-1, time.perf_counter() - now + start - begin)
        return result


def anytime(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    images: Any,
    *,
    measure: int = RECENT,
) -> Anytime:
    """Compiles a network stage by stage for inference under a deadline, and measures the stages.

    Stages are measured on this device, first by this function and then at every call. On a machine
    that is busy with other things a deadline is kept as often as the last calls predict.

    `network`, `policy` and `variables` are those of `Executor`.

    Args:
      images: `[B, ...]` with the shape and dtype of the largest call.
      measure: number of measurements of every stage.

    Raises:
      ValueError: if there are no images.
    """
    check_images(images)
    images = np.asarray(images)
    never = np.full(network.num_exits - 1, np.inf, np.float32)
    exits = bind_exits(network, policy, variables, jnp.asarray(never))
    predict = Anytime(len(images), [bound(_stage(exit), exit.variables) for exit in exits])
    for _ in range(2):  # the first call compiles
        predict(never, images, np.inf)
    predict.times.forget()
    for _ in range(measure):
        predict(never, images, np.inf)
    return predict


def _stage(exit: Exit) -> Callable[..., tuple[WholeBatch, Array]]:
    """One exit for the whole batch, and whether a later exit is needed."""

    def run(
        variables: Any, state: Any, thresholds: Array, count: Array
    ) -> tuple[WholeBatch, Array]:
        if exit.index == 0:
            state = whole_batch(exit.policy, state, count)
        here = exit._replace(variables=variables, thresholds=thresholds)
        state = whole_batch_step(here, state)
        return state, state.undecided.any()

    return run
