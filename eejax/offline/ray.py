"""A network over a Ray Data data set.

    images = ray.data.read_images("photos", size=(32, 32), mode="RGB")
    answers = images.map_batches(Predictor, fn_constructor_args=("artifact",), batch_size=1024,
                                 num_cpus=1, compute=ray.data.ActorPoolStrategy(size=2))

Ray reads, places the replicas, and writes. Ray Data: https://docs.ray.io/en/latest/data/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eejax import runtime
from eejax.offline.job import confidence


class Predictor:
    """A callable class for `ray.data.Dataset.map_batches`; Ray makes one in each of its actors.

    Survivors share tiles within a batch, so give a `batch_size` of several hundred.
    """

    def __init__(
        self,
        artifact: str | Path,
        thresholds: Sequence[float] | None = None,
        *,
        column: str = "image",
        threads: int = 1,
    ) -> None:
        """Loads an artifact.

        Args:
          artifact: its directory, under the same path on every machine.
          thresholds: E - 1; those of the artifact by default.
          column: that holds images.
          threads: of ONNX Runtime; reserve as many CPUs with `num_cpus`.

        Raises:
          ValueError: if the artifact cannot be read, or the thresholds do not fit.
        """
        self._runtime = runtime.load(artifact, threads)
        self._thresholds = self._runtime.thresholds(thresholds)
        self._column = column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers a batch.

        Args:
          batch: with uint8 `[B, height, width, channels]` as images.

        Returns:
          The other columns, and `predicted` int32, the label, `exit` int32, 1-based, and
          `confidence` float32, `[B]` each.

        Raises:
          ValueError: if there is no such column, or its images do not fit.
        """
        images = batch.get(self._column)
        if images is None:
            columns = ", ".join(batch)
            raise ValueError(f"the batch has the columns {columns}; name the images' by `column`.")
        prediction = self._runtime.predict(images, self._thresholds)
        return {
            **{name: values for name, values in batch.items() if name != self._column},
            "predicted": prediction.labels,
            "exit": prediction.exits + 1,
            "confidence": confidence(prediction.logits),
        }
