"""Stages as programs of their own, driven from the host.

`host` does what `compact` does, tile by tile and with the same function, but Python is the loop.
It is for devices on which loops are slow, and for feature maps so large that one program cannot
hold the buffers of all stages: a stage's buffer is released as soon as the next one is full.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.compiling import bound
from eejax.inference import compaction, lanes
from eejax.inference.compaction import Buffer, Targets
from eejax.inference.step import (
    Exit,
    Prediction,
    Samples,
    bind_exits,
    check_images,
    first_samples,
    output_shapes,
    pad_batch,
)
from eejax.inference.tiles import check_tiles, choose_tiles
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy, check_thresholds


def host(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    *,
    tiles: tuple[int, ...] | None = None,
    max_batch: int = 256,
    devices: Sequence[Any] | None = None,
) -> Callable[[Iterable[float] | Array, Any], Prediction]:
    """Compiles per-sample exit as one program for each stage and tile size.

    The number of survivors is read from the device only after other work has been dispatched to it:
    a batch is split into two groups for each device, and while the number of one is awaited the
    other is computed.

    `network`, `policy` and `variables` are those of `Executor`.

    Args:
      tiles: samples a program, decreasing, each a divisor of the one before; default from
        `max_batch`.
      max_batch: a larger batch is served in pieces of this size.
      devices: each serves a part of every batch; default one device.

    Returns:
      `predict(thresholds, images) -> Prediction` of E - 1 thresholds and images `[B, ...]`, B >= 1,
      in NumPy arrays. It raises ValueError if there are no images, if the number of thresholds is
      wrong, or one is NaN.

    Raises:
      ValueError: if `tiles` is not decreasing, or a size does not divide the one before it.
    """
    check_tiles(tiles)
    devices = [jax.devices()[0]] if devices is None else list(devices)
    exits = bind_exits(network, policy, variables, jnp.zeros(network.num_exits - 1))
    programs = {
        device: [functools.cache(functools.partial(_programs, exit, device)) for exit in exits]
        for device in devices
    }

    @functools.cache
    def tiles_for(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
        images = jax.ShapeDtypeStruct((max_batch, *shape), dtype)
        return choose_tiles(tiles, exits[0], images, _platform(devices[0]))

    integer = functools.cache(lambda value, device: jax.device_put(np.int32(value), device))

    def serve(
        group: np.ndarray, device: Any, thresholds: np.ndarray, first: int
    ) -> Iterator[Buffer | None]:
        """Runs one group through all stages; yields None whenever the host would have to wait."""
        count, tiles = len(group), tiles_for(group.shape[1:], group.dtype)
        # Powers of two, so that few shapes are ever compiled.
        padded = max(1 << (count - 1).bit_length(), tiles[-1])
        indices = np.arange(first, first + padded, dtype=np.int32)
        samples = first_samples(policy, pad_batch(group, padded), indices)
        active = Buffer(jax.device_put(samples, device), integer(count, device))
        on_device = jax.device_put(thresholds, device)
        outputs = None
        for program_for in programs[device]:
            sizes, start = _sizes(count, tiles), 0
            targets = program_for(sizes[0])[1](active.rows)
            if outputs is not None:
                targets = targets._replace(outputs=outputs)
            for size in sizes:
                step, _ = program_for(size)
                targets = step(targets, active, integer(start, device), on_device)
                start += size
            active, outputs = targets
            yield None
            count = 0 if active.rows is None else int(active.count)
            if not count:
                break
        yield outputs

    def predict(thresholds: Iterable[float] | Array, images: Any) -> Prediction:
        checked = check_thresholds(thresholds, network.num_exits)
        check_images(images)
        outputs = []
        for start in range(0, len(images), max_batch):
            piece = np.asarray(images[start : start + max_batch])
            tiles = tiles_for(piece.shape[1:], piece.dtype)
            share = max(-(-len(piece) // (2 * len(devices))), tiles[-1])
            share = -(-share // tiles[0]) * tiles[0] if share > tiles[0] else share
            under_way = collections.deque(
                serve(piece[a : a + share], devices[i % len(devices)], checked, start + a)
                for i, a in enumerate(range(0, len(piece), share))
            )
            while under_way:
                group = under_way.popleft()
                result = next(group)
                if result is None:
                    under_way.append(group)
                else:
                    outputs.append(result)
        return _in_order(outputs)

    return predict


def tile_functions(
    exit: Exit, size: int, platform: str | None = None
) -> tuple[Callable[..., Targets], Callable[..., Targets]]:
    """The two functions that `host` compiles for an exit and a tile size.

    Args:
      exit: the exit.
      size: samples a tile.
      platform: as for `tiles.default_tiles`.

    Returns:
      `step(variables, targets, active, start, thresholds)`, which runs one tile, and
      `begin(variables, samples)`, which makes the targets for the rows of a buffer.
    """

    def step(
        variables: Any, targets: Targets, active: Buffer, start: Array, thresholds: Array
    ) -> Targets:
        here = exit._replace(variables=variables, thresholds=thresholds)
        return compaction.run_tile(here, active, start, targets, size)

    def begin(variables: Any, samples: Samples) -> Targets:
        here, before = exit._replace(variables=variables), lanes.unpacked(samples)
        after, logits = output_shapes(here, before)
        rows = len(samples.indices)
        survivors = compaction.empty_survivors(exit, after, rows, platform)
        return Targets(survivors, compaction.empty_outputs(logits, rows + size))

    return step, begin


def _programs(
    exit: Exit, device: Any, size: int
) -> tuple[Callable[..., Targets], Callable[..., Targets]]:
    """The functions of `tile_functions` compiled for a device, with their variables."""
    step, begin = tile_functions(exit, size, _platform(device))
    variables = jax.device_put(exit.variables, device)
    return bound(step, variables, donate_argnums=(1,)), bound(begin, variables)


def _platform(device: Any) -> str:
    return device.device_kind if device.platform == "tpu" else device.platform


def _sizes(count: int, tiles: Sequence[int]) -> list[int]:
    """Tile sizes that cover `count` samples: large ones while they are full, then smaller ones."""
    sizes = []
    for size in tiles:
        full, count = divmod(count, size)
        sizes += [size] * full
    return sizes + [tiles[-1]] * (count > 0)


def _in_order(outputs: Sequence[Buffer]) -> Prediction:
    """Results of all groups by position in the batch."""
    groups = [[np.asarray(x)[: int(count)] for x in rows] for rows, count in outputs]
    logits, exits, indices = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    order = np.argsort(indices)
    return Prediction.of(logits[order], exits[order])
