"""Compiled inference in which samples stop at their own exit.

An executor is a pure function `(network, policy, variables, thresholds, images, count) ->
Prediction` that can be traced inside a caller's own `jax.jit`. Thresholds are arguments of the
program: changing them compiles nothing. `predictor` wraps one for use from Python, with batches of
any size; `sharded` gives each device of a mesh its share.

| executor | granularity | how |
|---|---|---|
| `full` | none | every stage and head, then select: the baseline of correctness |
| `cond` | whole batch | nested `lax.cond`, which goes on while a sample is undecided; for batch 1 |
| `compaction.compact` | sample | tiles of samples in loops; who goes on is packed together |
| `compaction.loop` | sample | the same, with equal stages as one `lax.while_loop` over depth |

Three more are driven from the host: `dispatch.host`, `streaming.stream` and `deadline.anytime`;
`selection.auto` picks. All agree with `routing.route`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.policies.base import Policy


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


Executor = Callable[[EarlyExitNetwork, Policy, Any, Array, Array, Any], Prediction]


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
        if e == 0 or batch == 1:
            # Whoever comes here alone has no earlier answer to keep.
            logits, exits = answer, jnp.full(batch, e, jnp.int32)
        else:
            logits = jnp.where(take[:, None], answer, logits)
            exits = jnp.where(take, jnp.int32(e), exits)
        if e == last:
            return logits, exits
        carry = (features, output.memory, state, undecided & ~take, logits, exits)
        return lax.cond(carry[3].any(), lambda c: go_on(e + 1, c), lambda c: (c[4], c[5]), carry)

    # A batch of one is wanted, or nobody would have called.
    count = None if batch == 1 else count
    undecided = jnp.ones(batch, bool) if count is None else jnp.arange(batch) < count
    start = (images, (), policy.init(batch), undecided, None, jnp.zeros(batch, jnp.int32))
    return _prediction(*go_on(0, start))


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
