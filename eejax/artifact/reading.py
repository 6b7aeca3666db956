"""Running an artifact by JAX, without the code of its network."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike

from eejax import bundle as bundles
from eejax import stablehlo
from eejax.artifact.programs import BATCHES, WEIGHTS
from eejax.compiling import bound
from eejax.inference.step import Prediction, pad_batch
from eejax.policies import check_thresholds
from eejax.runtime import manifest
from eejax.runtime.manifest import MANIFEST, Manifest

_WARN_DAYS = 30
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """An artifact that runs by JAX; `load` makes one.

    Attributes:
      manifest: of the artifact.
      layer: `"stablehlo"` or `"export"`, whose programs run.
    """

    manifest: Manifest
    layer: str

    def predict(self, images: Any, thresholds: ArrayLike | None = None) -> Prediction:
        """Predicts uint8 images `[B, height, width, channels]`, any B >= 1; returns NumPy arrays.

        A batch is padded to 1, 32 or 256 images, and a larger one is served in pieces of 256. Each
        program is compiled when it is first used.

        Args:
          images: in 0..255.
          thresholds: E - 1; those of the artifact by default.

        Raises:
          ValueError: if images or thresholds do not fit, or a file of the artifact is damaged.
        """
        given = np.asarray(images)
        sides = self.manifest.image
        if given.dtype != np.uint8 or given.shape[1:] != sides or not len(given):
            shape = ", ".join(map(str, sides))
            raise ValueError(
                f"images {given.dtype} {given.shape}; give uint8 [B, {shape}] in 0..255, B >= 1."
            )
        limits = self.manifest.thresholds if thresholds is None else np.asarray(thresholds)
        limits = jnp.asarray(check_thresholds(limits, self.manifest.num_exits))
        pieces = []
        for start in range(0, len(given), BATCHES[-1]):
            piece = given[start : start + BATCHES[-1]]
            batch = next(size for size in BATCHES if len(piece) <= size)
            count = jnp.int32(len(piece))
            results = self._program(batch)(limits, pad_batch(piece, batch), count)
            pieces.append([np.asarray(x)[: len(piece)] for x in results])
        return Prediction(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))

    @functools.cached_property
    def _programs(self) -> dict[int, Callable[..., Any]]:
        return {}

    def _program(self, batch: int) -> Callable[..., Any]:
        if batch not in self._programs:
            make = self._stored if self.layer == "stablehlo" else self._exported
            try:
                self._programs[batch] = make(batch)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.manifest.directory} has no program for {batch} images on "
                    f"{jax.default_backend()} that this eejax can read: {error!r}."
                ) from error
        return self._programs[batch]

    def _stored(self, batch: int) -> Callable[..., Any]:
        platform = _PLATFORMS.get(jax.default_backend(), jax.default_backend())
        name = f"stablehlo/{platform}_fused_{batch}.mlirbc"
        data = self.manifest.file(name)
        program, reads = stored(data, self.manifest.content["programs"][name])
        run = stablehlo.call(program)

        def function(variables: Mapping[str, Any], thresholds: Any, images: Any, count: Any) -> Any:
            given = {**variables, "thresholds": thresholds, "images": images, "count": count}
            return run(*(given[name] for name in reads))

        variables = {name: self._weights[name] for name in reads if name in self._weights}
        return bound(function, variables)

    @functools.cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        try:
            return safetensors.numpy.load(self.manifest.file(WEIGHTS))
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"{WEIGHTS} is no safetensors file: {error}") from error

    def _exported(self, batch: int) -> Callable[..., Any]:
        data = self.manifest.file(f"export/fused_{batch}.jaxexport")
        program = jax.export.deserialize(bytearray(data))

        def function(leaves: Any, thresholds: Any, images: Any, count: Any) -> Any:
            args, options = jax.tree.unflatten(
                program.in_tree, [*leaves, thresholds, images, count]
            )
            return program.call(*args, **options)

        names = self.manifest.content["exported"]["weights"]
        return bound(function, [self._weights[name] for name in names])


def stored(
    data: bytes, description: Mapping[str, Any]
) -> tuple[stablehlo.Program, tuple[str, ...]]:
    """A verified portable artifact as a program, and the names of what it reads.

    Args:
      data: of the file.
      description: of the manifest, under `programs`.
    """
    outputs = tuple(jax.ShapeDtypeStruct(tuple(s), np.dtype(d)) for d, s in description["outputs"])
    reads = tuple(description["reads"])
    return stablehlo.Program(data, tuple(range(len(reads))), outputs), reads


def load(directory: str | Path, layer: str | None = None) -> Any:
    """Opens an artifact, or a bundle, for JAX; the result has `predict`.

    Args:
      directory: of an artifact, of a bundle, or of a run, which holds a bundle.
      layer: of an artifact: `"stablehlo"`, or `"export"`; by default the first that it holds.

    Returns:
      An `Artifact`, or a `Bundle`.

    Raises:
      ValueError: if there is none, it is damaged, this version cannot read it, or it lacks the
        layer; one line.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        return bundles.load(directory)
    found = manifest.read(directory)
    layers = [name for name in ("stablehlo", "export") if name in found.layers]
    if layer is None and layers:
        layer = layers[0]
    if layer not in layers:
        raise ValueError(
            f"{directory} holds {', '.join(found.layers)} and no programs for JAX; run "
            "it by eejax.runtime.load, or export it with stablehlo."
        )
    if layer == "export":
        _warn_of_expiry(found)
    return Artifact(found, layer)


def _warn_of_expiry(found: Manifest) -> None:
    by = found.part("exported")
    try:
        left = (datetime.date.fromisoformat(by["expires"]) - datetime.date.today()).days
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found.directory} does not say when its exports expire.") from error
    if left <= _WARN_DAYS:
        when = f"in {left} days" if left >= 0 else f"{-left} days ago"
        warnings.warn(
            f"what jax.export wrote in {found.directory} expires {when} ({by['expires']}): JAX "
            "built after that may refuse it; export it again, or load its stablehlo.",
            stacklevel=3,
        )
