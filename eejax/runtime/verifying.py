"""Whether the models of an artifact answer here as the network did where it was exported."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eejax.runtime.engine import Runtime
from eejax.runtime.manifest import Manifest

# Of a logit's size: what float32 sums in another order differ by, with room.
TOLERANCE = 1e-3


class Verified(NamedTuple):
    """What `verify` found.

    Attributes:
      images: recorded.
      difference: the largest of a logit, over the largest logit of its image and exit.
      labels: that differ, over all exits.
      exits: that differ.
    """

    images: int
    difference: float
    labels: int
    exits: int

    @property
    def passed(self) -> bool:
        """Whether the answers are those that were recorded."""
        return self.difference <= TOLERANCE and not self.labels and not self.exits


def verify(runtime: Runtime) -> Verified:
    """Checks every exit's answers to the recorded images, alone and in a batch.

    A label or an exit may differ where two logits, or a score and its threshold, are equal to
    within float32; then `difference` is small.

    Raises:
      ValueError: if a file is damaged or cannot be run.
    """
    manifest = runtime.manifest
    images, logits, exits = recorded(manifest)
    never = np.full(manifest.num_exits - 1, np.inf, np.float32)
    arrays: tuple[np.ndarray, ...] = (images,)
    found = []
    for e in range(manifest.num_exits):
        stage = runtime.run_stage(e, arrays, never)
        arrays = stage.arrays
        found.append((stage.logits, logits[:, e]))
        # The single model ends at the same exit.
        only = never.copy()
        only[e:] = -np.inf
        alone = [runtime.predict(images[i : i + 1], only).logits for i in range(len(images))]
        found.append((np.concatenate(alone), logits[:, e]))
    labels = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in found)
    sizes = (np.abs(b).max(-1, keepdims=True, initial=1e-6) for _, b in found)
    # NumPy's maximum keeps a NaN.
    worst = np.max([(np.abs(a - b) / s).max() for (a, b), s in zip(found, sizes, strict=True)])
    taken = [runtime.predict(images[i : i + 1]).exits for i in range(len(images))]
    batch = next(iter(runtime.stream([images]))).exits
    wrong = int((np.concatenate(taken) != exits).sum() + (batch != exits).sum())
    return Verified(len(images), float(worst), labels, wrong)


def recorded(manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images `[N, H, W, C]`, logits of every exit `[N, E, C]`, and exits `[N]`, as recorded."""
    count, exits, classes = manifest.recorded, manifest.num_exits, len(manifest.classes)

    def array(name: str, dtype: str, *shape: int) -> np.ndarray:
        data = np.frombuffer(manifest.file(f"recorded/{name}.bin"), dtype)
        if data.size != np.prod([count, *shape]):
            raise ValueError(f"recorded/{name}.bin has {data.size} values for {count} images.")
        return data.reshape(count, *shape)

    return (
        array("images", "u1", *manifest.image),
        array("logits", "<f4", exits, classes),
        array("exits", "<i4"),
    )
