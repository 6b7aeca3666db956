"""Per-sample exit in one program: `compact` stage by stage, and `loop`, which compiles equal stages
once. `packing` has the idea."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.inference.executors import Prediction
from eejax.inference.packing import (
    Answers,
    Rows,
    Run,
    Segment,
    alike,
    check_tiles,
    default_tiles,
    empty,
    empty_answers,
    limits_of,
    row_bytes,
    segments,
    stage,
    work_off,
)
from eejax.network import EarlyExitNetwork, PyTree, Variables, part
from eejax.policies.base import Policy


class Stacked(NamedTuple):
    """Variables of a network whose equal stages are stacked, as `stack` makes them.

    Attributes:
      runs: for each run of equal stages `(stage's, head's)` variables, leaves leading with the
        stages of the run where it has more than one.
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
    """Every sample stops at its own exit, inside one program: tiles under `lax.while_loop`.

    XLA updates a loop's buffers in place, so nothing is copied but survivors.

    Args:
      network, policy, variables, thresholds, images, count: as for `inference.full`.
      tiles: samples a tile, falling, each a divisor of the one before; default from B.

    Raises:
      ValueError: tiles that are not so.
    """
    return _packed(segments(network, variables), policy, thresholds, images, count, tiles)


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
    deep it is, and works in one buffer; it ends when nobody is left. Stages without an equal
    neighbour are run as `compact` runs them.

    Args:
      network, policy, thresholds, images, count, tiles: as for `compact`.
      variables: as `network.init` gives, or `stack(network, variables)`, which spares the program
        the stacking and an argument for every variable of every stage.

    Raises:
      ValueError: tiles that are not as `compact` wants them.
    """
    stacked = variables if isinstance(variables, Stacked) else stack(network, variables)
    parts = [
        Segment(network.stages[a], network.heads[a], each, a, b - a)
        for (a, b), each in zip(runs(network), stacked.runs, strict=True)
    ]
    return _packed(parts, policy, thresholds, images, count, tiles)


def runs(network: EarlyExitNetwork) -> list[tuple[int, int]]:
    """Consecutive stages that are equal modules with equal heads, `[(start, stop), ...]`.

    The first stage reads images and is always by itself.
    """
    found = [(0, 1)]
    for e in range(1, network.num_exits):
        start = found[-1][0]
        both = network.stages[e], network.heads[e]
        if start and both == (network.stages[start], network.heads[start]):
            found[-1] = (start, e + 1)
        else:
            found.append((e, e + 1))
    return found


def stack(network: EarlyExitNetwork, variables: Variables) -> Stacked:
    """The variables of each run of equal stages along a new leading axis, for `loop`.

    Raises:
      ValueError: stages of one module whose variables differ in shape or dtype.
    """
    stacked = []
    for a, b in runs(network):
        each = [(part(variables, "stages", e), part(variables, "heads", e)) for e in range(a, b)]
        if b - a == 1:
            stacked.append(each[0])
            continue
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), one) for one in each]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"stages {a + 1} to {b} are one module, but their variables differ in shape or "
                "dtype; run such a network with `compact`."
            )
        stacked.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    return Stacked(tuple(stacked))


def _packed(
    parts: Sequence[Segment],
    policy: Policy,
    thresholds: Array,
    images: Array,
    count: Any,
    tiles: tuple[int, ...] | None,
) -> Prediction:
    batch = images.shape[0]
    tiles = default_tiles(batch, row_bytes(parts[0], images)) if tiles is None else tiles
    check_tiles(tiles)
    padded = -(-batch // tiles[-1]) * tiles[-1]
    tiles = tuple(size for size in tiles if size <= padded)
    images = jnp.concatenate([images, jnp.zeros((padded - batch, *images.shape[1:]), images.dtype)])
    waiting = Rows(images, (), policy.init(padded), jnp.arange(padded, dtype=jnp.int32))
    wanted = jnp.asarray(batch if count is None else count, jnp.int32)
    exits = parts[-1].start + parts[-1].length
    limits = limits_of(thresholds)
    answers = None
    for segment in parts:
        e = segment.start
        run = stage(segment, policy, limits, exits)
        # A policy is given a traced number only where it must be.
        index = e if segment.length == 1 else jnp.int32(e)
        shapes = jax.eval_shape(functools.partial(run, index), waiting, segment.first)
        after, logits = shapes[:2]
        if answers is None:
            answers = empty_answers(logits, padded + tiles[0])
        if segment.length > 1:
            waiting, wanted, answers = _deep(run, segment, waiting, after, wanted, answers, tiles)
        else:
            # Fresh memory costs more than a small stage, so a buffer of the right shape is kept.
            source, onward = waiting, None
            if e < exits - 1:
                source, onward = (
                    (None, waiting) if alike(waiting, after) else (waiting, empty(after))
                )
            _, waiting, wanted, answers = work_off(
                run, e, segment.variables, source, wanted, onward, jnp.int32(0), answers, tiles
            )
    assert answers is not None
    # A slot that holds no answer is sent beyond the end, where a scatter drops it.
    places = jnp.where(jnp.arange(len(answers.places)) < answers.count, answers.places, batch)
    logits = jnp.zeros((batch, answers.logits.shape[1]), answers.logits.dtype)
    logits = logits.at[places].set(answers.logits, mode="drop")
    exits = jnp.zeros(batch, jnp.int32).at[places].set(answers.exits, mode="drop")
    return Prediction(logits.argmax(-1).astype(jnp.int32), exits, logits)


def _deep(
    run: Run,
    segment: Segment,
    waiting: Rows,
    after: Rows,
    wanted: Array,
    answers: Answers,
    tiles: tuple[int, ...],
) -> tuple[Rows, Array, Answers]:
    """A run of equal stages, depth by depth in the buffer that it reads."""
    if not alike(waiting, after):
        raise ValueError(
            f"stages {segment.start + 1} to {segment.start + segment.length} are one module, but "
            "features, memory or state change shape in it; run such a network with `compact`."
        )
    stop = segment.start + segment.length

    def more(carry: PyTree) -> Array:
        return (carry[0] < stop) & (carry[2] > 0)

    def deeper(carry: PyTree) -> PyTree:
        e, waiting, wanted, answers = carry
        # Once a depth, not once a tile.
        variables = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, e - segment.start, keepdims=False),
            segment.variables,
        )
        _, waiting, wanted, answers = work_off(
            run, e, variables, None, wanted, waiting, jnp.int32(0), answers, tiles
        )
        return e + 1, waiting, wanted, answers

    carry = (jnp.int32(segment.start), waiting, wanted, answers)
    return lax.while_loop(more, deeper, carry)[1:]
