"""The command `eejax`: artifacts on the command line.

`predict`, `inspect` and `verify` need ONNX Runtime and NumPy alone; `export` needs JAX.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from eejax.runtime import manifest

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_BATCH = 256
# As in eejax.artifact, which needs JAX.
_LAYERS = ("onnx", "stablehlo", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if an artifact is not what it should be, or 2 for a mistake."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        print(f"eejax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "eejax", description="Early-exit networks as artifacts: one directory that runs anywhere."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(action: Callable[[Any], int], name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(action=action)
        return added

    export = command(_export, "export", "Write the artifact of a trained network.")
    export.add_argument("run", metavar="RUN", help="directory of a run, or of a bundle")
    export.add_argument("--to", required=True, metavar="DIR", help="directory to write")
    export.add_argument(
        "--layers",
        nargs="+",
        choices=_LAYERS,
        default=_LAYERS,
        help="what to write; each runs without the others; all by default",
    )
    export.add_argument(
        "--drop",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="accuracy that lower thresholds may cost when a server is under load; 0.01 by default",
    )
    predict = command(
        _predict, "predict", "Predict images; a line for each, with its exit and confidence."
    )
    predict.add_argument("directory", metavar="DIR", help="an artifact")
    predict.add_argument(
        "images",
        metavar="IMAGES",
        help="a folder of images, an image, or an .npy of uint8 [N, ...]",
    )
    predict.add_argument("--format", choices=("csv", "jsonl"), default="csv")
    predict.add_argument("--to", metavar="FILE", help="where to write; by default to the terminal")
    predict.add_argument(
        "--thresholds",
        type=_numbers,
        metavar="T,...",
        help="instead of the artifact's, as in --thresholds=-inf,0.5; inf is one, too",
    )
    verify = command(
        _verify, "verify", "Check every file's hash, and that recorded images get their answers."
    )
    verify.add_argument("directory", metavar="DIR", help="an artifact")
    verify.add_argument("--manifest-sha256", metavar="HASH", help="that its manifest must have")
    verify.add_argument("--jax", action="store_true", help="run the programs for JAX, too")
    for added in (predict, verify):
        added.add_argument("--threads", type=int, help="by default one for each core")
    inspect = command(_inspect, "inspect", "Say what is in an artifact.")
    inspect.add_argument("directory", metavar="DIR", help="an artifact")
    inspect.add_argument("--json", action="store_true", help="all of it")
    # What they need is imported when they run.
    from eejax.planning import commands as planning
    from eejax.server import commands as server

    server.add(command)
    planning.add(command)
    return parser


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _export(arguments: argparse.Namespace) -> int:
    from eejax.artifact import export
    from eejax.bundle import load

    start = time.perf_counter()
    export(load(arguments.run), arguments.to, layers=arguments.layers, drop=arguments.drop)
    size = sum(p.stat().st_size for p in Path(arguments.to).rglob("*") if p.is_file())
    seconds = time.perf_counter() - start
    print(f"{arguments.to}: {size / 1e6:.1f} MB in {seconds:.1f} s; eejax verify {arguments.to}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from eejax import runtime

    artifact = runtime.load(arguments.directory, arguments.threads)
    names, batches = _images(Path(arguments.images), artifact.manifest.image)
    start = time.perf_counter()
    counts = np.zeros(artifact.manifest.num_exits, int)
    done = 0
    with _output(arguments.to) as file:
        write = _writer(file, arguments.format)
        for prediction in artifact.stream(batches, arguments.thresholds):
            for row in _rows(artifact, names[done:], prediction):
                write(row)
            done += len(prediction.labels)
            counts += np.bincount(prediction.exits, minlength=len(counts))
            _progress(done, len(names), time.perf_counter() - start)
    cost = float((counts * artifact.manifest.costs).sum() / max(done, 1))
    shares = ", ".join(f"{100 * n / max(done, 1):.0f}" for n in counts)
    print(f"exits {shares} % of {done:,} images, {cost:.2f} of the cost", file=sys.stderr)
    return 0


def _rows(artifact: Any, names: Sequence[str], prediction: Any) -> Iterator[dict[str, Any]]:
    shifted = prediction.logits - prediction.logits.max(-1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(-1)
    for i, label in enumerate(prediction.labels.tolist()):
        yield {
            "image": names[i],
            "label": label,
            "class": artifact.manifest.classes[label],
            "exit": int(prediction.exits[i]) + 1,
            "confidence": round(float(confidence[i]), 6),
        }


def _writer(file: TextIO, kind: str) -> Callable[[dict[str, Any]], Any]:
    if kind == "jsonl":
        return lambda row: file.write(json.dumps(row) + "\n")
    table = csv.DictWriter(file, ["image", "label", "class", "exit", "confidence"])
    table.writeheader()
    return table.writerow


def _output(name: str | None) -> Any:
    # newline="" as the csv module wants it.
    return open(name, "w", newline="", encoding="utf-8") if name else _Kept(sys.stdout)


class _Kept:
    """A file that `with` leaves open."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __enter__(self) -> TextIO:
        return self._file

    def __exit__(self, *raised: object) -> None:
        self._file.flush()


def _images(place: Path, sides: tuple[int, int, int]) -> tuple[list[str], Iterable[np.ndarray]]:
    """Names, and batches of uint8 images `[b, height, width, channels]`."""
    if not place.exists():
        raise ValueError(f"{place} does not exist; give a folder of images, an image, or an .npy.")
    wanted = ", ".join(map(str, sides))
    if place.suffix == ".npy":
        images = np.load(place, mmap_mode="r", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape[1:] != sides or not len(images):
            raise ValueError(
                f"{place} holds {images.dtype} {images.shape}; give uint8 [N, {wanted}]."
            )
        starts = range(0, len(images), _BATCH)
        return list(map(str, range(len(images)))), (images[s : s + _BATCH] for s in starts)
    if place.is_dir():
        paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in _ENDINGS)
    else:
        paths = [place]
    if not paths:
        raise ValueError(f"{place} holds no images; known endings: {' '.join(sorted(_ENDINGS))}.")
    names = [str(p.relative_to(place)) if place.is_dir() else p.name for p in paths]
    starts = range(0, len(paths), _BATCH)
    return names, (
        np.stack([_image(path, sides) for path in paths[s : s + _BATCH]]) for s in starts
    )


def _image(path: Path, sides: tuple[int, int, int]) -> np.ndarray:
    """An image file, in the size and number of channels that the network reads."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise ModuleNotFoundError("image files need pillow: pip install pillow") from None
    height, width, channels = sides
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ValueError(f"images of {channels} channels; give them as .npy.")
    try:
        with Image.open(path) as image:
            image = image.convert(modes[channels])
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(image, np.uint8).reshape(sides)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that can be read.") from error


def _progress(done: int, total: int, seconds: float) -> None:
    if sys.stderr.isatty():
        rate = done / max(seconds, 1e-9)
        end = "\n" if done == total else "\r"
        print(f"{done:,} of {total:,} images, {rate:,.0f} a second", end=end, file=sys.stderr)


def _inspect(arguments: argparse.Namespace) -> int:
    found = manifest.read(arguments.directory)
    if arguments.json:
        print(json.dumps(found.content, indent=1))
        return 0
    content = found.content
    height, width, channels = found.image
    network, policy, certificate = map(found.part, ("network", "policy", "certificate"))
    print(f"{network['family']} {json.dumps(network['arguments'])}")
    print(f"{len(found.classes)} classes: {', '.join(found.classes[:12])}")
    print(f"images uint8 [{height}, {width}, {channels}]")
    print(f"policy {json.dumps(policy['rule'])}")
    print("\nexit   cost   leaves from a score of")
    limits = [f"{t:.4g}" for t in found.thresholds.tolist()] + ["any"]
    for e, (cost, limit) in enumerate(zip(found.costs, limits, strict=True)):
        print(f"{e + 1:>4}  {cost:5.3f}   {limit}")
    print(f"\ncertificate {json.dumps(certificate) if certificate else 'none'}")
    print(f"metadata {json.dumps(found.part('metadata'))}")
    print(f"versions {json.dumps(found.part('versions'))}")
    print(f"manifest sha256 {found.sha256}")
    for name, entry in content["files"].items():
        print(f"{entry['bytes']:>12,}  {name}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from eejax import runtime

    artifact = runtime.load(arguments.directory, arguments.threads)
    found, layers = artifact.manifest, artifact.manifest.layers
    if arguments.manifest_sha256 not in (None, found.sha256):
        print(f"not the manifest that was expected: {found.sha256}")
        return 1
    for name in found.files:
        found.file(name)
    print(f"{len(found.files)} files have their hashes")
    passed = True
    if "onnx" in layers:
        models = runtime.verify(artifact)
        passed = models.passed
        print(
            f"onnx: {models.images} recorded images, {models.labels} other labels, {models.exits} "
            f"other exits, logits within {models.difference:.1e}"
        )
    for layer in [name for name in layers if name != "onnx"] if arguments.jax else ():
        from eejax.artifact import load

        images, _, exits = runtime.recorded(found)
        other = int((load(arguments.directory, layer).predict(images).exits != exits).sum())
        passed &= not other
        print(f"{layer}: {len(images)} recorded images, {other} other exits")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
