"""What an artifact says to a server: its path of thresholds, and what goes on by the first."""

from __future__ import annotations

import numpy as np

from eejax.runtime.manifest import Manifest
from eejax.serving.drift import Drift
from eejax.serving.samples import Level


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


def whole(exits: int) -> list[Level]:
    """The path on which every sample goes to the last exit."""
    return [Level(np.full(exits - 1, np.inf, np.float32), np.ones(exits - 1))]


def watched(manifest: Manifest, delta: float) -> Drift | None:
    """A monitor of the shares that go on by the chosen thresholds; None if the artifact keeps no
    held-out samples, or has one exit.

    Args:
      manifest: of the artifact.
      delta: the probability of a false alarm, ever.
    """
    held_out = manifest.held_out()
    if held_out is None or manifest.num_exits == 1:
        return None
    goes_on = np.cumprod(held_out.scores[:, :-1] < manifest.thresholds, axis=1)
    counts = goes_on.sum(axis=0)
    return Drift([len(goes_on), *counts[:-1]], counts, delta=delta)
