"""Compiled inference in which samples stop at their own exit.

An executor is a pure function `(network, policy, variables, thresholds, images, count) ->
Prediction` that can be traced inside a caller's own `jax.jit`. Thresholds are arguments of the
program: changing them compiles nothing. `predictor` wraps one for use from Python, with batches of
any size.

| executor | granularity | how |
|---|---|---|
| `full` | none | every stage and head, then select: the baseline of correctness |
| `cond` | whole batch | nested `lax.cond`, which goes on while a sample is undecided; for batch 1 |
| `compact` | sample | tiles of samples in `lax.while_loop`; who goes on is packed for the next |

All agree with `routing.route`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.policies import Policy
from eejax.routing import check_thresholds


class Prediction(NamedTuple):
    """What a batch was answered, and where; NumPy arrays where it comes from a `predictor`.

    Attributes:
      labels: `[B]` int32.
      exits: `[B]` int32, 0-based.
      logits: `[B, C]` float32, the policy's answer at that exit.
    """

    labels: Array | np.ndarray
    exits: Array | np.ndarray
    logits: Array | np.ndarray


Executor = Callable[[EarlyExitNetwork, Policy, Variables, Array, Array, Any], Prediction]


def full(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
    count: Any = None,
) -> Prediction:
    """Runs everything and selects afterwards: correct, and saves nothing.

    Args:
      network: E exits.
      policy: what scores them.
      variables: as `network.init` gives.
      thresholds: `[E - 1]` float32.
      images: `[B, ...]`.
      count: how many of the images are wanted; the rest is padding whose answers mean nothing.
    """
    del count
    chosen = None
    for e, logits, stops in _exits(network, policy, variables, thresholds, images):
        exits = jnp.full(logits.shape[0], e, jnp.int32)
        if chosen is None:
            chosen = (logits, exits, stops)
        else:
            before, exits_before, done = chosen
            chosen = (
                jnp.where(done[:, None], before, logits),
                jnp.where(done, exits_before, exits),
                done | stops,
            )
    assert chosen is not None
    return _prediction(chosen[0], chosen[1])


def cond(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
    count: Any = None,
) -> Prediction:
    """Goes on, for the whole batch, while any sample is undecided: nested `lax.cond`.

    Each sample's answer is the one of its own exit. Time is that of the last of them, so this is
    for batch 1 and for small batches. Arguments as for `full`.
    """
    batch = images.shape[0]
    last = network.num_exits - 1

    def go_on(e: int, carry: tuple[PyTree, PyTree, PyTree, Array, Any, Array]) -> PyTree:
        features, memory, state, undecided, logits, exits = carry
        features, _ = network.apply_stage(variables, e, features)
        output, _ = network.apply_head(variables, e, features, memory)
        answer, score, state = policy.step(output, state, e)
        take = undecided if e == last else undecided & (score >= thresholds[e])
        logits = jnp.where(take[:, None], answer, logits) if e else answer
        exits = jnp.where(take, jnp.int32(e), exits)
        if e == last:
            return logits, exits
        carry = (features, output.memory, state, undecided & ~take, logits, exits)
        return lax.cond(carry[3].any(), lambda c: go_on(e + 1, c), lambda c: (c[4], c[5]), carry)

    undecided = jnp.ones(batch, bool) if count is None else jnp.arange(batch) < count
    start = (images, (), policy.init(batch), undecided, None, jnp.zeros(batch, jnp.int32))
    return _prediction(*go_on(0, start))


def compact(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
    count: Any = None,
    tiles: tuple[int, ...] | None = None,
) -> Prediction:
    """Every sample stops at its own exit, inside one program.

    A stage works through the samples that reach it, packed at the front of a buffer, a tile at a
    time under `lax.while_loop`; after its head, those of the tile that go on are packed at the
    front of the next stage's buffer, with their memory, the policy's state and their place in the
    batch. Large tiles come first and smaller ones take the rest, so that little is padding. A
    loop's buffers are updated in place; only what survives moves.

    Args:
      network, policy, variables, thresholds, images, count: as for `full`.
      tiles: samples a tile, falling, each a divisor of the one before; default from B.

    Raises:
      ValueError: tiles that are not so.
    """
    batch = images.shape[0]
    tiles = default_tiles(batch) if tiles is None else tiles
    if not tiles or tiles[-1] < 1 or any(a <= b or a % b for a, b in itertools.pairwise(tiles)):
        raise ValueError(f"tiles {tiles}; give falling sizes, each a divisor of the one before.")
    padded = -(-batch // tiles[-1]) * tiles[-1]
    tiles = tuple(size for size in tiles if size <= padded)
    images = jnp.concatenate([images, jnp.zeros((padded - batch, *images.shape[1:]), images.dtype)])
    waiting = (images, (), policy.init(padded), jnp.arange(padded, dtype=jnp.int32))
    wanted = jnp.asarray(batch if count is None else count, jnp.int32)
    answers = None
    for e in range(network.num_exits):
        waiting, wanted, answers = _compact_stage(
            network, policy, variables, thresholds, e, waiting, wanted, answers, tiles
        )
    assert answers is not None
    logits, exits = answers
    return _prediction(logits[:batch], exits[:batch])


def default_tiles(batch: int) -> tuple[int, ...]:
    """Tiles of half a batch, then of an eighth, in powers of two; for a batch of 256: 128, 32."""
    large = 1 << max((batch // 2).bit_length() - 1, 0)
    return (large,) if large < 8 else (large, large // 4)


def _compact_stage(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    e: int,
    waiting: PyTree,
    wanted: Array,
    answers: tuple[Array, Array] | None,
    tiles: tuple[int, ...],
) -> tuple[PyTree, Array, tuple[Array, Array]]:
    """Stage and head e over the first `wanted` rows of `waiting`.

    Returns:
      The rows that go on, packed at the front of new buffers; how many they are; the answers so
      far, logits `[B, C]` and exits `[B]`, by place in the batch.
    """
    last = e == network.num_exits - 1
    rows = jax.tree.leaves(waiting)[0].shape[0]

    def run(tile: PyTree) -> tuple[PyTree, Array, Array]:
        features, memory, state, places = tile
        features, _ = network.apply_stage(variables, e, features)
        output, _ = network.apply_head(variables, e, features, memory)
        logits, score, state = policy.step(output, state, e)
        stops = jnp.ones(score.shape, bool) if last else score >= thresholds[e]
        return (features, output.memory, state, places), logits, stops

    shapes = jax.eval_shape(run, waiting)
    packed = () if last else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[0])
    if answers is None:
        answers = (jnp.zeros(shapes[1].shape, shapes[1].dtype), jnp.zeros(rows, jnp.int32))
    carry: PyTree = (jnp.int32(0), jnp.int32(0), packed, answers)

    for size in tiles:

        def more(carry: PyTree, size: int = size) -> Array:
            left = wanted - carry[0]
            return left > 0 if size == tiles[-1] else left >= size

        def step(carry: PyTree, size: int = size) -> PyTree:
            done, kept, packed, (logits, exits) = carry
            tile = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, done, size), waiting)
            if size == rows:
                # A slice as long as the buffer folds away, whatever its start, and XLA moves the
                # whole stage out of the loop, where it runs although nobody reaches it. So the tile
                # itself, not the start alone, must depend on the loop.
                tile, done = lax.optimization_barrier((tile, done))
            tile, answer, stops = run(tile)
            real = jnp.arange(size) < wanted - done
            places = tile[3]
            # A row that does not answer here is sent beyond the end, where a scatter drops it.
            target = jnp.where(real & stops, places, rows)
            logits = logits.at[target].set(answer, mode="drop")
            exits = exits.at[target].set(e, mode="drop")
            if not last:
                go_on = real & ~stops
                order = jnp.argsort(~go_on, stable=True)
                packed = jax.tree.map(
                    lambda buffer, x: lax.dynamic_update_slice_in_dim(buffer, x[order], kept, 0),
                    packed,
                    tile,
                )
                kept = kept + go_on.sum(dtype=jnp.int32)
            return done + size, kept, packed, (logits, exits)

        carry = lax.while_loop(more, step, carry)
    return carry[2], carry[1], carry[3]


def _exits(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
) -> Iterable[tuple[int, Array, Array]]:
    """Every exit in turn: its index, the policy's answer `[B, C]`, and who stops `[B]`."""
    outputs, _ = network.apply_all(variables, images)
    state = policy.init(images.shape[0])
    for e in range(network.num_exits):
        output = outputs._replace(
            logits=outputs.logits[e], gate=outputs.gate[e], memory=outputs.memory[e]
        )
        logits, score, state = policy.step(output, state, e)
        last = e == network.num_exits - 1
        yield e, logits, jnp.ones(score.shape, bool) if last else score >= thresholds[e]


def _prediction(logits: Array, exits: Array) -> Prediction:
    return Prediction(logits.argmax(-1).astype(jnp.int32), exits, logits)


def predictor(
    network: EarlyExitNetwork, policy: Policy, executor: Executor, *, max_batch: int = 256
) -> Callable[[Variables, Iterable[float] | Array, Any], Prediction]:
    """A compiled executor for batches of any size, `predict(variables, thresholds, images)`.

    A batch is padded to the next power of two, and one above `max_batch` is served in pieces of
    that size, so that at most `log2(max_batch) + 1` programs are ever compiled, whatever arrives.
    The padding costs no stage in `compact` and decides nothing in `cond`.

    It waits for the answers and hands them over as NumPy arrays: cutting the padding off on the
    device would compile a program for each new size, which takes longer than most batches. Images
    that are on the device already are padded there, at that price; give NumPy arrays, or sizes that
    are powers of two. Whoever wants to go on on the device compiles an executor directly.

    Args:
      network: E exits.
      policy: what scores them.
      executor: `full`, `cond` or `compact`.
      max_batch: the largest program, a power of two.

    Returns:
      A function of the variables, E - 1 thresholds, and images `[B, ...]` with any B >= 1. It
      raises ValueError for no images, a wrong number of thresholds, and one that is NaN.

    Raises:
      ValueError: `max_batch` is no power of two.
    """
    if max_batch < 1 or max_batch & (max_batch - 1):
        raise ValueError(f"max_batch is {max_batch}; give a power of two.")

    def run(variables: Variables, thresholds: Array, images: Array, count: Any) -> Prediction:
        return executor(network, policy, variables, thresholds, images, count)

    compiled = jax.jit(run, compiler_options=compiler_options())
    # A call of a small network lasts less than a millisecond, so what does not change is kept on
    # the device: the counts, and thresholds that the caller has put there (those cannot be changed
    # in place, so they are checked once).
    count_of = functools.cache(jnp.int32)
    last: list[Array] = []

    def on_device(thresholds: Iterable[float] | Array) -> Array:
        if last and last[0] is thresholds:
            return last[1]
        values = jnp.asarray(check_thresholds(thresholds, network.num_exits))
        if isinstance(thresholds, Array):
            last[:] = thresholds, values
        return values

    def predict(
        variables: Variables, thresholds: Iterable[float] | Array, images: Any
    ) -> Prediction:
        limits = on_device(thresholds)
        if len(images) == 0:
            raise ValueError("a batch of no images; give at least one.")
        # All are under way before the first is waited for.
        pieces = []
        for start in range(0, len(images), max_batch):
            piece, count = _padded(images[start : start + max_batch])
            pieces.append(compiled(variables, limits, piece, count_of(count)))
        done = [Prediction(*map(np.asarray, piece)) for piece in pieces]
        if len(done) == 1:
            return Prediction(*(part[: len(images)] for part in done[0]))
        whole = [np.concatenate(parts) for parts in zip(*done, strict=True)]
        return Prediction(*(part[: len(images)] for part in whole))

    return predict


def _padded(images: Any) -> tuple[Any, int]:
    """Images padded to the next power of two, and how many there were."""
    count = len(images)
    size = 1 << (count - 1).bit_length()
    if size == count:
        return images, count
    padding = [(0, size - count)] + [(0, 0)] * (images.ndim - 1)
    return (jnp if isinstance(images, Array) else np).pad(images, padding), count
