"""Per-sample exit by packing: those that go on move together, and only they are computed.

A stage works through the rows that wait for it, packed at the front of a buffer, a tile at a time;
after its head, those of the tile that go on are packed at the front of the next stage's buffer,
with their memory, the policy's state and their place in the batch. Large tiles come first and
smaller ones take the rest, so that little is padding. Only what survives moves.

`work_off` is that idea, once. `compaction` puts it into one program, `dispatch` drives it from the
host, and `streaming` keeps the buffers from one batch to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.network import EarlyExitNetwork, Module, PyTree, Variables, part
from eejax.policies.base import Policy


class Rows(NamedTuple):
    """What waits for a stage; every leaf leads with the rows.

    Attributes:
      features: what the stage before put out, or images.
      memory: what the head before handed on.
      state: the policy's.
      places: `[R]` int32, where in the batch each row came from.
    """

    features: PyTree
    memory: PyTree
    state: PyTree
    places: Array


class Answers(NamedTuple):
    """What was answered so far, packed in the order of answering.

    Attributes:
      logits: `[M, C]`.
      exits: `[M]` int32.
      places: `[M]` int32, of which row of the batch each is.
      count: int32, how many they are.
    """

    logits: Array
    exits: Array
    places: Array
    count: Array


class Segment(NamedTuple):
    """Consecutive stages that are one module with different variables; one stage, mostly.

    Attributes:
      stage, head: the modules.
      variables: `(stage's, head's)`; where there are several stages, every leaf leads with them.
      start: the first of them, 0-based.
      length: how many.
    """

    stage: Module
    head: Module
    variables: tuple[Variables, Variables]
    start: int
    length: int

    @property
    def first(self) -> tuple[Variables, Variables]:
        """The first stage's variables and its head's."""
        return self.variables if self.length == 1 else jax.tree.map(lambda x: x[0], self.variables)


def segments(network: EarlyExitNetwork, variables: Variables) -> list[Segment]:
    """Every stage as a segment of its own."""
    return [
        Segment(
            network.stages[e],
            network.heads[e],
            (part(variables, "stages", e), part(variables, "heads", e)),
            e,
            1,
        )
        for e in range(network.num_exits)
    ]


def check_tiles(tiles: Sequence[int]) -> None:
    """Raises ValueError unless sizes fall, each a divisor of the one before."""
    if not tiles or tiles[-1] < 1 or any(a <= b or a % b for a, b in itertools.pairwise(tiles)):
        raise ValueError(
            f"tiles {tuple(tiles)}; give falling sizes, each a divisor of the one before."
        )


# What a tile's features may take on a CPU; twice that no longer stays in the cache.
TILE_BYTES = 2 << 20


def default_tiles(batch: int, row_bytes: int) -> tuple[int, ...]:
    """Tiles for a batch, each a quarter of the one before, in powers of two.

    On a CPU at most 64, and fewer where features are large, so that a tile stays in the cache; the
    smallest is 4 or more, which leaves little padding. Elsewhere a quarter of the batch and a
    sixteenth, since a device wants much at once. docs/inference.md has the measurements.

    Args:
      batch: B.
      row_bytes: of one sample's features after the first stage.
    """
    cpu = jax.default_backend() == "cpu"
    wanted = min(batch, 64, max(TILE_BYTES // row_bytes, 16)) if cpu else batch // 4
    large = 1 << max(wanted.bit_length() - 1, 0)
    sizes = (large, large // 4, large // 16) if cpu else (large, large // 4)
    return tuple(size for i, size in enumerate(sizes) if size >= (4 if i == 2 else 1))


def row_bytes(first: Segment, images: Any) -> int:
    """Bytes of one sample's features after the first stage; of `images` shape and dtype count."""

    def run(variables: Variables, images: Array) -> PyTree:
        return first.stage.apply(variables, images, train=False)[0]

    features = jax.eval_shape(run, first.variables[0], images)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(features)) // images.shape[0]


Run = Callable[[Any, Rows, tuple[Variables, Variables]], tuple[Rows, Array, Array]]


def stage(segment: Segment, policy: Policy, limits: Array, exits: int) -> Run:
    """A segment as a function of one tile.

    Args:
      limits: as `limits_of`.
      exits: E.

    Returns:
      `run(e, tile, variables) -> (tile, logits, stops)`: the rows for the next stage, the policy's
      answers `[T, C]`, and who takes them `[T]`; of exit e, with its stage's and head's variables.
    """

    def run(
        e: Any, tile: Rows, variables: tuple[Variables, Variables]
    ) -> tuple[Rows, Array, Array]:
        features, _ = segment.stage.apply(variables[0], tile.features, train=False)
        output, _ = segment.head.apply(variables[1], features, tile.memory, train=False)
        logits, score, state = policy.step(output, tile.state, e)
        # The last exit takes what comes, also a score that is NaN.
        stops = (score >= limits[e]) | (e == exits - 1)
        return Rows(features, output.memory, state, tile.places), logits, stops

    return run


def limits_of(thresholds: Array) -> Array:
    """Thresholds `[E - 1]` and one for the last exit, which takes what comes: `[E]`."""
    return jnp.append(thresholds.astype(jnp.float32), jnp.float32(-jnp.inf))


def work_off(
    run: Run,
    e: Any,
    variables: tuple[Variables, Variables],
    waiting: Rows | None,
    wanted: Array,
    onward: Rows | None,
    kept: Array,
    answers: Answers,
    tiles: Sequence[int],
    flush: Any = True,
) -> tuple[Array, Any, Array, Answers]:
    """One stage over the first `wanted` rows that wait for it, tile by tile.

    Args:
      run, e, variables: what a tile goes through, as `stage` makes it; the exit; its variables.
      waiting: the rows; None to read those of `onward` and write where they were read, which is
        possible because never more go on than were read.
      wanted: int32, how many of the rows are real.
      onward: the next stage's buffer; None after the last. It has room for a tile more than goes
        on, or for as many rows as `waiting`.
      kept: int32, how many rows `onward` holds already.
      answers: those so far, with room for a tile more.
      tiles: sizes, falling.
      flush: take the rest that fills no large tile, in smaller ones; a bool, or a traced one.

    Returns:
      How many rows were worked off, all of them unless `flush` is false; `onward`; how many rows it
      holds; `answers`.
    """
    done = jnp.int32(0)
    for size in tiles:

        def more(carry: PyTree, size: int = size) -> Array:
            left = wanted - carry[0]
            go = left >= size if size == tiles[0] else (left >= size) & flush
            return go | ((left > 0) & flush) if size == tiles[-1] else go

        def step(carry: PyTree, size: int = size) -> PyTree:
            done, onward, kept, answers = carry
            source = onward if waiting is None else waiting
            onward, kept, answers = take(
                run, e, variables, source, wanted, done, onward, kept, answers, size
            )
            return done + size, onward, kept, answers

        done, onward, kept, answers = lax.while_loop(more, step, (done, onward, kept, answers))
    return jnp.minimum(done, wanted), onward, kept, answers


def take(
    run: Run,
    e: Any,
    variables: tuple[Variables, Variables],
    waiting: Rows,
    wanted: Array,
    done: Array,
    onward: Rows | None,
    kept: Array,
    answers: Answers,
    size: int,
) -> tuple[Rows | None, Array, Answers]:
    """One tile: rows `done` to `done + size` of those that wait; arguments as for `work_off`.

    Returns:
      `onward` and how many rows it holds, and `answers`, with this tile's rows in one or the other.
    """
    tile = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, done, size), waiting)
    if size == len(waiting.places):
        # A slice as long as the buffer folds away, whatever its start, and XLA moves the whole
        # stage out of the loop, where it runs although nobody reaches it. So the tile itself, not
        # the start alone, must depend on the loop.
        tile, done = lax.optimization_barrier((tile, done))
    after, logits, stops = run(e, tile, variables)
    real = jnp.arange(size) < wanted - done
    given = (logits, jnp.full(size, e, jnp.int32), tile.places)
    packed, count = _append(tuple(answers[:3]), given, real & stops, answers.count)
    answers = Answers(packed[0], packed[1], packed[2], count)
    if onward is None:
        return None, kept, answers
    onward, kept = _append(onward, after, real & ~stops, kept)
    return onward, kept, answers


def _append(buffer: PyTree, rows: PyTree, keep: Array, at: Array) -> tuple[PyTree, Array]:
    """Some of the rows, in their order, written into a buffer from row `at`; and the row after.

    A whole tile is written, those to keep first; what lies behind them is written over later.
    """
    order = jnp.argsort(~keep, stable=True)

    def write(buffer: Array, x: Array) -> Array:
        packed = x.at[order].get(mode="promise_in_bounds")
        return lax.dynamic_update_slice_in_dim(buffer, packed, at, 0)

    return jax.tree.map(write, buffer, rows), at + keep.sum(dtype=jnp.int32)


def empty(rows: PyTree, count: int | None = None) -> PyTree:
    """A buffer for rows of these shapes, for `count` of them where that is another number."""
    return jax.tree.map(
        lambda x: jnp.zeros((x.shape[0] if count is None else count, *x.shape[1:]), x.dtype), rows
    )


def empty_answers(logits: Any, count: int) -> Answers:
    """Room for `count` answers like `logits`, none of them given yet."""
    numbers = jnp.zeros(count, jnp.int32)
    return Answers(empty(logits, count), numbers, numbers, jnp.int32(0))


def alike(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have leaves of the same shapes and dtypes."""

    def shapes(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    return shapes(a) == shapes(b)
