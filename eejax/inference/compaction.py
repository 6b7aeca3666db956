"""Per-sample exit in one program: `compact` runs stage by stage, and `loop` compiles equal stages
once. `packing` has the algorithm for one stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.inference import packing
from eejax.inference.packing import Buffer, Targets
from eejax.inference.step import (
    Exit,
    Prediction,
    bind_exits,
    exit_step,
    exit_variables,
    first_samples,
    output_shapes,
    pad_batch,
)
from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.policies.base import Policy


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
) -> Prediction:
    """Lets every sample leave at its own exit, in one program: tiles under `lax.while_loop`.

    XLA updates a loop's buffers in place, so nothing is copied but survivors.

    Further arguments are those of `Executor`.

    Args:
      tiles: samples a tile, decreasing, each a divisor of the one before; default from B.

    Raises:
      ValueError: if `tiles` is not decreasing, or a size does not divide the one before it.
    """
    exits = bind_exits(network, policy, variables, thresholds)
    return _run([(exit, 1) for exit in exits], images, count, tiles)


def loop(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables | Stacked,
    thresholds: Array,
    images: Array,
    count: Any = None,
    tiles: tuple[int, ...] | None = None,
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
    return _run(exits, images, count, tiles)


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
    exits: Sequence[tuple[Exit, int]], images: Array, count: Any, tiles: tuple[int, ...] | None
) -> Prediction:
    """Runs all stages of a network over a batch.

    Args:
      exits: the first exit of each run of equal stages, with its variables stacked if there are
        several, and the number of stages.
      images, count, tiles: as for `compact`.
    """
    packing.check_tiles(tiles)
    batch, (first, _) = images.shape[0], exits[0]
    tiles = packing.choose_tiles(tiles, first, images)
    padded = -(-batch // tiles[-1]) * tiles[-1]
    tiles = tuple(size for size in tiles if size <= padded)
    indices = jnp.arange(padded, dtype=jnp.int32)
    samples = first_samples(first.policy, pad_batch(images, padded), indices)
    active = Buffer(samples, jnp.asarray(batch if count is None else count, jnp.int32))
    outputs = packing.empty_outputs(output_shapes(first, samples)[1], padded + tiles[0])
    for exit, length in exits:
        if length > 1:
            active, outputs = _run_depth(exit, length, active, outputs, tiles)
            continue
        after, _ = output_shapes(exit, active.rows)
        if same_shapes(after, active.rows) and not exit.is_last:
            # In place: fresh memory costs more than a small stage.
            survivors = Buffer(active.rows, jnp.int32(0))
        else:
            survivors = packing.empty_survivors(exit, after, padded)
        _, (active, outputs) = packing.run_stage(exit, active, Targets(survivors, outputs), tiles)
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
    after = jax.eval_shape(lambda e, rows: exit_step(at(e), rows)[0], e, active.rows)
    if not same_shapes(after, active.rows):
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
        _, (active, outputs) = packing.run_stage(at(e), active, targets, tiles)
        return e + 1, active, outputs

    return lax.while_loop(more, deeper, (jnp.int32(start), active, outputs))[1:]


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""
    a, b = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (a, b))
    return a == b
