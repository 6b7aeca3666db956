"""Statistics of an exit's answer and of the exits before it, which learned policies score.

The logs of one plus the scores of `max_prob` and `margin`, and the score of `entropy`, are of the
present exit. The last two compare its class with those of the exits before: whether the exit just
before predicted the same, and the share of the exits so far that did.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.network import ExitOutput
from eejax.policies.confidence import entropy, margin, max_prob
from eejax.trace import Trace

COUNT = 5


def no_classes(batch_size: int, exits: int) -> Array:
    """The classes before the first exit: `[B, E]` int32, all -1."""
    return jnp.full((batch_size, exits), -1, jnp.int32)


def statistics(output: ExitOutput, past: Array) -> tuple[Array, Array]:
    """The statistics of one exit.

    Args:
      output: logits `[B, C]`.
      past: `[B, E]` int32, the classes of the exits before, latest first, -1 for later exits.

    Returns:
      `[B, 5]` float32, and the classes with this exit's.
    """
    now = output.logits.argmax(-1).astype(jnp.int32)
    agrees = (now == past[:, 0]).astype(jnp.float32)
    past = jnp.concatenate([now[:, None], past[:, :-1]], axis=1)
    votes = (past == now[:, None]).sum(-1).astype(jnp.float32)
    share = votes / (past >= 0).sum(-1).astype(jnp.float32)
    # Scores in nats reach 1e38; their logs do not, and are in the same order.
    nats = [jnp.log1p(policy.step(output, (), 0)[1]) for policy in (max_prob, margin)]
    return jnp.stack([*nats, entropy.step(output, (), 0)[1], agrees, share], axis=-1), past


def of_trace(trace: Trace) -> np.ndarray:
    """The statistics of every exit, `[E, N, 5]` float64.

    Raises:
      ValueError: if the trace is empty, or logits are not finite.
    """
    if not len(trace.labels):
        raise ValueError("an empty trace; give held-out samples.")
    values = np.asarray(_all(jnp.asarray(trace.logits, jnp.float32)), np.float64)
    if not np.isfinite(values).all():
        raise ValueError("logits with NaN or infinity; the network has diverged.")
    return values


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the samples of `[E, N, F]`: `[E, F]` each, 1 where zero."""
    mean, std = values.mean(1), values.std(1)
    return mean, np.where(std > 1e-6, std, 1.0)


@jax.jit
def _all(logits: Array) -> Array:
    """`[E, N, 5]`, from logits `[N, E, C]`."""
    count, exits = logits.shape[:2]
    past, results = no_classes(count, exits), []
    for e in range(exits):
        output = ExitOutput(logits[:, e], jnp.zeros(count, jnp.float32), ())
        values, past = statistics(output, past)
        results.append(values)
    return jnp.stack(results)
