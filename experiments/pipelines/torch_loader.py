"""torch's DataLoader as a contender, with this package's decoding. Needs torch and Pillow, pyarrow
for Parquet, and tensorflow-datasets for ArrayRecord, which documents this use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from experiments.data.decoding import Decoder
from experiments.pipelines.contender import labelled_files, serve, work

_BUFFER = 1_000  # rows that are shuffled among each other, of Parquet files


class Folder(Dataset):
    """Image files."""

    def __init__(self, root: Any, decoder: Decoder) -> None:
        self._files, self._labels = labelled_files(root)
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with open(self._files[index], "rb") as file:
            return _decoded(self._decoder, file.read()), self._labels[index]


class Records(Dataset):
    """ArrayRecord files of tensorflow-datasets."""

    def __init__(self, root: Any, decoder: Decoder) -> None:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(root)
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(split="train", decoders=decoders)
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        examples = self._source.__getitems__(indices)
        return [(_decoded(self._decoder, x["image"]), int(x["label"])) for x in examples]


class Parquet(IterableDataset):
    """Parquet files: each worker takes row groups, and shuffles the rows of some of them."""

    def __init__(self, root: Any, decoder: Decoder) -> None:
        self._files = sorted(map(str, root.glob("train-*.parquet")))
        self._decoder = decoder

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        import pyarrow.parquet as pq

        info: Any = get_worker_info()
        files = [pq.ParquetFile(file) for file in self._files]
        groups = [(file, i) for file in files for i in range(file.metadata.num_row_groups)]
        random = np.random.default_rng(0)
        while True:
            mine = [groups[i] for i in random.permutation(len(groups))][info.id :: info.num_workers]
            rows: list[dict[str, Any]] = []
            for n, (file, i) in enumerate(mine):
                rows += file.read_row_group(i, ["image", "label"]).to_pylist()
                if len(rows) >= _BUFFER or n == len(mine) - 1:
                    for j in random.permutation(len(rows)):
                        row = rows[j]
                        yield _decoded(self._decoder, row["image"]["bytes"]), row["label"]
                    rows = []


def _decoded(decoder: Decoder, content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(decoder(content, np.random.default_rng())))


def main() -> None:
    """Answers until the end of the input."""
    given = work()
    torch.set_num_threads(1)
    decoder = Decoder(given.size, "random")
    kind = {"folder": Folder, "array_record": Records, "parquet": Parquet}[given.format]
    dataset = kind(given.root, decoder)
    order = {} if given.format == "parquet" else {"shuffle": True}

    def begin() -> tuple[Iterator[Any], Callable[[], Any]]:
        loader: Any = DataLoader(
            dataset, given.batch, num_workers=given.workers, drop_last=True, **order
        )

        def batches() -> Iterator[Any]:
            while True:
                yield from loader

        endless: Any = batches()
        return endless, endless.close

    serve(begin)


if __name__ == "__main__":
    main()
