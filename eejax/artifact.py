"""An artifact: one directory from which a trained network runs without its code, and stops early.

    eejax.export(eejax.load("runs/cifar10"), "artifact")
    eejax.runtime.load("artifact").predict(images)  # needs onnxruntime and numpy alone

| file | contents |
|---|---|
| `manifest.json` | classes, image, preprocessing, costs, policy, thresholds, certificate, metadata, versions, and size and SHA-256 of every file |
| `onnx/single.onnx` | the network for one image, which runs no stage after the exit that it takes |
| `onnx/stage1.onnx`, ... | each stage with its exit, for any batch size |
| `recorded/...` | some images, the answer of every exit to them, and the exits taken |

Thresholds are inputs of the models, with defaults; preprocessing is inside, and images are uint8.
"""  # noqa: E501

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eejax import onnx
from eejax.bundle import Bundle, replace_directory
from eejax.inference.step import bind_exits, exit_step, first_samples
from eejax.policies import to_arrays
from eejax.runtime import manifest
from eejax.runtime.manifest import MANIFEST

_RECORDED = 32


def export(
    bundle: Bundle,
    directory: str | Path,
    *,
    images: Any = None,
    certificate: Mapping[str, Any] | None = None,
) -> None:
    """Writes the artifact of a bundle, all or nothing; one that is already there is replaced.

    Args:
      bundle: what to export; backbones that compute in bfloat16 or float16 are exported as they
        are, and run where the runtime can.
      directory: created, with its parents.
      images: uint8 `[N, height, width, channels]`, on which the answers are recorded that
        `eejax verify` expects; by default 32 of noise.
      certificate: what the thresholds guarantee, and on which data: anything that JSON holds. It is
        kept and shown.

    Raises:
      NotImplementedError: if an operation of the network or policy cannot be written in ONNX.
      ValueError: if the images do not fit, the certificate is not JSON, or the directory holds
        something else than an artifact.
      OSError: if it cannot be written.
    """
    directory = Path(directory)
    sides = bundle.image
    if images is None:
        images = _noise(sides)
    images = np.ascontiguousarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != sides or not len(images):
        raise ValueError(
            f"images {images.dtype} {images.shape}; give uint8 [N, {', '.join(map(str, sides))}]."
        )
    image = jax.ShapeDtypeStruct(sides, jnp.uint8)
    args = (bundle.network, bundle.policy, bundle.variables, image, bundle.thresholds)
    files = {"onnx/single.onnx": onnx.single(*args).SerializeToString(deterministic=True)}
    for e, model in enumerate(onnx.stages(*args)):
        files[f"onnx/stage{e + 1}.onnx"] = model.SerializeToString(deterministic=True)
    logits, exits = _answers(bundle, images)
    files["recorded/images.bin"] = images.tobytes()
    files["recorded/logits.bin"] = logits.astype("<f4").tobytes()
    files["recorded/exits.bin"] = exits.astype("<i4").tobytes()
    files[MANIFEST] = _manifest(bundle, files, len(images), certificate)
    replace_directory(directory, files, _known(directory))


def _manifest(
    bundle: Bundle,
    files: Mapping[str, bytes],
    recorded: int,
    certificate: Mapping[str, Any] | None,
) -> bytes:
    policy, arrays = to_arrays(bundle.policy)
    content = {
        "classes": list(bundle.classes),
        "image": {
            "shape": list(bundle.image),
            "dtype": "uint8",
            "mean": list(bundle.mean),
            "std": list(bundle.std),
        },
        "network": {"family": bundle.family, "arguments": bundle.arguments},
        "costs": {
            "unit": "multiply-accumulates of one image",
            "stages": bundle.costs.stages.tolist(),
            "heads": bundle.costs.heads.tolist(),
            "fractions": bundle.costs.fractions.tolist(),
        },
        "policy": {
            "rule": policy,
            "parameters": {name: np.asarray(array).tolist() for name, array in arrays.items()},
        },
        "thresholds": [manifest.number(t) for t in bundle.thresholds.tolist()],
        "certificate": dict(certificate) if certificate else None,
        "metadata": dict(bundle.metadata),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "onnx")},
        "recorded": recorded,
        "files": {
            name: {"bytes": len(data), "sha256": manifest.sha256(data)}
            for name, data in sorted(files.items())
        },
    }
    try:
        digest = manifest.content_hash(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the certificate or policy is not JSON: {error}") from error
    whole = {"format": manifest.FORMAT, "version": manifest.VERSION}
    whole |= {"content_sha256": digest, "content": content}
    return json.dumps(whole, indent=1).encode()


def _answers(bundle: Bundle, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The policy's logits at every exit, `[N, E, C]`, and the exits taken, `[N]`."""

    @jax.jit
    def run(variables: Any, policy: Any, images: Any) -> Any:
        samples, results = first_samples(policy, images), []
        for exit in bind_exits(bundle.network, policy, variables, jnp.asarray(bundle.thresholds)):
            samples, logits, leaves = exit_step(exit, samples)
            results.append((logits, leaves))
        return tuple(jnp.stack(part, 1) for part in zip(*results, strict=True))

    logits, leaves = run(bundle.variables, bundle.policy, images)
    return np.asarray(logits), np.asarray(leaves).argmax(1)


def _noise(sides: tuple[int, int, int]) -> np.ndarray:
    """Images of noise, from faint to strong, so that they do not all take one exit."""
    random = np.random.default_rng(0)
    strength = np.linspace(0, 1, _RECORDED)[:, None, None, None]
    values = 128 + strength * random.normal(0, 128, (_RECORDED, *sides))
    return values.clip(0, 255).astype(np.uint8)


def _known(directory: Path) -> set[str]:
    """The files of the artifact that is to be replaced, if there is one."""
    if not (directory / MANIFEST).exists():
        return set()
    try:
        return {MANIFEST, *manifest.read(directory).files}
    except ValueError as error:
        raise ValueError(f"{error} Remove it, or give another directory.") from error
