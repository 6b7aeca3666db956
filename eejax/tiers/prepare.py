"""From an artifact to a service of some of its stages."""

from __future__ import annotations

import numpy as np

from eejax.runtime import Runtime
from eejax.serving import Scheduler, Service, levels, measure, noise
from eejax.tiers.tier import Stages


def prepare(
    runtime: Runtime, first: int, end: int, tile: int, capacity: int
) -> tuple[Stages, Service]:
    """Measures some stages, and returns them with a service that is not yet started.

    Args:
      runtime: of the whole network.
      first: the first stage, 0-based.
      end: the one after the last, more than `first`.
      tile: samples that run together, at most.
      capacity: samples under way, at most.
    """
    exits = runtime.manifest.num_exits
    stages = Stages(runtime, first, end - first)
    arrays: tuple[np.ndarray, ...] = (noise(runtime.manifest.image, tile),)
    for e in range(first):
        arrays = runtime.run_stage(e, arrays, np.full(exits - 1, np.inf, np.float32)).arrays
    times = measure(stages, arrays, stages.count, exits - 1)
    path = stages.here(levels(runtime.manifest))
    return stages, Service(stages, Scheduler(path, times, tile=tile, capacity=capacity), times)
