"""Per-sample exit by packing: those that go on move together, and only they are computed.

A stage works through the rows that wait for it, packed at the front of a buffer, a tile at a time;
after its head, those of the tile that go on are packed at the front of the next stage's buffer,
with their memory, the policy's state and their place in the batch. Large tiles come first and
smaller ones take the rest, so that little is padding. Only what survives moves.

`work_off` is that idea, once. `compact` and `loop` here put it into one program; `dispatch` drives
it from the host and `streaming` keeps the buffers from one batch to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.inference import Prediction
from eejax.network import EarlyExitNetwork, Module, PyTree, Variables, part
from eejax.policies import Policy


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
        after, logits = jax.eval_shape(run, jnp.int32(e), waiting, segment.first)[:2]
        if answers is None:
            answers = empty_answers(logits, padded + tiles[0])
        if segment.length > 1:
            waiting, wanted, answers = _deep(run, segment, waiting, after, wanted, answers, tiles)
        else:
            # Fresh memory costs more than a small stage, so a buffer of the right shape is kept.
            source, onward = waiting, None
            if e < exits - 1:
                source, onward = (
                    (None, waiting) if _alike(waiting, after) else (waiting, empty(after))
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
    run: Callable[..., Any],
    segment: Segment,
    waiting: Rows,
    after: Rows,
    wanted: Array,
    answers: Answers,
    tiles: tuple[int, ...],
) -> tuple[Rows, Array, Answers]:
    """A run of equal stages, depth by depth in the buffer that it reads."""
    if not _alike(waiting, after):
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


def _alike(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have leaves of the same shapes and dtypes."""

    def shapes(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    return shapes(a) == shapes(b)


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
