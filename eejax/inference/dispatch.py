"""Stages as programs of their own, driven from the host.

`host` does what `compact` does, tile by tile and with the same function, but Python is the loop.
It is for devices on which loops are slow, and for feature maps so large that one program cannot
hold all stages' buffers: a stage's buffer is given up as soon as the next one is full.
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

from eejax.inference import packing
from eejax.inference.executors import Prediction
from eejax.inference.packing import Answers, Rows
from eejax.inference.predictors import bound
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
    """Per-sample exit with one program a stage and tile size, `predict(thresholds, images)`.

    How many samples go on is read from the device only after other work has been given to it: a
    batch is split into two groups for each device, and while the count of one is awaited the other
    is computed.

    Args:
      network, policy, variables: as for `inference.full`.
      tiles: samples a program, falling, each a divisor of the one before; default from `max_batch`.
      max_batch: a larger batch is served in pieces of this size.
      devices: each serves a part of every batch; default one device.

    Returns:
      A function of E - 1 thresholds and images `[B, ...]`, B >= 1, that returns NumPy arrays. It
      raises ValueError for no images, a wrong number of thresholds, and one that is NaN.

    Raises:
      ValueError: tiles that do not nest.
    """
    if tiles is not None:
        packing.check_tiles(tiles)
    places = [jax.devices()[0]] if devices is None else list(devices)
    parts = packing.segments(network, variables)
    on_each = {
        device: [
            functools.cache(functools.partial(_program, network, policy, e, each, device))
            for e, each in enumerate(parts)
        ]
        for device in places
    }

    @functools.cache
    def tiles_for(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
        if tiles is not None:
            return tiles
        row = packing.row_bytes(parts[0], jax.ShapeDtypeStruct((1, *shape), dtype))
        return packing.default_tiles(max_batch, row)

    integer = functools.cache(lambda value, device: jax.device_put(np.int32(value), device))

    def serve(
        group: np.ndarray, device: Any, limits: Array, first: int
    ) -> Iterator[Answers | None]:
        """One group through all stages; pauses whenever the host would have to wait."""
        count, tiles = len(group), tiles_for(group.shape[1:], group.dtype)
        # Powers of two, so that few shapes are ever compiled.
        padded = max(1 << (count - 1).bit_length(), tiles[-1])
        padding = [(0, padded - count)] + [(0, 0)] * (group.ndim - 1)
        rows = Rows(
            jax.device_put(np.pad(group, padding), device),
            (),
            jax.device_put(policy.init(padded), device),
            jax.device_put(np.arange(first, first + padded, dtype=np.int32), device),
        )
        wanted, answers = integer(count, device), None
        limits = jax.device_put(limits, device)
        for program_for in on_each[device]:
            kept, onward = integer(0, device), None
            done = 0
            for size in _sizes(count, tiles):
                step, begin = program_for(size)
                if onward is None:
                    onward, fresh = begin(rows)
                    answers = fresh if answers is None else answers
                onward, kept, answers = step(
                    (onward, answers), rows, wanted, integer(done, device), kept, limits
                )
                done += size
            rows, wanted = onward, kept
            yield None
            count = int(kept) if rows is not None else 0
            if not count:
                break
        yield answers

    def predict(thresholds: Iterable[float] | Array, images: Any) -> Prediction:
        limits = packing.limits_of(jnp.asarray(check_thresholds(thresholds, network.num_exits)))
        if len(images) == 0:
            raise ValueError("a batch of no images; give at least one.")
        found = []
        for start in range(0, len(images), max_batch):
            piece = np.asarray(images[start : start + max_batch])
            tiles = tiles_for(piece.shape[1:], piece.dtype)
            share = max(-(-len(piece) // (2 * len(places))), tiles[-1])
            share = -(-share // tiles[0]) * tiles[0] if share > tiles[0] else share
            under_way = collections.deque(
                serve(piece[first : first + share], places[i % len(places)], limits, start + first)
                for i, first in enumerate(range(0, len(piece), share))
            )
            while under_way:
                group = under_way.popleft()
                answers = next(group)
                if answers is None:
                    under_way.append(group)
                else:
                    found.append(answers)
        return _in_order(found, len(images))

    return predict


def _program(
    network: EarlyExitNetwork,
    policy: Policy,
    e: int,
    segment: packing.Segment,
    device: Any,
    size: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """One tile of `size` through exit e, `step`; and the buffers that it writes into, `begin`."""
    exits = network.num_exits

    def step(
        variables: Any,
        buffers: tuple[Rows | None, Answers],
        rows: Rows,
        wanted: Array,
        done: Array,
        kept: Array,
        limits: Array,
    ) -> Any:
        run = packing.stage(segment, policy, limits, exits)
        onward, answers = buffers
        return packing.take(run, e, variables, rows, wanted, done, onward, kept, answers, size)

    def begin(variables: Any, rows: Rows) -> tuple[Rows | None, Answers]:
        run = packing.stage(segment, policy, jnp.zeros(exits), exits)
        after, logits = jax.eval_shape(functools.partial(run, e), rows, variables)[:2]
        answers = packing.empty_answers(logits, len(rows.places) + size)
        return (None if e == exits - 1 else packing.empty(after)), answers

    variables = jax.device_put(segment.variables, device)
    return bound(step, variables, donate_argnums=(1,)), bound(begin, variables)


def _sizes(count: int, tiles: Sequence[int]) -> list[int]:
    """Tile sizes that cover `count` rows: large ones while they are full, then smaller ones."""
    sizes = []
    for size in tiles:
        full, count = divmod(count, size)
        sizes += [size] * full
    return sizes + [tiles[-1]] * (count > 0)


def _in_order(found: Sequence[Answers], batch: int) -> Prediction:
    """Packed answers by their place in the batch."""
    logits, exits = None, np.zeros(batch, np.int32)
    for answers in found:
        count = int(answers.count)
        places = np.asarray(answers.places)[:count]
        given = np.asarray(answers.logits)[:count]
        logits = np.zeros((batch, given.shape[1]), given.dtype) if logits is None else logits
        logits[places], exits[places] = given, np.asarray(answers.exits)[:count]
    assert logits is not None
    return Prediction(logits.argmax(-1).astype(np.int32), exits, logits)
