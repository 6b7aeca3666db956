"""tf.data as a contender. Needs TensorFlow, pyarrow for Parquet, array_record for ArrayRecord.

tf.data has no reader for ArrayRecord and Parquet: Python reads 16 records or a row group a call,
and everything after it is TensorFlow's. JPEGs are decoded whole, as the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from experiments.pipelines.contender import Work, labelled_files, serve, work

_BUFFER = 1_000  # rows that are shuffled among each other, of Parquet files


def dataset(given: Work) -> Any:
    """Batches without end."""
    encoded = {"folder": folder, "array_record": records, "parquet": parquet}[given.format](given)

    def prepare(content: Any, label: Any) -> Any:
        image = tf.io.decode_jpeg(content, channels=3)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros((0, 0, 4)),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.slice(image, begin, size)
        shape = (given.size, given.size)
        image = tf.image.resize(image, shape, antialias=given.antialias)
        return tf.cast(tf.round(image), tf.uint8), label

    return encoded.map(prepare, tf.data.AUTOTUNE).batch(given.batch).prefetch(tf.data.AUTOTUNE)


def folder(given: Work) -> Any:
    """Image files."""
    files, labels = labelled_files(given.root)
    numbers = tf.data.Dataset.from_tensor_slices((files, labels)).shuffle(len(files)).repeat()
    return numbers.map(lambda file, label: (tf.io.read_file(file), label), tf.data.AUTOTUNE)


def records(given: Work) -> Any:
    """ArrayRecord files."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source: Any = ArrayRecordDataSource(sorted(map(str, given.root.glob("*-train.array_record*"))))
    features = {"image": tf.io.FixedLenFeature((), tf.string)}
    features["label"] = tf.io.FixedLenFeature((), tf.int64)

    def read(indices: np.ndarray) -> np.ndarray:
        return np.asarray(source.__getitems__(indices.tolist()), object)

    def parse(record: Any) -> Any:
        example = tf.io.parse_single_example(record, features)
        return example["image"], example["label"]

    numbers = tf.data.Dataset.range(len(source)).shuffle(len(source)).repeat().batch(16)
    read_some = numbers.map(
        lambda i: tf.ensure_shape(tf.numpy_function(read, [i], tf.string), [None])
    )
    return read_some.unbatch().map(parse, tf.data.AUTOTUNE)


def parquet(given: Work) -> Any:
    """Parquet files."""
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(file) for file in sorted(given.root.glob("train-*.parquet"))]
    groups = [(file, i) for file in files for i in range(file.metadata.num_row_groups)]

    def read() -> Iterator[Any]:
        random = np.random.default_rng(0)
        while True:
            for j in random.permutation(len(groups)):
                file, i = groups[j]
                table = file.read_row_group(i, ["image", "label"])
                images = table["image"].combine_chunks().field("bytes")
                yield images.to_numpy(zero_copy_only=False), table["label"].to_numpy()

    signature = (tf.TensorSpec((None,), tf.string), tf.TensorSpec((None,), tf.int64))
    return (
        tf.data.Dataset.from_generator(read, output_signature=signature).unbatch().shuffle(_BUFFER)
    )


def main() -> None:
    """Answers until the end of the input."""
    made = dataset(work())

    def begin() -> tuple[Iterator[Any], Callable[[], Any]]:
        return made.as_numpy_iterator(), lambda: None

    serve(begin)


if __name__ == "__main__":
    main()
