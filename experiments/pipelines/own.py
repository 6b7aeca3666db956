"""This package's pipeline as a contender."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.data.config import cores
from experiments.data.decoding import Decoder
from experiments.data.opening import open_files
from experiments.data.streaming import Chunks, Streamed, chunk_size, fill, stream
from experiments.pipelines.contender import serve, work


def main() -> None:
    """Answers until the end of the input."""
    given = work()
    source = open_files(given.root).train
    rows = np.random.default_rng(0).permutation(len(source))
    images = Streamed(source, rows, Decoder(given.size, "random"))
    chunks = Chunks(images, given.batch, tuple(range(given.batch)), chunk_size(given.batch), seed=0)

    def begin() -> tuple[Iterator[Any], Callable[[], Any]]:
        threads = max(cores() // max(given.workers, 1), 1)
        parts = stream(chunks, 0, 10_000, threads=threads, workers=given.workers, ahead=2)

        def batches() -> Iterator[Any]:
            while True:
                batch = np.empty((given.batch, *images.shape[1:]), np.uint8)
                labels = np.empty(given.batch, np.int32)
                fill(parts, chunks, batch, labels)
                yield batch, labels

        return batches(), parts.close

    serve(begin)


if __name__ == "__main__":
    main()
