"""Measures what the planner needs of a machine: stages, codecs, and the bytes of every cut."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eejax.planning.machines import RAW, Crossing, Times
from eejax.runtime import manifest
from eejax.runtime.engine import Runtime
from eejax.runtime.verifying import recorded
from eejax.tiers import codec
from eejax.tiers.codec import CODECS

FORMAT = "eejax times"
VERSION = 1
_LARGEST = 64 << 20  # bytes of a file
_QUANTILES = (0.5, 0.9, 0.99)


def measure(
    runtime: Runtime,
    codecs: Sequence[str] = CODECS,
    images: np.ndarray | None = None,
    *,
    repeats: int = 100,
    pause: float = 0.01,
) -> Times:
    """Runs every stage and every codec on single samples, each time after a pause.

    At low load a machine is idle before a request, its caches and its clock are cold, and a small
    stage takes several times as long as in a loop without rest (docs/planning.md). The first stage
    after a pause suffers most, so passes begin at every stage in turn.

    The labels that a codec changes are counted by running the stages after the cut on decoded
    features, without early exits.

    Args:
      runtime: the artifact on this machine.
      codecs: of `eejax.tiers.codec.CODECS`.
      images: uint8 `[N, height, width, channels]`; by default the recorded ones of the artifact,
        which are noise unless it was exported with others.
      repeats: passes from each stage; a third as many for each codec.
      pause: seconds before each.

    Raises:
      ValueError: if images do not fit, there are no repeats, or a file of the artifact is damaged.
    """
    if images is None:
        images = recorded(runtime.manifest)[0]
    images, never = runtime.checked(images, np.full(runtime.manifest.num_exits - 1, np.inf))
    if repeats < 1 or not pause >= 0:
        raise ValueError(f"{repeats} repeats and a pause of {pause} s; give at least 1 and 0.")
    exits = runtime.manifest.num_exits
    inputs: list[tuple[np.ndarray, ...]] = [(images,)]
    labels = []
    for e in range(exits):
        stage = runtime.run_stage(e, inputs[-1], never)
        inputs.append(stage.arrays)
        labels.append(stage.logits.argmax(-1))

    def sample(cut: int, i: int) -> list[np.ndarray]:
        return [array[i % len(images)][None] for array in inputs[cut]]

    stages = np.zeros((repeats, exits, exits))
    for r in range(-2, repeats):  # the first two load models, and are overwritten
        for first in range(exits):
            arrays = sample(first, r)
            time.sleep(pause)
            for e in range(first, exits):
                begin = time.perf_counter()
                arrays = runtime.run_stage(e, arrays, never).arrays
                stages[max(r, 0), first, e] = time.perf_counter() - begin
    crossings, layouts = {}, codec.layouts(runtime)
    for cut, name in [(0, RAW), *itertools.product(range(1, exits), codecs)]:
        encoded = [codec.encode(sample(cut, i), name) for i in range(len(images))]
        encode, decode = np.zeros((2, max(repeats // 3, 1)))
        for r in range(len(encode)):
            arrays, data = sample(cut, r), encoded[r % len(images)]
            time.sleep(pause)
            if cut:  # features that a stage has just computed
                arrays = runtime.run_stage(cut - 1, sample(cut - 1, r), never).arrays
            begin = time.perf_counter()
            codec.encode(arrays, name)
            encode[r] = time.perf_counter() - begin
            time.sleep(pause)
            begin = time.perf_counter()
            codec.decode(data, layouts[cut], name)
            decode[r] = time.perf_counter() - begin
        decoded = [codec.decode(data, layouts[cut], name) for data in encoded]
        carried = tuple(np.concatenate(parts) for parts in zip(*decoded, strict=True))
        changed = np.zeros(exits)
        for e in range(cut, exits):
            stage = runtime.run_stage(e, carried, never)
            changed[e] = (stage.logits.argmax(-1) != labels[e]).mean()
            carried = stage.arrays
        size = float(np.mean([len(data) for data in encoded]))
        crossings[cut, name] = Crossing(size, encode, decode, changed)
    environment = {
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(runtime.threads),
        "images": str(len(images)),
        "pause": f"{pause:g} s",
        "date": time.strftime("%Y-%m-%d"),
    }
    return Times(runtime.manifest.sha256, stages, crossings, environment)


def save(times: Times, path: str | Path) -> None:
    """Writes measured times as JSON: each with its quantiles for the reader, and every run."""
    exits = times.stages.shape[2]
    content = {
        "artifact": times.artifact,
        "environment": dict(times.environment),
        "stages": [
            {"first": first + 1, "stage": e + 1, **_runs(times.stages[:, first, e])}
            for first in range(exits)
            for e in range(first, exits)
        ],
        "crossings": [
            {
                "cut": cut,
                "codec": codec,
                "bytes": crossing.size,
                "encode": _runs(crossing.encode),
                "decode": _runs(crossing.decode),
                "changed": crossing.changed.tolist(),
            }
            for (cut, codec), crossing in times.crossings.items()
        ],
    }
    Path(path).write_bytes(manifest.sealed(content, FORMAT, VERSION))


def _runs(seconds: np.ndarray) -> dict[str, Any]:
    quantiles = np.quantile(seconds, _QUANTILES).tolist()
    named = {f"p{100 * q:g}": value for q, value in zip(_QUANTILES, quantiles, strict=True)}
    return {**named, "seconds": [float(f"{s:.4g}") for s in seconds]}


def load(path: str | Path) -> Times:
    """Reads what `save` wrote.

    Raises:
      ValueError: if there is no such file, or it is damaged or of another kind; one line.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes.")
        return _times(manifest.opened(data, str(path), FORMAT, VERSION))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{path} cannot be read ({reason}); write it with `eejax times`."
        ) from error
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} does not hold what `eejax times` writes: {error}.") from error


def _times(content: dict[str, Any]) -> Times:
    exits = max(entry["stage"] for entry in content["stages"])
    passes = len(content["stages"][0]["seconds"])
    stages = np.zeros((passes, exits, exits))
    for entry in content["stages"]:
        stages[:, entry["first"] - 1, entry["stage"] - 1] = entry["seconds"]
    crossings = {
        (entry["cut"], entry["codec"]): Crossing(
            float(entry["bytes"]),
            np.array(entry["encode"]["seconds"], float),
            np.array(entry["decode"]["seconds"], float),
            np.array(entry["changed"], float),
        )
        for entry in content["crossings"]
    }
    return Times(str(content["artifact"]), stages, crossings, dict(content["environment"]))
