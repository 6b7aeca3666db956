"""What an artifact stores for JAX: the fused program and the stages, traced from a bundle."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from eejax import stablehlo
from eejax.bundle import Bundle, variable_names
from eejax.inference.compaction import compact
from eejax.inference.executors import cond
from eejax.inference.step import Prediction, Samples, bind_exits, exit_step, first_samples
from eejax.inference.tiles import choose_tiles

WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
BATCHES = (1, 32, 256)
STAGE_BATCH = 32
# What JAX promises for jax.export; counted between builds, so from the day of export at most.
EXPORT_DAYS = 183


class Inputs(NamedTuple):
    """The arguments of a fused program, and the names of their leaves.

    Attributes:
      variables: of the network.
      thresholds: `[E - 1]` float32.
      images: `[B, height, width, channels]` uint8.
      count: the number of valid images, int32; the others are padding.
    """

    variables: Any
    thresholds: Any
    images: Any
    count: Any


def weights(bundle: Bundle) -> bytes:
    """The variables as safetensors, by their names."""
    arrays = variable_names(jax.device_get(bundle.variables))
    return safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})


def stored(bundle: Bundle) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Name, portable artifact and description of every program, for every platform.

    A description has the platform, the batch size, the stage, 1-based, or None for the fused
    program, what the program reads by name, and dtype and shape of its results.
    """
    for platform in PLATFORMS:
        for batch in BATCHES:
            args = _shapes(bundle, batch)
            program = stablehlo.portable(fused(bundle, batch, platform), *args, platform=platform)
            name = f"stablehlo/{platform}_fused_{batch}.mlirbc"
            yield name, program.artifact, _described(program, _names(args), platform, batch, None)
        samples: Any = _shapes(bundle, STAGE_BATCH).images
        for e in range(bundle.network.num_exits):
            function = stage(bundle, e)
            args = _shapes(bundle, STAGE_BATCH)
            inputs = (args.variables, args.thresholds, samples)
            program = stablehlo.portable(function, *inputs, platform=platform)
            names = [*_names(args)[:-2], *_numbered(samples)]
            name = f"stablehlo/{platform}_stage{e + 1}_{STAGE_BATCH}.mlirbc"
            yield name, program.artifact, _described(program, names, platform, STAGE_BATCH, e + 1)
            samples = jax.eval_shape(function, *inputs)[2]


def fused(bundle: Bundle, batch: int, platform: str | None) -> Callable[..., tuple[Any, ...]]:
    """`run(*Inputs) -> (labels, exits, logits)` for a batch size: `cond` for one image, else
    `compact`, in the tiles that suit the platform, or with None in those of a CPU."""
    limits = jnp.asarray(bundle.thresholds)
    exit = bind_exits(bundle.network, bundle.policy, bundle.variables, limits)[0]
    images = jax.ShapeDtypeStruct((batch, *bundle.image), jnp.uint8)
    tiles = choose_tiles(None, exit, images, platform or "cpu")

    def run(variables: Any, thresholds: Any, images: Any, count: Any) -> tuple[Any, ...]:
        args = (bundle.network, bundle.policy, variables, thresholds, images, count)
        if batch == 1:
            return tuple(cond(*args))
        prediction: Prediction = compact(*args, tiles=tiles, platform=platform or "cpu")
        return tuple(prediction)

    return run


def stage(bundle: Bundle, e: int) -> Callable[..., tuple[Any, ...]]:
    """`run(variables, thresholds, samples) -> (logits, leaves, samples)` of exit e, 0-based; the
    first reads images."""

    def run(variables: Any, thresholds: Any, samples: Any) -> tuple[Any, ...]:
        if e == 0:
            samples = first_samples(bundle.policy, samples)
        exits = bind_exits(bundle.network, bundle.policy, variables, thresholds)
        after, logits, leaves = exit_step(exits[e], Samples(*samples))
        return logits, leaves, tuple(after)

    return run


def exported(bundle: Bundle) -> dict[str, bytes]:
    """The fused programs by `jax.export`, each for all platforms.

    Raises:
      ModuleNotFoundError: if the package flatbuffers is not installed.
    """
    try:
        import flatbuffers as _  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'the layer "export" needs flatbuffers: pip install flatbuffers'
        ) from None
    files = {}
    for batch in BATCHES:
        function = jax.jit(fused(bundle, batch, None))
        program = jax.export.export(function, platforms=PLATFORMS)(*_shapes(bundle, batch))
        files[f"export/fused_{batch}.jaxexport"] = bytes(program.serialize())
    return files


def exported_by(bundle: Bundle) -> dict[str, Any]:
    """Who exported, the day after which JAX may refuse it, and the weights in their order."""
    today = datetime.date.today()
    return {
        "jax": jax.__version__,
        "calling_convention": jax.export.maximum_supported_calling_convention_version,
        "date": today.isoformat(),
        "expires": (today + datetime.timedelta(EXPORT_DAYS)).isoformat(),
        "weights": list(variable_names(bundle.variables)),
    }


def _shapes(bundle: Bundle, batch: int) -> Inputs:
    return Inputs(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), bundle.variables),
        jax.ShapeDtypeStruct(bundle.thresholds.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, *bundle.image), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def _names(inputs: Inputs) -> list[str]:
    """The names of the leaves, in their order."""
    return [*variable_names(inputs.variables), "thresholds", "images", "count"]


def _numbered(samples: Any) -> list[str]:
    leaves = len(jax.tree.leaves(samples))
    return ["images"] if hasattr(samples, "dtype") else [f"in{i}" for i in range(leaves)]


def _described(
    program: stablehlo.Program, names: list[str], platform: str, batch: int, stage: int | None
) -> dict[str, Any]:
    return {
        "platform": platform,
        "batch": batch,
        "stage": stage,
        "reads": [names[i] for i in program.reads],
        "outputs": [[str(np.dtype(x.dtype)), list(x.shape)] for x in program.outputs],
    }
