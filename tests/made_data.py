"""Images, archives, prepared data and a server, made for the tests and known to the byte."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import struct
import tarfile
import threading

import numpy as np
import pytest

SEED = 7
CLASSES = tuple(f"class {i}" for i in range(10))


def some(n, *shape, seed=SEED):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.int32) % 10


TRAIN, TEST = some(200, 32, 32, 3, seed=1), some(50, 32, 32, 3, seed=2)


def rows(*splits):
    """Images and labels as a sorted list: the same for the same data in any order."""
    return sorted(
        (i.tobytes(), int(n))
        for images, labels in splits
        for i, n in zip(images, labels, strict=True)
    )


def python2_pickle(value):
    """`value` pickled as Python 2 and the NumPy of its day did it, who wrote CIFAR."""

    def string(raw):
        return b"T" + struct.pack("<i", len(raw)) + raw

    def emit(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(emit(k) + emit(v) for k, v in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(emit, value)) + b"e"
        if isinstance(value, str):
            return string(value.encode())
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        shape = b"".join(map(emit, value.shape))
        dtype = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|")
        dtype += b"NNN" + emit(-1) + emit(-1) + b"K\x00tb"
        new = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
            + string(b"b")
            + b"tR"
        )
        return new + b"(K\x01(" + shape + b"t" + dtype + b"\x89" + string(value.tobytes()) + b"tb"

    return b"\x80\x02" + emit(value) + b"."


def cifar_tar(files, folder="cifar-10-batches-py"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def batch(images, labels, key="labels"):
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return python2_pickle({"data": planes, key: labels.tolist(), "batch_label": "a batch"})


def cifar10_files():
    images, labels = TRAIN
    part = [slice(start, start + 40) for start in range(0, 200, 40)]
    files = {f"data_batch_{i + 1}": batch(images[p], labels[p]) for i, p in enumerate(part)}
    names = python2_pickle({"label_names": list(CLASSES)})
    return files | {"test_batch": batch(*TEST), "batches.meta": names}


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def prepare(root, name="cifar10", version="3.0.2"):
    """What tensorflow-datasets leaves behind: TRAIN and TEST, in another order than the archive."""
    writers = pytest.importorskip("array_record.python.array_record_module")  # not on every system
    from PIL import Image

    def field(number, content):  # protocol buffers: a message or bytes
        size, head = len(content), [number << 3 | 2]
        while size >= 0x80:
            head.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([*head, size]) + content

    def example(image, label):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        values = {
            b"image": field(1, field(1, png.getvalue())),
            b"label": field(3, field(1, bytes([label]))),
        }
        entries = (field(1, field(1, k) + field(2, v)) for k, v in values.items())
        return field(1, b"".join(entries))

    folder = root / name / version
    folder.mkdir(parents=True)
    for split, (images, labels) in {"train": TRAIN, "test": TEST}.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = writers.ArrayRecordWriter(str(path), "group_size:1")
        for i in np.random.default_rng(SEED).permutation(len(labels)):
            writer.write(example(images[i], int(labels[i])))
        writer.close()
    module = "tensorflow_datasets.core.features"
    shape = {"dimensions": ["32", "32", "3"]}
    features = {
        "image": {
            "image": {"dtype": "uint8", "shape": shape},
            "pythonClassName": f"{module}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": "10"},
            "pythonClassName": f"{module}.class_label_feature.ClassLabel",
        },
    }
    top = {
        "featuresDict": {"features": features},
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
    }
    splits = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": "1",
            "shardLengths": [str(n)],
        }
        for split, n in (("train", 200), ("test", 50))
    ]
    info = {"fileFormat": "array_record", "name": name, "version": version, "splits": splits}
    (folder / "features.json").write_text(json.dumps(top))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


class Site:
    """A server on the loopback: what it serves, and what it was asked."""

    def __init__(self):
        self.files, self.asked, self.cut = {}, [], 0
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                site.asked.append((self.command, self.path))
                content = site.files.get(self.path.lstrip("/"))
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[: len(content) - site.cut])

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
