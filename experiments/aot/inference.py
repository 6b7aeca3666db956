"""Executors compiled for a TPU: a row of figures for each."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eejax import models, policies
from eejax.compiling import CONSTANT_BYTES
from eejax.inference import EXECUTORS, lanes
from eejax.inference.compaction import Buffer, runs
from eejax.inference.dispatch import tile_functions
from eejax.inference.step import Samples, bind_exits, first_samples, output_shapes
from eejax.inference.tiles import choose_tiles
from eejax.network import EarlyExitNetwork
from experiments.aot import program, topology

# The shares of images that leave at the four exits, as in `experiments.latency`.
SHARES = (0.4, 0.25, 0.15, 0.2)
# Cycles a second: a chip's published bf16 peak, over its matrix units' operations a cycle.
HERTZ = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
POLICY = policies.max_prob


class Case(NamedTuple):
    """A network on a device.

    Attributes:
      name: of the network.
      network: four exits.
      variables: arrays, or their shapes where they are arguments of the programs.
      image: `[height, width, channels]`; images are uint8.
      device: of a topology.
    """

    name: str
    network: EarlyExitNetwork
    variables: Any
    image: tuple[int, int, int]
    device: Any


class Compiled(NamedTuple):
    """One compiled program.

    Attributes:
      seconds: that compiling took here.
      temporary: bytes of temporary memory.
      live: bytes of temporary memory, arguments and results, without variables.
      text: what it does.
      optimal_seconds: of `cost_analysis()`; a loop's body counts once.
    """

    seconds: float
    temporary: int
    live: int
    text: program.Program
    optimal_seconds: float


# Name: family, image, classes, arguments.
NETWORKS: dict[str, tuple[str, tuple[int, int, int], int, dict[str, Any]]] = {
    "resnet8": ("resnet", (32, 32, 3), 10, {"depth": 8, "exits": [1, 2]}),
    "resnet20": ("resnet", (32, 32, 3), 10, {"depth": 20, "exits": [2, 4, 6]}),
    "resnet56": ("resnet", (32, 32, 3), 10, {"depth": 56, "exits": [7, 14, 20]}),
    "fast": ("fast", (32, 32, 3), 10, {"width": 64, "exits": [2, 3, 4]}),
    "isotropic12": ("isotropic", (32, 32, 3), 10, {"depth": 12, "width": 256, "exits": [3, 6, 9]}),
    "vit-s16": (
        "vit",
        (224, 224, 3),
        1000,
        {"size": "S", "patch": 16, "exits": [3, 6, 9], "dtype": jnp.bfloat16},
    ),
    "resnet50": (
        "resnet_imagenet",
        (224, 224, 3),
        1000,
        {"depth": 50, "exits": [3, 7, 13], "dtype": jnp.bfloat16},
    ),
}


def case(name: str, device: Any) -> Case:
    """A network of `NETWORKS`; as in `predictor`, variables are constants up to 64 MiB."""
    family, image, classes, arguments = NETWORKS[name]
    network = models.build(family, classes, image, **arguments)
    first = jnp.zeros((1, *image), jnp.uint8)
    shapes = jax.eval_shape(network.init, jax.random.key(0), first)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    constant = size <= CONSTANT_BYTES
    variables = jax.jit(network.init)(jax.random.key(0), first) if constant else shapes
    return Case(name, network, variables, image, device)


def measure(
    case: Case, executor: str, batch: int, tiles: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """A row for an executor at a batch size; `docs/lab/xla.md` describes the columns."""
    tiles = _tiles(case, batch, tiles) if executor in ("compact", "loop", "host") else ()
    row = {"network": case.name, "device": case.device.device_kind, "executor": executor}
    row |= {"batch": batch, "tiles": list(tiles)}
    reach = reached(batch, case.network.num_exits)
    if executor == "host":
        programs = tile_programs(case, batch, tiles)
        times = [per_tile for per_stage in trips(reach, tiles) for per_tile in per_stage]
        cycles = sum(n * p.text.cycles(()) for n, p in zip(times, programs, strict=True))
        optimal = sum(n * p.optimal_seconds for n, p in zip(times, programs, strict=True))
        # The programs hand buffers to each other, which are temporary to the caller.
        temporary = max(p.live for p in programs)
        loops = conditionals = 0
        copies = sum(_buffer_copies(case, p, batch) for p in programs)
        seconds = sum(p.seconds for p in programs)
    else:
        one = _compiled(case, _executor(case, executor, tiles), _images(case, batch))
        expected = _expected(case, executor, reach, tiles)
        cycles = one.text.cycles(expected)
        optimal = one.optimal_seconds if executor == "full" else None
        temporary, seconds = one.temporary, one.seconds
        loops, conditionals = one.text.count("while"), one.text.count("conditional")
        # `full` and `cond` have no buffers.
        copies = _buffer_copies(case, one, batch) if tiles else None
    row |= {"compile_seconds": seconds, "temporary_bytes": temporary}
    row |= {"loops": loops, "conditionals": conditionals, "buffer_copies": copies}
    microseconds = 1e6 * cycles / HERTZ[case.device.device_kind]
    return row | {"cycles": cycles, "microseconds": microseconds, "optimal_seconds": optimal}


def reached(batch: int, exits: int) -> list[int]:
    """Images that reach each exit, by `SHARES`; fewer exits share the rest of the last."""
    shares = np.array([*SHARES[: exits - 1], 0.0])
    return [round(batch * (1 - s)) for s in np.cumsum([0.0, *shares[:-1]])]


def trips(reach: Sequence[int], tiles: Sequence[int]) -> list[list[int]]:
    """How often each exit runs a tile of each size, as `compaction.run_stage` does."""
    result = []
    for left in reach:
        row = []
        for size in tiles:
            count = -(-left // size) if size == tiles[-1] else left // size
            row.append(count)
            left -= count * size
        result.append(row)
    return result


def tile_programs(case: Case, batch: int, tiles: Sequence[int]) -> list[Compiled]:
    """The programs of `host` for each stage and tile size, in that order."""
    kind = case.device.device_kind
    thresholds = jnp.zeros(case.network.num_exits - 1)
    samples: Any = jax.eval_shape(
        lambda images, indices: first_samples(POLICY, images, indices),
        jax.ShapeDtypeStruct((batch, *case.image), jnp.uint8),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    results = []
    for exit in bind_exits(case.network, POLICY, case.variables, thresholds):
        for size in tiles:
            step, begin = tile_functions(exit, size, kind)
            targets: Any = jax.eval_shape(begin, exit.variables, samples)

            def run(variables: Any, *rest: Any, step: Any = step) -> Any:
                return step(variables, *rest)

            rest = (targets, Buffer(samples, count), count, thresholds)
            results.append(_compiled(case, run, rest, exit.variables, donate=0))
        before = jax.eval_shape(lanes.unpacked, samples)
        after, _ = output_shapes(exit, before)
        samples = jax.eval_shape(lanes.packed, after)
    return results


def _tiles(case: Case, batch: int, tiles: tuple[int, ...] | None) -> tuple[int, ...]:
    first = bind_exits(case.network, POLICY, case.variables, jnp.zeros(3))[0]
    images = jax.ShapeDtypeStruct((batch, *case.image), jnp.uint8)
    tiles = choose_tiles(tiles, first, images, case.device.device_kind)
    return tuple(size for size in tiles if size <= batch)


def _executor(case: Case, executor: str, tiles: tuple[int, ...]) -> Callable[..., Any]:
    function: Any = EXECUTORS[executor]
    if tiles:
        function = functools.partial(function, tiles=tiles, platform=case.device.device_kind)
    return lambda variables, thresholds, images: function(
        case.network, POLICY, variables, thresholds, images
    )


def _images(case: Case, batch: int) -> tuple[Any, Any]:
    thresholds = jax.ShapeDtypeStruct((case.network.num_exits - 1,), jnp.float32)
    return thresholds, jax.ShapeDtypeStruct((batch, *case.image), jnp.uint8)


def _compiled(
    case: Case, function: Callable[..., Any], rest: Any, variables: Any = None, donate: Any = None
) -> Compiled:
    """Compiles `function(variables, *rest)`; `donate` counts `rest`."""
    variables = case.variables if variables is None else variables
    args = topology.on(case.device, tuple(rest))
    if all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables)):
        function, first = functools.partial(function, variables), 0
    else:
        args, first = (topology.on(case.device, variables), *args), 1
    donated = () if donate is None else (donate + first,)
    start = time.perf_counter()
    lowered = (
        jax.jit(function, donate_argnums=donated).trace(*args).lower(lowering_platforms=("tpu",))
    )
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes
    live = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
    live -= memory.alias_size_in_bytes
    if first:
        live -= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
    costs: Any = compiled.cost_analysis()
    text = program.read(compiled.as_text() or "")
    return Compiled(seconds, temporary, live, text, costs["optimal_seconds"])


def _expected(case: Case, executor: str, reach: list[int], tiles: Sequence[int]) -> list[float]:
    """How often each loop or branch runs, in the program's order."""
    if executor == "cond":
        # Of a single image: the probability that it goes on, given that it came so far.
        shares = np.cumsum([0.0, *SHARES[: case.network.num_exits - 1]])
        return [float(b / a) for a, b in zip(1 - shares[:-1], 1 - shares[1:], strict=True)]
    if executor == "loop":
        counts = np.array(trips(reach, tiles))
        return [float(n) for a, b in runs(case.network) for n in counts[a:b].sum(0)]
    return [float(n) for row in trips(reach, tiles) for n in row]


def _buffer_copies(case: Case, compiled: Compiled, batch: int) -> int:
    """How many times a program copies a buffer of features between two stages."""
    return len(compiled.text.copies(batch, min(_features(case, batch))))


def _features(case: Case, batch: int) -> Iterator[int]:
    samples = Samples(jax.ShapeDtypeStruct((batch, *case.image), jnp.uint8), (), ())
    thresholds = jnp.zeros(case.network.num_exits - 1)
    for exit in bind_exits(case.network, POLICY, case.variables, thresholds)[:-1]:
        samples, _ = output_shapes(exit, samples._replace(state=()))
        yield sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(samples.features))
