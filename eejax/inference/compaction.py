"""Per-sample exit by packing: samples that do not leave move together, and only they are computed.

A stage works through its active samples, which are packed at the front of a buffer, a tile at a
time. After the exit step the survivors of the tile are appended to the next stage's buffer, with
their memory, the policy's state and their position in the batch; the outputs of the others are
appended to the outputs. Large tiles come first and smaller ones take the rest, so that little is
padding. Only survivors move.

`run_stage` is that algorithm for one stage inside a program, and `run_tile` for one tile. `compact`
runs all stages in one program, and `loop` compiles equal stages once; `dispatch` drives tiles from
the host, and `streaming` keeps the buffers from one batch to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.inference import lanes
from eejax.inference.step import (
    Exit,
    Prediction,
    Samples,
    bind_exits,
    exit_step,
    exit_variables,
    first_samples,
    output_shapes,
    pad_batch,
)
from eejax.inference.tiles import check_tiles, choose_tiles
from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.policies.base import Policy


class Buffer(NamedTuple):
    """Rows packed at the front of a pytree of arrays.

    Attributes:
      rows: leaves `[R, ...]`, of which the first `count` rows are valid; on a TPU some are
        `lanes.Packed`. `Samples` in a stage's buffer, `Outputs` in the buffer of results, None
        where nothing is kept.
      count: int32.
    """

    rows: Any
    count: Array


class Outputs(NamedTuple):
    """Results of samples that left, in the order of leaving.

    Attributes:
      logits: `[M, C]`.
      exits: `[M]` int32.
      indices: `[M]` int32, position in the batch.
    """

    logits: Array
    exits: Array
    indices: Array


class Targets(NamedTuple):
    """The two buffers that a stage writes.

    Attributes:
      survivors: `Samples` for the next stage; its rows are None after the last stage.
      outputs: `Outputs`.
    """

    survivors: Buffer
    outputs: Buffer


def run_stage(
    exit: Exit, active: Buffer, targets: Targets, tiles: Sequence[int], flush: Any = True
) -> tuple[Array, Targets]:
    """Runs one exit for its active samples, tile by tile.

    Args:
      exit: the exit.
      active: its `Samples`. If `active.rows is targets.survivors.rows` the survivors overwrite the
        samples that were read, which is possible since there are never more of them.
      targets: buffers with room for one tile more than is appended.
      tiles: sizes that pass `check_tiles`.
      flush: whether the rest that fills no large tile is run too, in smaller tiles; bool, may be
        traced.

    Returns:
      The number of active samples that were run, all of them if `flush`; and the targets.
    """
    in_place = targets.survivors.rows is active.rows
    num_active = active.count
    start = jnp.int32(0)
    for size in tiles:

        def more(carry: tuple[Array, Targets], size: int = size) -> Array:
            left = num_active - carry[0]
            go = left >= size if size == tiles[0] else (left >= size) & flush
            return go | ((left > 0) & flush) if size == tiles[-1] else go

        def step(carry: tuple[Array, Targets], size: int = size) -> tuple[Array, Targets]:
            start, targets = carry
            rows = targets.survivors.rows if in_place else active.rows
            return start + size, run_tile(exit, Buffer(rows, num_active), start, targets, size)

        start, targets = lax.while_loop(more, step, (start, targets))
    return jnp.minimum(start, num_active), targets


def run_tile(exit: Exit, active: Buffer, start: Array, targets: Targets, size: int) -> Targets:
    """Runs one exit for active samples `start` to `start + size`, and appends to the targets."""
    tile = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), active.rows)
    if size == len(active.rows.indices):
        # A slice as long as the buffer folds away, whatever its start, and XLA moves the whole
        # stage out of the loop, where it always runs. So the tile itself, not the start alone, must
        # depend on the loop.
        tile, start = lax.optimization_barrier((tile, start))
    samples, logits, leaves = exit_step(exit, lanes.unpacked(tile))
    valid = jnp.arange(size) < active.count - start
    results = Outputs(logits, jnp.full(size, exit.index, jnp.int32), tile.indices)
    outputs = _append(targets.outputs, results, valid & leaves)
    if targets.survivors.rows is None:
        return Targets(targets.survivors, outputs)
    return Targets(_append(targets.survivors, samples, valid & ~leaves), outputs)


def _append(buffer: Buffer, rows: PyTree, keep: Array) -> Buffer:
    """Appends the rows of a tile where `keep`, `[T]` bool, in their order.

    The whole tile is written, kept rows first; later rows overwrite what lies behind them.
    """
    order = jnp.argsort(~keep, stable=True)

    def write(x: Any, tile: Any) -> Any:
        if lanes.is_packed(x):
            return jax.tree.map(write, x, lanes.pack(tile))
        packed = tile.at[order].get(mode="promise_in_bounds")
        return lax.dynamic_update_slice_in_dim(x, packed, buffer.count, 0)

    written = jax.tree.map(write, buffer.rows, rows, is_leaf=lanes.is_packed)
    return Buffer(written, buffer.count + keep.sum(dtype=jnp.int32))


def empty_buffer(rows: PyTree, size: int, platform: str | None = None) -> Buffer:
    """A buffer for `size` rows with the shapes and dtypes of `rows`, packed on a TPU."""
    if lanes.on_tpu(platform):
        rows = jax.eval_shape(lanes.packed, rows)
    return Buffer(lanes.empty(rows, size), jnp.int32(0))


def empty_survivors(exit: Exit, samples: Samples, size: int, platform: str | None = None) -> Buffer:
    """A buffer for the survivors of an exit, with shapes like `samples`; no rows for the last."""
    return Buffer(None, jnp.int32(0)) if exit.is_last else empty_buffer(samples, size, platform)


def empty_outputs(logits: Any, size: int) -> Buffer:
    """A buffer for `size` results with logits like these, `[B, C]`."""
    number: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    return empty_buffer(Outputs(logits, number, number), size)


class Stacked(NamedTuple):
    """Variables of a network whose equal stages are stacked, as `stack` returns them.

    Attributes:
      runs: `(stage's, head's)` variables of each run of equal stages; where a run has several
        stages, leaves lead with them.
    """

    runs: tuple[tuple[Variables, Variables], ...]


def compact(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
    count: Any = None,
    tiles: tuple[int, ...] | None = None,
    platform: str | None = None,
) -> Prediction:
    """Lets every sample leave at its own exit, in one program: tiles under `lax.while_loop`.

    XLA updates a loop's buffers in place, so nothing is copied but survivors.

    Further arguments are those of `Executor`.

    Args:
      tiles: samples a tile, decreasing, each a divisor of the one before; default from B.
      platform: that the program will run on, as for `tiles.default_tiles`; decides default tiles
        and the form of the buffers. Needed where a program is lowered for another one.

    Raises:
      ValueError: if `tiles` is not decreasing, or a size does not divide the one before it.
    """
    exits = bind_exits(network, policy, variables, thresholds)
    return _run([(exit, 1) for exit in exits], images, count, tiles, platform)


def loop(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables | Stacked,
    thresholds: Array,
    images: Array,
    count: Any = None,
    tiles: tuple[int, ...] | None = None,
    platform: str | None = None,
) -> Prediction:
    """`compact`, with each run of equal stages as one `lax.while_loop` over its depth.

    Stages are equal if their modules and their heads' are, and their variables and features have
    the same shapes: the blocks of a ViT or of an isotropic network. A run is compiled once, however
    deep it is, and works in one buffer; it ends when no sample is active. Stages without an equal
    neighbour run as in `compact`.

    Further arguments are those of `compact`.

    Args:
      variables: as `network.init` returns, or `stack(network, variables)`, which spares the program
        the stacking and an argument for every variable of every stage.

    Raises:
      ValueError: if `tiles` does not nest, or equal stages differ in shapes.
    """
    stacked = variables if isinstance(variables, Stacked) else stack(network, variables)
    exits = [
        (Exit(network.stages[a], network.heads[a], policy, group, thresholds, a), b - a)
        for (a, b), group in zip(runs(network), stacked.runs, strict=True)
    ]
    return _run(exits, images, count, tiles, platform)


def runs(network: EarlyExitNetwork) -> list[tuple[int, int]]:
    """Consecutive stages that are equal modules with equal heads, `[(start, stop), ...]`.

    The first stage reads images and is always by itself.
    """
    groups = [(0, 1)]
    modules = list(zip(network.stages, network.heads, strict=True))
    for e in range(1, network.num_exits):
        start = groups[-1][0]
        if start and modules[e] == modules[start]:
            groups[-1] = (start, e + 1)
        else:
            groups.append((e, e + 1))
    return groups


def stack(network: EarlyExitNetwork, variables: Variables) -> Stacked:
    """Stacks the variables of each run of equal stages along a new leading axis, for `loop`.

    Raises:
      ValueError: if variables of stages with the same module differ in shape or dtype.
    """
    stacked = []
    for a, b in runs(network):
        group = [exit_variables(variables, e) for e in range(a, b)]
        if not all(same_shapes(group[0], other) for other in group):
            raise ValueError(
                f"stages {a + 1} to {b} are one module, but their variables differ in shape or "
                "dtype; run such a network with `compact`."
            )
        several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)
        stacked.append(group[0] if b - a == 1 else several)
    return Stacked(tuple(stacked))


def _run(
    exits: Sequence[tuple[Exit, int]],
    images: Array,
    count: Any,
    tiles: tuple[int, ...] | None,
    platform: str | None,
) -> Prediction:
    """Runs all stages of a network over a batch.

    Args:
      exits: the first exit of each run of equal stages, with its variables stacked if there are
        several, and the number of stages.
      images, count, tiles, platform: as for `compact`.
    """
    check_tiles(tiles)
    batch, (first, _) = images.shape[0], exits[0]
    tiles = choose_tiles(tiles, first, images, platform)
    padded = -(-batch // tiles[-1]) * tiles[-1]
    tiles = tuple(size for size in tiles if size <= padded)
    indices = jnp.arange(padded, dtype=jnp.int32)
    samples = first_samples(first.policy, pad_batch(images, padded), indices)
    active = Buffer(samples, jnp.asarray(batch if count is None else count, jnp.int32))
    outputs = empty_outputs(output_shapes(first, samples)[1], padded + tiles[0])
    for exit, length in exits:
        if length > 1:
            active, outputs = _run_depth(exit, length, active, outputs, tiles)
            continue
        before = jax.eval_shape(lanes.unpacked, active.rows)
        after, _ = output_shapes(exit, before)
        if same_shapes(after, before) and not exit.is_last:
            # In place: fresh memory costs more than a small stage.
            survivors = Buffer(active.rows, jnp.int32(0))
        else:
            survivors = empty_survivors(exit, after, padded, platform)
        _, (active, outputs) = run_stage(exit, active, Targets(survivors, outputs), tiles)
    results = outputs.rows
    # Rows without a result are sent beyond the end, where a scatter drops them.
    indices = jnp.where(jnp.arange(len(results.indices)) < outputs.count, results.indices, batch)
    logits = jnp.zeros((batch, results.logits.shape[1]), results.logits.dtype)
    logits = logits.at[indices].set(results.logits, mode="drop")
    taken = jnp.zeros(batch, jnp.int32).at[indices].set(results.exits, mode="drop")
    return Prediction.of(logits, taken)


def _run_depth(
    exit: Exit, length: int, active: Buffer, outputs: Buffer, tiles: Sequence[int]
) -> tuple[Buffer, Buffer]:
    """A run of equal stages as a loop over depth, in the buffer that it reads."""
    start = exit.index

    def at(e: Any) -> Exit:
        variables = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, e - start, keepdims=False), exit.variables
        )
        return exit._replace(index=e, variables=variables)

    e = jnp.int32(start)
    before = jax.eval_shape(lanes.unpacked, active.rows)
    after = jax.eval_shape(lambda e, rows: exit_step(at(e), rows)[0], e, before)
    if not same_shapes(after, before):
        raise ValueError(
            f"stages {start + 1} to {start + length} are one module, but features, memory or state "
            "change shape in it; run such a network with `compact`."
        )

    def more(carry: tuple[Array, Buffer, Buffer]) -> Array:
        return (carry[0] < start + length) & (carry[1].count > 0)

    def deeper(carry: tuple[Array, Buffer, Buffer]) -> tuple[Array, Buffer, Buffer]:
        e, active, outputs = carry
        targets = Targets(Buffer(active.rows, jnp.int32(0)), outputs)
        # Variables are sliced once a depth, not once a tile.
        _, (active, outputs) = run_stage(at(e), active, targets, tiles)
        return e + 1, active, outputs

    return lax.while_loop(more, deeper, (jnp.int32(start), active, outputs))[1:]


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""
    a, b = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (a, b))
    return a == b
