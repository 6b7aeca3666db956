"""A bundle: a trained early-exit network with everything that inference needs, in two files.

`bundle.safetensors` holds the arrays: variables, policy, thresholds and costs. `bundle.json` holds
the rest: family and arguments, class names, image, preprocessing, and the SHA-256 of both files'
contents. So a bundle is data alone: nothing in it is executed, and no path in it is followed. The
hashes detect damage; they are not a signature, so they do not tell who wrote a bundle.

    bundle = eejax.load("runs/cifar10")  # a bundle's directory, or that of a run
    prediction = bundle.predict(images)  # prediction.labels, .exits, .logits
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from eejax.cost import Costs
from eejax.inference.compaction import compact
from eejax.inference.executors import cond
from eejax.inference.predictors import Predictor, predictor
from eejax.inference.step import Prediction
from eejax.network import EarlyExitNetwork, PyTree, Variables, normalise
from eejax.policies import Policy, check_thresholds, from_arrays, to_arrays
from eejax.runtime import manifest

FORMAT = "eejax bundle"
VERSION = 1
WEIGHTS = "bundle.safetensors"
DESCRIPTION = "bundle.json"
# Where a run's directory holds its bundle.
SUBDIRECTORY = "bundle"
# What the names of arrays begin with.
VARIABLES, POLICY = "variables/", "policy/"


# Compared by identity, since arrays have no truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A trained early-exit network with its policy, thresholds, preprocessing and costs.

    Attributes:
      family: a name in `eejax.models.FAMILIES`.
      arguments: of `eejax.models.build`, as JSON holds them: `{"width": 64, "exits": [2, 3, 4]}`.
      classes: the names of the C classes.
      image: `(height, width, channels)` of the uint8 images.
      mean: of each channel, in 0..255, that preprocessing subtracts.
      std: of each channel, in 0..255, that preprocessing divides by.
      variables: of the network.
      policy: a policy of `eejax.policies.POLICIES`, with or without temperatures.
      thresholds: `[E - 1]` float32.
      costs: of each stage and each head.
      metadata: anything else that JSON holds: seed, data set, date, versions.
      held_out: scores and outcomes of the samples on which the thresholds were chosen, if there are
        any: serving under load, planning and the drift monitor need them.
      exits: of the network that the family builds, those that are kept (`keep_exits`), 0-based;
        None for all. Variables, thresholds and costs are those of the kept network.

    Raises:
      ValueError: if a value cannot be stored in JSON, the family refuses its arguments, or there is
        not one threshold for each exit but the last, or not one cost for each exit; if `held_out`
        is not of these exits.
    """

    family: str
    arguments: Mapping[str, Any]
    classes: tuple[str, ...]
    image: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variables: Variables
    policy: Policy
    thresholds: np.ndarray
    costs: Costs
    metadata: Mapping[str, Any]
    held_out: manifest.HeldOut | None = None
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        plain = {
            "arguments": _plain("arguments", dict(self.arguments)),
            "metadata": _plain("metadata", dict(self.metadata)),
            "classes": tuple(map(str, self.classes)),
            "image": tuple(map(int, self.image)),
            "mean": tuple(map(float, self.mean)),
            "std": tuple(map(float, self.std)),
        }
        if self.exits is not None:
            plain["exits"] = tuple(map(int, self.exits))
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if not len(self.mean) == len(self.std) == self.image[-1]:
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations for images "
                f"{self.image}; give one of each for each channel."
            )
        exits = self.network.num_exits
        object.__setattr__(self, "thresholds", check_thresholds(self.thresholds, exits))
        costs = Costs(*(np.asarray(part, np.float64) for part in self.costs))
        if {part.shape for part in costs} != {(exits,)}:
            raise ValueError(
                f"costs of {[part.shape for part in costs]} for {exits} exits; give the costs of "
                f"{exits} stages and {exits} heads."
            )
        object.__setattr__(self, "costs", costs)
        if self.held_out is not None:
            scores, correct = map(np.asarray, self.held_out)
            if scores.ndim != 2 or not len(scores) or scores.shape[1] != exits:
                raise ValueError(f"held-out scores {scores.shape}; give [N, {exits}], N >= 1.")
            if correct.shape != scores.shape or correct.dtype != bool:
                raise ValueError(
                    f"held-out outcomes {correct.dtype} {correct.shape}; give bool {scores.shape}."
                )
            held_out = manifest.HeldOut(scores.astype(np.float32), correct)
            object.__setattr__(self, "held_out", held_out)

    @functools.cached_property
    def network(self) -> EarlyExitNetwork:
        """The network, on uint8 images `[B, height, width, channels]`; preprocessing is part of it.

        It has no variables of its own: give it `variables`.
        """
        # Flax takes half a second to import, which `import eejax` should not wait for.
        from eejax import models

        bare = models.build(self.family, len(self.classes), self.image, **self.arguments)
        whole = bare.reading(normalise(self.mean, self.std))
        return whole if self.exits is None else whole.keeping(self.exits)

    def predict(self, images: Any) -> Prediction:
        """Predicts uint8 images `[B, height, width, channels]`, any B >= 1; returns NumPy arrays.

        One image runs in `cond`, more in `compact`. Each is compiled when it is first used, and for
        each new power of two that a batch is padded to.

        Raises:
          ValueError: if shape or dtype of the images do not fit.
        """
        shape, dtype = np.shape(images), getattr(images, "dtype", None)
        if dtype != np.uint8 or len(shape) != 4 or shape[1:] != self.image or not shape[0]:
            sides = ", ".join(map(str, self.image))
            raise ValueError(f"images {dtype} {shape}; give uint8 [B, {sides}] in 0..255, B >= 1.")
        run = self._single if shape[0] == 1 else self._batches
        return run(self.thresholds, images)

    @functools.cached_property
    def _single(self) -> Predictor:
        return predictor(self.network, self.policy, self.variables, cond)

    @functools.cached_property
    def _batches(self) -> Predictor:
        return predictor(self.network, self.policy, self.variables, compact)


def save(bundle: Bundle, directory: str | Path) -> None:
    """Writes a bundle, all or nothing; a bundle that is already there is replaced.

    Args:
      bundle: what to save.
      directory: created, with its parents. `load` finds it in a run's directory as `bundle/`.

    Raises:
      ValueError: if the variables do not fit the network, the policy cannot be saved, or the
        directory holds something else than a bundle.
      OSError: if it cannot be written.
    """
    directory = Path(directory)
    policy, policy_arrays = to_arrays(bundle.policy)
    arrays = {
        **variable_names(jax.device_get(bundle.variables)),
        **{POLICY + name: array for name, array in policy_arrays.items()},
        "thresholds": bundle.thresholds,
        "costs/stages": bundle.costs.stages,
        "costs/heads": bundle.costs.heads,
    }
    if bundle.held_out is not None:
        arrays |= {f"held_out/{k}": array for k, array in bundle.held_out._asdict().items()}
    _check_variables(arrays, _shapes(bundle))
    # safetensors writes the bytes behind the pointer, whatever the strides.
    weights = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})
    content = {
        "family": bundle.family,
        "arguments": bundle.arguments,
        "exits": list(bundle.exits or []),  # none: all
        "classes": list(bundle.classes),
        "image": {"shape": list(bundle.image), "dtype": "uint8"},
        "mean": list(bundle.mean),
        "std": list(bundle.std),
        "policy": policy,
        "metadata": bundle.metadata,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    description = manifest.sealed(content, FORMAT, VERSION)
    files = {WEIGHTS: weights, DESCRIPTION: description}
    replace_directory(directory, files)


def load(directory: str | Path) -> Bundle:
    """Reads a bundle and verifies it.

    Args:
      directory: of a bundle, or of a run that holds one in `bundle/`.

    Raises:
      ValueError: if there is no bundle, it is damaged, or this version of eejax cannot read it; one
        line.
    """
    directory = Path(directory)
    places = [p for p in (directory, directory / SUBDIRECTORY) if (p / DESCRIPTION).exists()]
    if not places:
        raise ValueError(
            f"{directory} holds no bundle: no {DESCRIPTION} there or in {SUBDIRECTORY}/; give the "
            "directory that eejax.bundle.save wrote, or that of a finished run."
        )
    try:
        return _read(places[0])
    # Deeply nested JSON ends in a RecursionError.
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise ValueError(f"the bundle in {places[0]} cannot be read: {reason}") from error


def _read(place: Path) -> Bundle:
    content = _verified_content(_file(place, DESCRIPTION))
    weights = _file(place, WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != content["weights_sha256"]:
        raise ValueError(f"{WEIGHTS} is damaged: its SHA-256 is not the one in {DESCRIPTION}.")
    try:
        arrays = safetensors.numpy.load(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is no safetensors file: {error}") from error
    image = content["image"]["shape"]
    if content["image"]["dtype"] != "uint8":
        raise ValueError(f"images are {content['image']['dtype']}; expected uint8.")
    if len(image) != 3 or not all(type(side) is int and side > 0 for side in image):
        raise ValueError(f"images are {image}; expected height, width and channels.")
    bundle = Bundle(
        content["family"],
        content["arguments"],
        tuple(content["classes"]),
        tuple(image),
        tuple(content["mean"]),
        tuple(content["std"]),
        {},
        from_arrays(content["policy"], arrays, POLICY),
        arrays["thresholds"],
        Costs(arrays["costs/stages"], arrays["costs/heads"]),
        content["metadata"],
        _held_out(arrays),
        tuple(content["exits"]) or None,
    )
    shapes = _shapes(bundle)
    _check_variables(arrays, shapes)
    leaves = [jnp.asarray(arrays[name]) for name in variable_names(shapes)]
    variables = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return dataclasses.replace(bundle, variables=variables)


def _held_out(arrays: Mapping[str, np.ndarray]) -> manifest.HeldOut | None:
    if "held_out/scores" not in arrays:
        return None
    return manifest.HeldOut(arrays["held_out/scores"], arrays["held_out/correct"])


def _verified_content(data: bytes) -> dict[str, Any]:
    content = manifest.opened(data, DESCRIPTION, FORMAT, VERSION)
    content.setdefault("exits", [])  # which bundles did not have at first
    missing = [name for name in _CONTENT if not isinstance(content.get(name), _CONTENT[name])]
    if missing or len(content) != len(_CONTENT):
        raise ValueError(
            f"{DESCRIPTION} has the fields {sorted(content)}; expected {sorted(_CONTENT)}"
            + (f", {missing[0]} a {_CONTENT[missing[0]].__name__}." if missing else ".")
        )
    return content


_CONTENT: dict[str, type] = {
    "family": str,
    "arguments": dict,
    "exits": list,
    "classes": list,
    "image": dict,
    "mean": list,
    "std": list,
    "policy": dict,
    "metadata": dict,
    "weights_sha256": str,
}


def _plain(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back: tuples as lists."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} {value}; give what JSON holds: {error}") from error


def _file(place: Path, name: str) -> bytes:
    path = place / name
    if not path.is_file():
        raise ValueError(f"{name} is missing.")
    if path.resolve() != place.resolve() / name:
        raise ValueError(f"{name} is a link; expected a file in the directory.")
    return path.read_bytes()


def _shapes(bundle: Bundle) -> PyTree:
    """The shapes of the network's variables."""
    image = jax.ShapeDtypeStruct((1, *bundle.image), jnp.uint8)
    return jax.eval_shape(bundle.network.init, jax.random.key(0), image)


def variable_names(variables: PyTree) -> dict[str, Any]:
    """The leaves by their names in the file, in the order of the leaves."""
    leaves = jax.tree.leaves_with_path(variables)
    return {VARIABLES + jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def _check_variables(arrays: Mapping[str, np.ndarray], shapes: PyTree) -> None:
    expected = variable_names(shapes)
    given = {name for name in arrays if name.startswith(VARIABLES)}
    if different := sorted(given ^ expected.keys()):
        where = "are not the network's" if different[0] in given else "of the network are missing"
        raise ValueError(f"variables {where}: {different[0]} and {len(different) - 1} others.")
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape.shape or array.dtype != shape.dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; expected {shape.dtype} {shape.shape}."
            )


def replace_directory(
    directory: Path, files: Mapping[str, bytes], known: Iterable[str] = ()
) -> None:
    """Writes files into a directory beside it, which then takes its place.

    Args:
      directory: its parents are created.
      files: contents by name; a name may have folders.
      known: what else the directory may hold; it is removed.

    Raises:
      ValueError: if the directory holds something else.
    """
    found = [p for p in directory.rglob("*") if not p.is_dir()] if directory.exists() else []
    others = {str(p.relative_to(directory)) for p in found} - {*files, *known}
    if others:
        raise ValueError(f"{directory} holds {min(others)}; give a directory of its own.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    suffix = secrets.token_hex(4)
    new, old = (directory.with_name(f".{directory.name}.{kind}{suffix}") for kind in ("new", "old"))
    try:
        new.mkdir()
        for name, data in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with (new / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if directory.exists():
            directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
