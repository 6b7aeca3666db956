"""`full` and `cond`: executors that keep the batch together.

They compute every sample at every exit that they run, and keep the logits of the exit that each
sample took.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from eejax.inference.step import Exit, Prediction, Samples, bind_exits, exit_step, first_samples
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy


class WholeBatch(NamedTuple):
    """A batch between two exits.

    Attributes:
      samples: all B samples, also those that left.
      undecided: `[B]` bool, samples that have not left.
      logits: `[B, C]` of the last exit that each sample reached; None before the first.
      exits: `[B]` int32, that exit; None before the first.
    """

    samples: Samples
    undecided: Array
    logits: Any = None
    exits: Any = None


def whole_batch(policy: Policy, images: Array, count: Any = None) -> WholeBatch:
    """A batch before the first exit; arguments as for `Executor`."""
    batch = images.shape[0]
    undecided = jnp.ones(batch, bool) if count is None else jnp.arange(batch) < count
    return WholeBatch(first_samples(policy, images), undecided)


def whole_batch_step(exit: Exit, batch: WholeBatch) -> WholeBatch:
    """Runs one exit for all samples, and updates the results of those that are undecided."""
    samples, logits, leaves = exit_step(exit, batch.samples)
    undecided, exits = batch.undecided, jnp.full(len(logits), exit.index, jnp.int32)
    if batch.logits is not None:
        logits = jnp.where(undecided[:, None], logits, batch.logits)
        exits = jnp.where(undecided, exits, batch.exits)
    return WholeBatch(samples, undecided & ~leaves, logits, exits)


def full(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
    count: Any = None,
) -> Prediction:
    """Runs every exit and selects afterwards: the baseline of correctness, which saves nothing.

    Arguments are those of `Executor`.
    """
    del count
    batch = whole_batch(policy, images)
    for exit in bind_exits(network, policy, variables, thresholds):
        batch = whole_batch_step(exit, batch)
    return Prediction.of(batch.logits, batch.exits)


def cond(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Array,
    images: Array,
    count: Any = None,
) -> Prediction:
    """Runs exits while any sample of the batch is undecided, by nested `lax.cond`.

    The time is that of the sample that leaves last, so this is for batch 1 and small batches.

    Arguments are those of `Executor`.
    """
    exits = bind_exits(network, policy, variables, thresholds)

    def run(e: int, batch: WholeBatch) -> tuple[Array, Array]:
        batch = whole_batch_step(exits[e], batch)
        if exits[e].is_last:
            return batch.logits, batch.exits

        def go_on(batch: WholeBatch) -> tuple[Array, Array]:
            # A single image that goes on has no earlier result to keep.
            return run(e + 1, batch._replace(logits=None, exits=None) if single else batch)

        return lax.cond(batch.undecided.any(), go_on, lambda b: (b.logits, b.exits), batch)

    # With batch size 1 the single image is always valid.
    single = images.shape[0] == 1
    count = None if single else count
    return Prediction.of(*run(0, whole_batch(policy, images, count)))
