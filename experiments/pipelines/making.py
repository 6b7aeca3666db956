"""The same images as JPEG folders, Parquet files, and ArrayRecord files of tensorflow-datasets."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from experiments.data.formats import quiet_absl

CLASSES = tuple(f"class{i}" for i in range(10))
FORMATS: tuple[Literal["folder", "parquet", "array_record"], ...] = (
    "folder",
    "parquet",
    "array_record",
)
_ROW_GROUP = 100  # as the Hugging Face hub writes ImageNet


def make(root: Path, images: int, seed: int, width: int = 400, height: int = 350) -> None:
    """Makes a data set, once in each format of `FORMATS`, in folders of these names.

    A tenth more images are for the split `val`. An image has a random colour that tells its class,
    coarse patches and fine noise: a JPEG of 350 x 400 pixels has about 60 kB.

    Args:
      root: directory; it is made.
      images: for training, at least 1.
      seed: of the images.
      width: in pixels.
      height: in pixels.
    """
    random = np.random.default_rng(seed)
    splits = {"train": images, "val": max(images // 10, len(CLASSES))}
    for split, count in splits.items():
        rows = list(_drawn(random, count, width, height))
        for i, (jpeg, label) in enumerate(rows):
            path = root / "folder" / split / CLASSES[label] / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
        _write_parquet(root / "parquet", split, rows)
        _write_records(root / "array_record", split, rows)
    _write_metadata(root / "array_record", splits)


def _drawn(
    random: np.random.Generator, count: int, width: int, height: int
) -> Iterator[tuple[bytes, int]]:
    """JPEGs and their labels."""
    colours = np.random.default_rng(0).integers(64, 192, (len(CLASSES), 3))
    for i in range(count):
        label = i % len(CLASSES)
        patches = random.integers(-64, 64, (height // 16 + 1, width // 16 + 1, 3)) + colours[label]
        coarse = Image.fromarray(patches.astype(np.uint8)).resize((width, height))
        noise = random.integers(-40, 40, (height, width, 3))
        pixels = np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7)).save(file, "JPEG", quality=90)
        yield file.getvalue(), label


def _write_parquet(root: Path, split: str, rows: list[tuple[bytes, int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    feature = {"names": list(CLASSES), "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    schema = pa.schema([("image", image), ("label", pa.int64())])
    table = pa.Table.from_pydict(
        {
            "image": [{"bytes": jpeg, "path": None} for jpeg, _ in rows],
            "label": [label for _, label in rows],
        },
        schema=schema.with_metadata({"huggingface": json.dumps(features)}),
    )
    root.mkdir(exist_ok=True)
    pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=_ROW_GROUP)


def _features() -> Any:
    with quiet_absl():
        import tensorflow_datasets as tfds

        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(CLASSES)),
            }
        )


def _write_records(root: Path, split: str, rows: list[tuple[bytes, int]]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    root.mkdir(exist_ok=True)
    features = _features()
    writer = ArrayRecordWriter(
        str(root / f"made-{split}.array_record-00000-of-00001"), "group_size:1"
    )
    for jpeg, label in rows:
        writer.write(features.serialize_example({"image": jpeg, "label": label}))
    writer.close()


def _write_metadata(root: Path, splits: dict[str, int]) -> None:
    _features().save_config(root)
    described = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": "1",
            "shardLengths": [str(count)],
        }
        for split, count in splits.items()
    ]
    info = {"fileFormat": "array_record", "name": "made", "version": "1.0.0", "splits": described}
    (root / "dataset_info.json").write_text(json.dumps(info))
