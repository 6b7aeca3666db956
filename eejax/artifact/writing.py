"""Writing an artifact."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eejax.artifact import programs
from eejax.artifact.programs import WEIGHTS
from eejax.bundle import Bundle, replace_directory
from eejax.inference.step import bind_exits, exit_step, first_samples
from eejax.policies import to_arrays
from eejax.runtime import manifest
from eejax.runtime.manifest import MANIFEST
from eejax.selection.lowering import lowered

LAYERS = ("onnx", "stablehlo", "export")
_RECORDED = 32


def export(
    bundle: Bundle,
    directory: str | Path,
    *,
    layers: Sequence[str] = LAYERS,
    images: Any = None,
    quantise: Any = None,
    certificate: Mapping[str, Any] | None = None,
    drop: float = 0.01,
) -> None:
    """Writes the artifact of a bundle, all or nothing; one that is already there is replaced.

    Args:
      bundle: what to export.
      directory: created, with its parents.
      layers: what to write of `LAYERS`; each runs without the others. `"export"` needs the package
        flatbuffers.
      images: uint8 `[N, height, width, channels]`, on which the answers are recorded that
        `eejax verify` expects; by default 32 of noise.
      quantise: uint8 `[N, height, width, channels]`, some hundred that are held out: the models
        compute their convolutions in int8, with ranges from these images. Temperatures and
        thresholds of the bundle must come from answers of such models, as
        `python -m experiments.quantise` chooses them. The layer must be `"onnx"` alone.
      certificate: what the thresholds guarantee, and on which data: anything that JSON holds. It is
        kept and shown.
      drop: of the last exit's accuracy on the bundle's held-out samples, that lower thresholds may
        cost when a server is under load.

    Raises:
      NotImplementedError: if an operation of the network or policy cannot be written in ONNX.
      ValueError: if a layer does not exist, the images do not fit, the certificate is not JSON,
        `drop` is not in [0, 1), or the directory holds something else than an artifact.
      OSError: if it cannot be written.
    """
    if not layers or not set(layers) <= set(LAYERS):
        raise ValueError(f"layers {list(layers)}; give some of {', '.join(LAYERS)}.")
    if quantise is not None and list(layers) != ["onnx"]:
        raise ValueError(f'layers {list(layers)} in int8; give ["onnx"].')
    directory = Path(directory)
    sides = bundle.image
    if images is None:
        images = _noise(sides)
    images = np.ascontiguousarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != sides or not len(images):
        raise ValueError(
            f"images {images.dtype} {images.shape}; give uint8 [N, {', '.join(map(str, sides))}]."
        )
    files: dict[str, bytes] = {}
    described: dict[str, Any] = {"layers": list(layers)}
    if "onnx" in layers:
        stages = models(bundle, quantise)
        described["precision"] = "float32" if quantise is None else "int8"
        files |= _model_files(stages)
    if "stablehlo" in layers:
        described["programs"] = {}
        for name, program, description in programs.stored(bundle):
            files[name] = program
            described["programs"][name] = description
    if "export" in layers:
        files |= programs.exported(bundle)
        described["exported"] = programs.exported_by(bundle)
    if {"stablehlo", "export"} & set(layers):
        files[WEIGHTS] = programs.weights(bundle)
    if quantise is None:
        logits, exits = _answers(bundle, images)
    else:
        logits, exits = _model_answers(stages, images, bundle.thresholds)
    files["recorded/images.bin"] = images.tobytes()
    files["recorded/logits.bin"] = logits.astype("<f4").tobytes()
    files["recorded/exits.bin"] = exits.astype("<i4").tobytes()
    if bundle.held_out is not None:
        files |= manifest.held_out_files(bundle.held_out)
        path = lowered(bundle.held_out, bundle.costs.fractions, bundle.thresholds, drop)
        described["levels"] = [
            {
                "thresholds": [manifest.number(t) for t in level.thresholds.tolist()],
                "goes_on": level.goes_on.tolist(),
            }
            for level in path
        ]
    files[MANIFEST] = _manifest(bundle, files, described, len(images), certificate)
    replace_directory(directory, files, _known(directory))


def models(bundle: Bundle, quantise: Any = None) -> list[Any]:
    """The ONNX models of a bundle's stages, in float32, or in int8 with ranges from images.

    Args:
      bundle: the network.
      quantise: None, or images as for `export`.
    """
    from eejax import onnx  # which needs a package that the other layers do not

    image = jax.ShapeDtypeStruct(bundle.image, jnp.uint8)
    args = (bundle.network, bundle.policy, bundle.variables, image, bundle.thresholds)
    stages = onnx.stages(*args)
    if quantise is None:
        return stages
    from eejax.onnx.quantising import quantised

    return quantised(stages, np.asarray(quantise))


def _model_files(stages: list[Any]) -> dict[str, bytes]:
    from eejax import onnx

    files = {"onnx/single.onnx": onnx.single(stages)}
    files |= {f"onnx/stage{e + 1}.onnx": model for e, model in enumerate(stages)}
    return {name: m.SerializeToString(deterministic=True) for name, m in files.items()}


def _manifest(
    bundle: Bundle,
    files: Mapping[str, bytes],
    described: Mapping[str, Any],
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
        "network": {
            "family": bundle.family,
            "arguments": bundle.arguments,
            "exits": list(bundle.exits or []),
        },
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
        "versions": _versions(),
        "recorded": recorded,
        **described,
        "files": {
            name: {"bytes": len(data), "sha256": manifest.sha256(data)}
            for name, data in sorted(files.items())
        },
    }
    try:
        return manifest.sealed(content, manifest.FORMAT, manifest.VERSION)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the certificate or policy is not JSON: {error}") from error


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("eejax", "jax", "jaxlib", "onnx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


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


def _model_answers(
    stages: list[Any], images: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `_answers`, by the models themselves: int8 answers are those of no JAX program."""
    from eejax.onnx.quantising import chained

    results = list(chained(stages, [images], thresholds))
    leaves = [leaves for _, leaves in results]
    return np.stack([logits for logits, _ in results], 1), np.stack(leaves, 1).argmax(1)


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
