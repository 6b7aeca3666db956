"""The path of thresholds of an artifact."""

from __future__ import annotations

import numpy as np

from eejax.runtime.manifest import Manifest
from eejax.serving.scheduler import Level


def levels(manifest: Manifest) -> list[Level]:
    """The chosen thresholds and then lower ones, as far as the artifact has any.

    Raises:
      ValueError: if a level is not one of thresholds and shares for these exits.
    """
    stored = manifest.content.get("levels")
    if stored is None:
        # How many go on is unknown; with one level it does not matter.
        return [Level(manifest.thresholds, np.ones(manifest.num_exits - 1))]
    path = [
        Level(
            np.asarray([float(t) for t in level["thresholds"]], np.float32),
            np.asarray(level["goes_on"], np.float64),
        )
        for level in stored
    ]
    sides = {array.shape for level in path for array in level}
    shares = np.concatenate([level.goes_on for level in path])
    if sides != {manifest.thresholds.shape} or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"the levels of {manifest.directory} do not fit its exits.")
    return path
